"""What the run asks of a model family; a family overrides what its pipelines do otherwise."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from attnctrl.calls import Signature, rows_of
from attnctrl.compiled import compiled_in_place, with_block_masks
from attnctrl.errors import ControlError
from attnctrl.processors.work import Branch, call_of, halves_of
from attnctrl.prompt import Reader
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout
from attnctrl.text import Text


@dataclass(frozen=True)
class Names:
    """What the denoiser's forward calls the arguments that the run reads; pooled is empty where there is none."""

    latents: str = "hidden_states"
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    pooled: str = ""
    extras: str = ""
    """The keyword whose entries the model hands on to every processor: the way of masks into a compiled model. Empty
    where our processors do not take it, and the model is controlled uncompiled only."""


class Family:
    """How the run reads one kind of pipeline.

    processor: our stand-in. plain: the stock processors whose function it computes. separate: the unconditional
    prediction is a call of its own, after the conditional one, not the first half of the batch. encodes: how often
    the pipeline calls `encode_prompt` for one picture, 2 where the negative prompt has a call of its own. blocks: the
    paths of the blocks that may be compiled one by one, as a regular expression; for families with `names.extras`.
    encoder: the pipeline's method that encodes the prompt.
    """

    describes: ClassVar[str] = ""
    processor: ClassVar[type]
    plain: ClassVar[tuple[type, ...]] = ()
    names: Names = Names()
    separate: ClassVar[bool] = False
    encodes: ClassVar[int] = 1
    blocks: ClassVar[str] = ""
    encoder: str = "encode_prompt"

    def __init__(self, *denoisers: torch.nn.Module) -> None:
        """denoisers: the pipeline's, of one architecture; with several, each takes some of the steps."""
        self.denoisers = denoisers
        self.models: tuple[Any, ...] = tuple(map(uncompiled, denoisers))
        self.model: Any = self.models[0]

    # the model --------------------------------------------------------------------------------------------------
    @cached_property
    def compiled(self) -> bool:
        """Whether any part of a denoiser runs under torch.compile."""
        parts = (part for model in self.models for part in model.modules())
        return self.denoisers != self.models or any(map(compiled_in_place, parts))

    @property
    def checkpointed(self) -> bool:
        """Whether gradient checkpointing recomputes parts of the forward pass."""
        return any(getattr(model, "is_gradient_checkpointing", False) for model in self.models)

    def sites(self) -> list[tuple[Site, Any]]:
        """Every attention layer that can be controlled with its module, in the order of the forward pass."""
        raise NotImplementedError

    def residuals(self) -> list[tuple[Site, Any]]:
        """Every residual block as a site of kind "residual", with the module whose output it adds to its input.

        In the order of the forward pass; a site's order is that of the attention layer after it. Empty where the model
        has none.
        """
        return []

    def adapters(self) -> list[tuple[Site, Any]]:
        """What every active LoRA adds to its layer, as a site of kind "adapter", with the module that gives it.

        A site is called like its layer and the adapter's name, "...to_q/mine". Those that act on
        text or on the time are of kind "global adapter". Empty for families of which this is not known.
        """
        return []

    def skips(self) -> list[tuple[Site, Any]]:
        """Every part of the decoder that skip connections lead to as a site of kind "skip", with its module.

        It takes what the encoder hands it as `res_hidden_states_tuple`. Empty where the model has none.
        """
        return []

    def reproducible(self, stock: Any) -> bool:
        """Whether our processor computes what this stock one does."""
        return type(stock) in self.plain

    def stand_in(self, stock: Any, site: Site, owner: Any) -> Any:
        """Our processor for `stock` at `site`; owner: the installation that puts it there."""
        return self.processor(stock, site, owner)

    def compiled_blocks(self) -> list[tuple[torch.nn.Module, Callable]]:
        """The blocks that are compiled one by one, with what hands each its own masks."""
        sites = [site for site, _ in self.sites()] if self.blocks else []
        return [
            (module, partial(with_block_masks, self.names.extras, [s for s in sites if s.name.startswith(f"{name}.")]))
            for name, module in (self.model.named_modules() if self.blocks else ())
            if re.search(self.blocks, name) and compiled_in_place(module)
        ]

    # the pipeline's call ----------------------------------------------------------------------------------------
    def guidance(self, pipe: Any, prompt: str | list[str], scale: float) -> dict[str, Any]:
        """The arguments for guidance of `scale`, where 1 is none: classifier-free, or what the model was distilled to.

        Where pipelines have both, `guidance_scale` is only read by models that are given it as an input.
        """
        both = "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters
        if not both or self.model.config.get("guidance_embeds"):
            return {"guidance_scale": scale}
        negative = "" if isinstance(prompt, str) else [""] * len(prompt)
        return {"true_cfg_scale": scale, **({"negative_prompt": negative} if scale > 1 else {})}

    def required(self, pipe: Any) -> dict[str, Any]:
        """Arguments without which the pipeline's call fails on this model."""
        return {}

    # one call of the denoiser -----------------------------------------------------------------------------------
    @cached_property
    def signature(self) -> Signature:
        """The arguments of the denoiser's forward."""
        return Signature(self.model.forward)

    def sample(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The denoiser's input, (rows, ...)."""
        return self.signature.get(args, kwargs, self.names.latents)

    def with_sample(self, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another input."""
        return self.signature.put(args, kwargs, self.names.latents, sample)

    def with_text(self, args: tuple, kwargs: dict[str, Any], text: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with other text embeddings (rows, tokens, channels)."""
        return self.signature.put(args, kwargs, self.names.text, text)

    def with_pooled(self, args: tuple, kwargs: dict[str, Any], pooled: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another pooled text embedding (rows, channels); the same where the model takes none."""
        if not self.names.pooled:
            return args, kwargs
        return self.signature.put(args, kwargs, self.names.pooled, pooled)

    def with_crop(
        self, args: tuple, kwargs: dict[str, Any], grid: Grid, rows: slice, columns: slice
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments for a smaller picture: the latent tokens in these rows and columns of the grid, on their own.

        Raises ControlError for families whose denoiser cannot be called so.
        """
        sample = self.sample(args, kwargs)
        if sample.ndim != 4:
            raise ControlError(
                f"a part of the picture cannot be drawn on its own by {type(self.model).__name__}: that works with "
                "UNets, Stable Diffusion 3, PixArt, SANA, FLUX and QwenImage."
            )
        side = sample.shape[-2] // grid[1]
        cut = sample[..., rows.start * side : rows.stop * side, columns.start * side : columns.stop * side]
        return self.with_sample(args, kwargs, cut.contiguous())

    def text_tokens(self, args: tuple, kwargs: dict[str, Any], rows: slice) -> int:
        """How many text tokens the call has; rows: the conditional ones, or those of the call's only branch."""
        return int(self.signature.get(args, kwargs, self.names.text).shape[1])

    def images_per_prompt(self, args: tuple, kwargs: dict[str, Any]) -> int | None:
        """How many pictures each prompt makes, from a sampling's first call, where `encode_prompt` is not told."""
        return None

    def picked(self, args: tuple, kwargs: dict[str, Any], rows: int, kept: slice) -> tuple[tuple, dict[str, Any]]:
        """The arguments for some rows only, of a batch of `rows`."""
        return rows_of((args, kwargs), rows, kept)

    def output(self, result: Any) -> torch.Tensor:
        """The denoiser's output in what its forward returned, (rows, ...)."""
        return result[0]

    def with_extra(self, kwargs: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
        """The keyword arguments with something more for every processor."""
        return {**kwargs, self.names.extras: {**(kwargs.get(self.names.extras) or {}), name: value}}

    def branches(self, rows: int, pictures: int, number: int) -> tuple[Branch, ...]:
        """The guidance branches in the batch of call `number` (0, 1, ...) of a step."""
        return call_of(rows, pictures, number) if self.separate else halves_of(rows, pictures)

    def timestep(self, value: Any) -> float:
        """The scheduler's timestep from what the denoiser is given."""
        return float(value.flatten()[0] if isinstance(value, torch.Tensor) else value)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        """(frames, height, width) of the latent tokens at sites of depth 0."""
        raise NotImplementedError

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The part of the denoiser's input that is the sampler's latents: a view of `sample`."""
        return sample

    def drawn(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The same part of what the scheduler's step is given: a view of `latents`.

        Smaller than it where the pipeline puts given frames in place of the first latents before each call.
        """
        return latents

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The sampler's latents as (batch, channels, height, width), with a frames axis before height for video."""
        return latents

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The reverse of `unpacked`."""
        return latents

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        """What the pipeline makes of the denoiser's output before it combines the guidance branches."""
        return output

    # its text ---------------------------------------------------------------------------------------------------
    def parts(self, outputs: Any, guided: bool) -> tuple:
        """What `encode_prompt` returned, one tensor for each kind of text; guided: whether for guidance as well."""
        return outputs

    def text(self, outputs: tuple) -> Text:
        """The result of one `encode_prompt`, in `parts`."""
        raise NotImplementedError

    def outputs(self, text: Text, like: tuple) -> tuple:
        """`text` in the form that `encode_prompt` returned."""
        raise NotImplementedError

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """How the prompts become text tokens; arguments: what `encode_prompt` was called with."""
        raise NotImplementedError

    def blank_call(
        self, site: Site, step: Step, branch: str, latents: Grid, batch: int, text: int, sample: torch.Tensor
    ) -> Call:
        """A call without contents, for asking a control for its mask before the model runs (torch.compile).

        text: how many text tokens the call has. sample: the denoiser's input.
        """
        queries = TokenLayout.of_latents(site.grid(latents))
        keys = queries if site.kind == "self" else TokenLayout.of_text(text)
        empty = sample.new_empty(batch, 1, 0, 1)
        return Call(site, step, branch, empty, empty, empty, 1.0, queries, keys)


def keep_length(text: Text, like: torch.Tensor, why: str) -> None:
    """Raise ControlError when the text has another number of tokens than `like`, (batch, tokens, channels)."""
    if text.positive.shape[1] != like.shape[1]:
        raise ControlError(
            f"a control made {text.positive.shape[1]} text tokens of {like.shape[1]}, but {why}: the number must stay."
        )


def uncompiled(model: Any) -> Any:
    """The module inside of torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)
