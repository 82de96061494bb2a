"""One call of a ComfyUI model under controls: which layer runs, which rows are whose, and the attention itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnctrl.nodes.models import Architecture
from attnctrl.processors.attend import attend, observe_only
from attnctrl.processors.work import Branch, Work
from attnctrl.recording import Recorder
from attnctrl.report import Report
from attnctrl.sampling import Active
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout

OVERRIDE = "optimized_attention_override"


class Given(NamedTuple):
    """The arguments of ComfyUI's attention functions. q, k, v: (batch, tokens, heads * head_dim), or with skip_reshape
    (batch, heads, tokens, head_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    mask: torch.Tensor | None = None
    attn_precision: torch.dtype | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False

    def split(self, rows: slice) -> list[torch.Tensor]:
        """Query, key and value of some rows, (batch, heads, tokens, head_dim)."""
        parts = [tensor[rows] for tensor in (self.q, self.k, self.v)]
        if not self.skip_reshape:
            parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        return parts if self.attn_precision is None else [part.to(self.attn_precision) for part in parts]

    def joined(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) in the form that the caller expects."""
        output = output.to(self.q.dtype)
        return output if self.skip_output_reshape else output.transpose(1, 2).flatten(2)

    def mask_of(self, rows: slice) -> torch.Tensor | None:
        """The model's own mask as (batch or 1, heads or 1, queries, keys)."""
        if self.mask is None:
            return None
        mask = self.mask if self.mask.ndim > 2 else self.mask[None]
        mask = mask if mask.ndim == 4 else mask[:, None]
        return mask[rows] if mask.shape[0] > 1 else mask

    def of(self, rows: slice) -> Given:
        mask = self.mask
        if mask is not None and mask.ndim > 2 and mask.shape[0] > 1:
            mask = mask[rows]
        return self._replace(q=self.q[rows], k=self.k[rows], v=self.v[rows], mask=mask)


@dataclass(frozen=True)
class Chunk:
    """Rows of the batch that belong to one conditioning. active: the controls that act on them in this call.

    own: whether their text is the prompt whose words are known.
    """

    branch: str
    rows: slice
    active: tuple[Active, ...]
    own: bool = False


@dataclass(eq=False)
class Forward:
    """One call of the model. text: its text tokens; repeated: whether ComfyUI repeated them to another text's length.

    by_site: which controls act where. decline: takes the reason why a layer is left as it is.
    """

    known: Architecture
    grid: Grid
    step: Step
    chunks: Sequence[Chunk]
    text: int
    repeated: bool
    by_site: dict[str, list[Active]]
    report: Report
    recorder: Recorder | None
    decline: Callable[[str], None]
    prior: Callable[..., torch.Tensor] | None = None
    here: str = ""
    calls: int = 0

    def __post_init__(self) -> None:
        self.sites = {site.name: site for site in self.known.sites}

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's transformer_options with this call's hooks; `given` and what is in it stay as they are."""
        self.prior = given.get(OVERRIDE)
        options = {**given, OVERRIDE: self.attention}
        if self.known.kind == "unet":
            patches = {name: list(some) for name, some in given.get("patches", {}).items()}
            for attention in ("attn1", "attn2"):
                # First, before patches that change what the layer is given.
                patches[f"{attention}_patch"] = [self._noting(attention), *patches.get(f"{attention}_patch", [])]
            return {**options, "patches": patches}
        tables = dict(given.get("patches_replace", {}))
        blocks = dict(tables.get("dit", {}))
        for key in self.known.blocks:
            blocks[key] = self._in_block(key, blocks.get(key))
        return {**options, "patches_replace": {**tables, "dit": blocks}}

    def _noting(self, attention: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        def note(n: Any, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Any, Any, Any]:
            part, number = extra["block"]
            self.here = f"{part}.{number}.{extra['block_index']}.{attention}"
            return n, context, value

        return note

    def _in_block(self, key: tuple[str, int], prior: Callable[..., Any] | None) -> Callable[..., Any]:
        def block(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            self.here, self.calls = f"{key[0]}.{key[1]}", 0
            if self.known.kind == "flux" and "txt" in args:
                self.text = args["txt"].shape[1]
            try:
                return extra["original_block"](args) if prior is None else prior(args, extra)
            finally:
                self.here = ""

        return block

    def _site(self) -> Site | None:
        """The layer whose attention is asked for now."""
        name = self.here
        if self.known.kind == "wan" and name:
            # A block's first attention is that of the latents among themselves.
            name += ".self" if self.calls == 0 else ".cross"
            self.calls += 1
        elif self.known.kind == "unet":
            self.here = ""
        return self.sites.get(name)

    def attention(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """What stands in for ComfyUI's attention function; rows on which nothing acts go to `func`, or to `prior`."""
        site = self._site()
        stock = func if self.prior is None else _after(self.prior, func)
        at_site = () if site is None else tuple(self.by_site.get(site.name, ()))
        recorded = site is not None and self.recorder is not None and site.name in self.recorder.names
        acting = [tuple(a for a in chunk.active if a in at_site) for chunk in self.chunks]
        if site is None or not (any(acting) or recorded):
            return stock(*args, **kwargs)
        more = {name: value for name, value in kwargs.items() if name not in Given._fields}
        given = Given(*args, **{name: value for name, value in kwargs.items() if name in Given._fields})
        why = self._misfit(site, given)
        if why:
            self.decline(why)
            return stock(*args, **kwargs)
        whole = None
        if self.prior is not None or not any(acting):
            # Somebody else's function may count on all rows being there.
            whole = stock(*args, **kwargs)
        outputs = []
        for chunk, active in zip(self.chunks, acting, strict=True):
            work = self._work(site, chunk, active)
            if active:
                outputs.append(given.joined(attend(self._call(site, given, chunk), work)))
                continue
            if work.observe is not None:
                observe_only(self._call(site, given, chunk), work)
            outputs.append(whole[chunk.rows] if whole is not None else _called(stock, given.of(chunk.rows), more))
        return torch.cat(outputs)

    def _work(self, site: Site, chunk: Chunk, active: tuple[Active, ...]) -> Work:
        watched = chunk.own and self.recorder is not None and site.name in self.recorder.names
        return Work(
            step=self.step,
            latents=self.grid,
            text=self.text,
            branches=(Branch(chunk.branch, chunk.rows),),
            active={chunk.branch: active},
            report=self.report,
            observe=self.recorder if watched else None,
        )

    def _misfit(self, site: Site, given: Given) -> str:
        """Why this call is not the layer that `site` says; empty where it is."""
        axis = 2 if given.skip_reshape else 1
        rows, queries, keys = given.q.shape[0], given.q.shape[axis], given.k.shape[axis]
        expected = self.chunks[-1].rows.stop
        frames, height, width = site.grid(self.grid)
        latents = frames * height * width
        if rows != expected:
            return f"{site.name} has {rows} rows instead of {expected}: another node changed the batch"
        fits = queries >= latents + self.text if site.kind == "joint" else queries == latents
        if not fits or (site.kind != "cross" and keys != queries):
            return (
                f"{site.name} has {queries} queries and {keys} keys where {latents} latents were expected: another "
                "node changed the layer's size"
            )
        if site.kind == "cross" and (keys % self.text if self.repeated else keys != self.text):
            return f"{site.name} has {keys} keys where the text has {self.text} tokens: another node changed them"
        return ""

    def _call(self, site: Site, given: Given, chunk: Chunk) -> Call:
        query, key, value = given.split(chunk.rows)
        mask, grid = given.mask_of(chunk.rows), site.grid(self.grid)
        queries = TokenLayout.of_latents(grid)
        if site.kind == "joint":
            count = queries.latent.stop
            queries = TokenLayout(slice(self.text, self.text + count), slice(0, self.text), grid)
        keys = queries
        if site.kind == "cross":
            keys = TokenLayout.of_text(self.text)
            # Of a text that is repeated, once says the same.
            key, value = key[:, :, : self.text], value[:, :, : self.text]
            mask = None if mask is None else mask[..., : self.text]
        return Call(
            site=site,
            step=self.step,
            branch=chunk.branch,
            query=query,
            key=key,
            value=value,
            scale=query.shape[-1] ** -0.5,
            queries=queries,
            keys=keys,
            mask=mask,
            project=self.known.project(site.name, given.heads),
        )


def _called(stock: Callable[..., torch.Tensor], given: Given, more: dict[str, Any]) -> torch.Tensor:
    # ComfyUI's functions agree on the order of the first four, not on their names.
    return stock(*given[:4], **dict(zip(Given._fields[4:], given[4:], strict=True)), **more)


def _after(prior: Callable[..., torch.Tensor], func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def stock(*args: Any, **kwargs: Any) -> torch.Tensor:
        return prior(func, *args, **kwargs)

    return stock
