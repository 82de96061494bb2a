"""`Control`: one attention-control method, as the points of a sampling run at which it acts.

A control is a frozen dataclass. It overrides the points it needs and nothing else; the run finds out which by
looking at the class. What it must remember during a run lives in the state that `begin` returns, never in itself,
so one control object serves any number of runs and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnctrl.errors import ControlError
from attnctrl.sites import Call, Site, Step

if TYPE_CHECKING:
    from attnctrl.guidance import Prediction
    from attnctrl.kernels import LowRankBias, TokenGroups
    from attnctrl.sampling import Sampling
    from attnctrl.stepmaps import StepMaps
    from attnctrl.text import Text

ATTENTION_POINTS = ("inputs", "mask", "scores", "probs", "attend", "output")
SAMPLING_POINTS = ("context", "noise", "loss", "latents", "guide")
POINTS = ("context", *ATTENTION_POINTS, "noise", "loss", "latents", "guide")


@dataclass(frozen=True)
class Window:
    """The part of the noise schedule in which a control acts: start <= progress < end, both in [0, 1]."""

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ControlError(
                f"Window({self.start}, {self.end}) is not a part of the run: give 0 <= start <= end <= 1."
            )

    def __contains__(self, progress: float) -> bool:
        return self.start <= progress < self.end

    @property
    def empty(self) -> bool:
        return self.start == self.end


@dataclass(frozen=True)
class Where:
    """Which sites a control acts on.

    kinds: any of "self", "cross", "joint". blocks: any of "down", "mid", "up"; None for all.
    near: keep only the sites whose share of the latents' own tokens is nearest to this one (ratio-wise): 1/16 for the
    maps that the layout papers read, 16x16 of 64x64 latents. max_tokens: drop finer sites. skip: of the sites that are
    left, drop so many of the first of each denoiser.
    """

    kinds: tuple[str, ...] = ("cross", "joint")
    blocks: tuple[str, ...] | None = None
    near: float | None = None
    max_tokens: int | None = None
    skip: int = 0

    def select(self, sites: list[Site], latents: tuple[int, int, int]) -> list[Site]:
        """The sites among `sites` that this rule keeps, for latents of grid (frames, height, width)."""

        def tokens(site: Site) -> int:
            frames, height, width = site.grid(latents)
            return frames * height * width

        kept = [s for s in sites if s.kind in self.kinds and (self.blocks is None or s.block in self.blocks)]
        if self.max_tokens is not None:
            kept = [s for s in kept if tokens(s) <= self.max_tokens]
        if self.near is not None and kept:
            near = self.near * latents[0] * latents[1] * latents[2]
            best = min((tokens(s) for s in kept), key=lambda n: max(n / near, near / n))
            kept = [s for s in kept if tokens(s) == best]
        if self.skip:
            first = {s.name for expert in {s.expert for s in kept} for s in _first(kept, expert, self.skip)}
            kept = [s for s in kept if s.name not in first]
        return kept


def _first(sites: list[Site], expert: int, count: int) -> list[Site]:
    return sorted((s for s in sites if s.expert == expert), key=lambda s: s.order)[:count]


@dataclass(frozen=True)
class Descent:
    """How a loss is descended in one step: z <- z - scale * grad(loss), up to `iterations` times.

    The gradient is taken with respect to the denoiser's input, whose noise is of unit variance under every
    scheduler, so a scale means the same under DDIM and Euler; or to the embeddings of the tokens that
    `Control.learned` names. adam: these move by scale times Adam's direction, whose moments last through the run.
    """

    scale: float
    iterations: int = 1
    adam: bool = False


@dataclass(frozen=True)
class Loss:
    """value: (batch,) one loss per picture.

    Both bool (batch,): done, pictures that need no further descent this step; last, pictures for which the move that
    follows is the step's last.
    """

    value: torch.Tensor
    done: torch.Tensor | None = None
    last: torch.Tensor | None = None


def param(default: Any, text: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """A dataclass field that documents itself: one sentence, and its range [low, high] where it has one."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, **more}, kw_only=True)


@dataclass(frozen=True)
class Control:
    """Base of every method. Subclass it once, override the points the method needs, and register it.

    window: which part of the run. where: which attention sites. branches: which guidance branches, of "cond", "uncond",
    "image", InstructPix2Pix's prediction of the given picture without text, and "again", the further predictions under
    controls that the control itself asks for in its guide point.
    """

    paper: ClassVar[str] = ""
    fixes: ClassVar[str] = ""

    window: Window = field(default=Window(), kw_only=True)
    where: Where = field(default=Where(), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond",), kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            low, high = item.metadata.get("low"), item.metadata.get("high")
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices is not None and value not in choices:
                raise ControlError(
                    f"{self.name}: {item.name} is {value!r}: choose one of {', '.join(map(str, choices))}."
                )
            # "not within" rather than "outside" so that NaN is refused too.
            within = value is None or ((low is None or value >= low) and (high is None or value <= high))
            if (low is not None or high is not None) and not within:
                raise ControlError(f"{self.name}: {item.name} is {value}: it must be in [{low}, {high}].")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def idle(self) -> bool:
        """True when the parameters ask for nothing (weight 0, no regions): the run is then the stock run."""
        return self.window.empty

    def points(self) -> tuple[str, ...]:
        """The points that this control implements."""
        return tuple(p for p in POINTS if getattr(type(self), p) is not getattr(Control, p))

    def conflict(self, other: Control) -> str | None:
        """Why this control cannot work beside `other`; None when it can."""
        return None

    def acts(self, step: Step, branch: str, state: Any) -> bool:
        """Whether the attention points are asked in this step and guidance branch: by default as the fields say.

        For controls whose `context` added tokens to the text, which must be hidden elsewhere.
        """
        return step.progress in self.window and branch in self.branches

    def sites(self, sampling: Sampling) -> list[Site]:
        """The sites at which the attention points are asked, once `begin` has checked the input: by default `where`."""
        return self.where.select(sampling.sites, sampling.latent_grid)

    def begin(self, sampling: Sampling) -> Any:
        """Called once per sampling, when the latent grid is known: check the input, return this run's state."""
        return None

    # prompt level -------------------------------------------------------------------------------------------
    def context(self, text: Text, sampling: Sampling) -> Text:
        """Edit the encoded prompt, each tensor (batch, tokens, channels)."""
        return text

    # attention level ----------------------------------------------------------------------------------------
    def inputs(self, call: Call, state: Any) -> Call:
        """Edit query, key, value, or add streams."""
        return call

    def mask(self, call: Call, state: Any) -> torch.Tensor | TokenGroups | LowRankBias | None:
        """What may be seen: bool (True = visible) or additive float, broadcastable to (batch, heads, queries, keys).

        On sequences of many thousands of tokens: `TokenGroups`, which no kernel turns into an array of pairs, and for
        additive masks of few regions a `LowRankBias`, which may hold such groups.

        A control whose only attention point is this one, and whose mask depends on the site alone, also runs
        under torch.compile: its mask is asked for once per site with `call.query` absent (see `run.py`).
        """
        return None

    def scores(self, scores: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        """Edit the logits before the softmax, (batch, heads, queries, keys), float32."""
        return scores

    def probs(self, probs: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        """Edit the probabilities, (batch, heads, queries, keys), float32."""
        return probs

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        """Replace the attention: (batch, heads, queries, head_dim), or None to leave it to the next control.

        `call.seen` says what may be seen, by the model's own mask and those of other controls together. Query and key
        have further channels where another control's mask is a `LowRankBias`.
        """
        return None

    def output(self, output: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        """Edit the result before the output projection, (batch, heads, queries, head_dim)."""
        return output

    # sampling level -----------------------------------------------------------------------------------------
    def noise(self, noise: torch.Tensor, sampling: Sampling, state: Any) -> torch.Tensor:
        """Choose the start: (batch, channels, height, width) of unit variance.

        `sampling.maps_of(noise, where)` gives the maps that the first step would have from a noise, differentiable.
        """
        return noise

    def descent(self, step: Step) -> Descent | None:
        """How far the loss is descended in this step; None for not at all."""
        return None

    def loss(self, maps: StepMaps, step: Step, state: Any) -> Loss:
        """A loss per picture from the maps of the conditional branch, differentiable."""
        raise NotImplementedError

    def learned(self, state: Any) -> torch.Tensor | None:
        """The text tokens on whose embeddings the loss is descended: (batch, text tokens) bool; None: on the latents.

        The conditional branch keeps the changed embeddings to the end of the run.
        """
        return None

    def latents(self, latents: torch.Tensor, step: Step, state: Any) -> torch.Tensor:
        """Edit the latents that the scheduler's step returned, (batch, channels, height, width)."""
        return latents

    def guide(self, prediction: Prediction, step: Step, state: Any) -> torch.Tensor:
        """The combined prediction that the sampler should see, (batch, channels, height, width)."""
        return prediction.combined
