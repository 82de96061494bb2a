"""What the processors of transformers share: text and latents in one sequence, or text as keys of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch

from attnctrl.kernels import attention, combine_masks
from attnctrl.kernels.traced import numbered_group_attention
from attnctrl.processors.attend import attend, observe_only
from attnctrl.processors.work import Branch, Work
from attnctrl.sites import Call, Grid, Site, TokenLayout


class JointLayer(Protocol):
    """One call of an attention layer. query, key, value: (batch, heads, tokens, head_dim), ready for attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float

    def finish(self, output: torch.Tensor) -> Any:
        """(batch, heads, tokens, head_dim) -> what the stock processor returns."""


class JointProcessor:
    """Stands in for a stock processor and calls it whenever no control asks for this site.

    owner: the installation that put it there. A family gives its own `__call__`, whose signature must be the stock
    one's, because attention modules drop the keywords that they do not find there; its layer, made from the stock
    arguments in their order; and where the tokens stand in it.
    """

    layer: ClassVar[Callable[..., Any]]

    def __init__(self, stock: Any, site: Site, owner: Any) -> None:
        self.stock = stock
        self.site = site
        self.owner = owner

    # `set_attention_backend` and context parallelism write these on every processor that has them.
    @property
    def _attention_backend(self) -> Any:
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.stock._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.stock._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.stock._parallel_config = config

    def layouts(self, layer: Any, work: Work) -> tuple[TokenLayout, TokenLayout]:
        """Where latents and text stand among the queries and among the keys."""
        raise NotImplementedError

    def more(self, layer: Any) -> dict[str, Any]:
        """Further fields of the layer's calls."""
        return {}

    def answer(self, *given: Any, compiled_mask: torch.Tensor | None = None) -> Any:
        """What the stock processor returns for these arguments, under the controls of the run.

        compiled_mask: inside torch.compile, the mask that they make for this site together (`compiled.site_masks`).
        """
        if torch.compiler.is_compiling():
            return self.stock(*given) if compiled_mask is None else self._masked(compiled_mask, *given)
        work: Work | None = self.owner.work(self.site)
        if work is None:
            return self.stock(*given)
        output = self.stock(*given) if work.observed_only else None
        layer = type(self).layer(*given)
        calls = {branch.name: self._call(layer, work, branch) for branch in work.branches}
        if work.observed_only:
            observe_only(calls["cond"], work)
            return output
        outputs = [attend(call, work) for call in calls.values()]
        return layer.finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _masked(self, mask: torch.Tensor, *given: Any) -> Any:
        """The traceable form: one mask for all rows, or the number of token groups."""
        layer = type(self).layer(*given)
        parts = (layer.query, layer.key, layer.value)
        if mask.ndim == 0:
            return layer.finish(numbered_group_attention(*parts, mask, layer.mask, layer.scale))
        both = mask if layer.mask is None else combine_masks([layer.mask, mask])
        return layer.finish(attention(*parts, both, layer.scale))

    def _call(self, layer: JointLayer, work: Work, branch: Branch) -> Call:
        rows = branch.rows
        queries, keys = self.layouts(layer, work)
        return Call(
            site=self.site,
            step=work.step,
            branch=branch.name,
            query=layer.query[rows],
            key=layer.key[rows],
            value=layer.value[rows],
            scale=layer.scale,
            queries=queries,
            keys=keys,
            mask=layer.mask if layer.mask is None or layer.mask.shape[0] == 1 else layer.mask[rows],
            **self.more(layer),
        )


def after_text(text: int, grid: Grid) -> TokenLayout:
    """The layout of [text, latents] for so many text tokens."""
    return TokenLayout(slice(text, text + grid[0] * grid[1] * grid[2]), slice(0, text), grid)


def before_text(text: int, grid: Grid) -> TokenLayout:
    """The layout of [latents, text] for so many text tokens."""
    count = grid[0] * grid[1] * grid[2]
    return TokenLayout(slice(0, count), slice(count, count + text), grid)


def blocks_of(model: Any, *lists: str) -> list[tuple[str, Any]]:
    """The attention modules named `attn` of the blocks in the model's lists, by path, in the order of the forward."""
    return [
        (f"{name}.{i}.attn", block.attn)
        for name in lists
        for i, block in enumerate(getattr(model, name))
        if hasattr(block, "attn")
    ]
