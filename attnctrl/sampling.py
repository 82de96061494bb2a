"""`Sampling`: one call of the pipeline under control, from its prompt to its last step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch

from attnctrl.adam import Moments
from attnctrl.control import Control, Where
from attnctrl.errors import ControlError
from attnctrl.maps import Maps
from attnctrl.prompt import PromptTokens, find_everywhere
from attnctrl.report import Report
from attnctrl.sites import Grid, Site, Step
from attnctrl.stepmaps import StepMaps
from attnctrl.text import Text

RECORD_WHERE = Where(near=1 / 16)
_BEGUN = count()
FeatureEdit = Callable[[torch.Tensor, Step], torch.Tensor]


@dataclass(frozen=True)
class Active:
    """A control of the run, its number, its state for this sampling and its points."""

    index: int
    control: Control
    state: Any
    points: frozenset[str]


@dataclass(frozen=True)
class LossValue:
    """One evaluation of a loss: values holds one number per picture, before the update that follows."""

    control: str
    step: int
    iteration: int
    values: tuple[float, ...]


@dataclass
class Sampling:
    """What controls may ask about the running pipeline call.

    prompts: one string per prompt, None when the pipeline got embeddings only. text_tokens: positions of the text
    encoder. appended: for each guidance branch, how many more the controls put behind them. guided: whether
    classifier-free guidance runs. encode: the embeddings of any texts, the same tensors for the same texts. clean:
    makes latents of a picture, or of a tensor as the pipeline returns it, for predictions of the shape of the second
    argument. The latent facts are known from the first step on: latent_grid is (frames, height, width), batch counts
    pictures = prompts * images_per_prompt. begun orders the samplings of a process. maps_of: in the noise point, the
    maps that the first step would have from a noise of unit variance (batch, channels, height, width) at the sites of
    a `Where`; differentiable. words: what losses have added to the conditional text, (batch, tokens, channels).
    moments: Adam's, by the number of the control. noised_next: the latents after a step if a picture of clean latents
    were what is drawn from this noise of unit variance, in the scheduler's scale.
    residuals: the model's residual blocks, as sites of kind "residual". adapters: what LoRAs add to its layers, see
    `Family.adapters`. skips: the parts of its decoder, as sites of kind "skip". edit_features: in a control's `begin`,
    have what a residual block or a LoRA adds, or each of the tensors that the encoder hands a part of the decoder,
    edited in the steps and guidance branches in which the control acts. It is called with the features of one branch,
    (batch, channels, height, width) or (batch, tokens, channels), and the step.
    """

    prompts: list[str] | None
    tokenize: Callable[..., list[list[PromptTokens]]]
    images_per_prompt: int
    prompt_count: int
    guided: bool
    text_tokens: int
    encode: Callable[[list[str]], Text]
    appended: dict[str, int] = field(default_factory=dict)
    clean: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    sites: list[Site] = field(default_factory=list)
    residuals: list[Site] = field(default_factory=list)
    adapters: list[Site] = field(default_factory=list)
    skips: list[Site] = field(default_factory=list)
    latent_grid: Grid = (1, 0, 0)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    finished: bool = False
    step: Step | None = None
    active: list[Active] = field(default_factory=list)
    by_site: dict[str, list[Active]] = field(default_factory=dict)
    maps: Maps = field(default_factory=Maps)
    losses: list[LossValue] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    steps_seen: list[Step] = field(default_factory=list)
    maps_of: Callable[[torch.Tensor, Where], StepMaps] | None = None
    words: torch.Tensor | None = None
    moments: dict[int, Moments] = field(default_factory=dict)
    edit_features: Callable[[Site, FeatureEdit], None] | None = None
    noised_next: Callable[[torch.Tensor, torch.Tensor, Step], torch.Tensor] | None = None
    begun: int = field(default_factory=lambda: next(_BEGUN))

    @cached_property
    def tokens(self) -> list[list[PromptTokens]]:
        """For each prompt, its tokens under each of the model's tokenizers."""
        return self.tokenize()

    def read(self, texts: list[str]) -> list[list[PromptTokens]]:
        """For each text, encoded alone by `encode`, its tokens under each of the model's tokenizers."""
        return self.tokenize(texts) if texts else []

    @property
    def joint(self) -> bool:
        """Whether the model has joint attention, where text and latents are one sequence."""
        return any(site.kind == "joint" for site in self.sites)

    @property
    def batch(self) -> int:
        return self.prompt_count * self.images_per_prompt

    def find(self, phrase: str, prompt: int = 0, occurrence: int | None = None) -> tuple[int, ...]:
        """Token positions of `phrase` in prompt number `prompt`. Raises ControlError when it is not there."""
        if self.prompts is None:
            raise ControlError(
                f'the phrase "{phrase}" cannot be looked up, because the pipeline was given prompt_embeds without a '
                "prompt: name it with control(pipe, ..., prompt=...)."
            )
        return find_everywhere(self.tokens[prompt], phrase, occurrence)

    def grids(self, where: Where) -> list[Grid]:
        """The distinct latent grids of the sites that `where` selects, finest first."""
        chosen = {site.grid(self.latent_grid) for site in where.select(self.sites, self.latent_grid)}
        return sorted(chosen, key=lambda g: -g[0] * g[1] * g[2])
