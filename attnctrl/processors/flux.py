"""FLUX.1: joint attention over [text, latents], the latents packed 2x2 into tokens, Kontext's reference tokens last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from attnctrl.compiled import own_mask
from attnctrl.processors.family import Family, Names, uncompiled
from attnctrl.processors.joint import JointProcessor, after_text, blocks_of
from attnctrl.processors.packing import blocks_of_pictures, cropped, own_grid, pictures_of_blocks
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Call, Grid, Site, Step, TokenLayout
from attnctrl.text import Text


class FluxLayer:
    """One call of a FluxAttention module: projections, norms and rotary embedding before, output projections after."""

    def __init__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None,
        rotary: Any,
    ) -> None:
        self.attn, self.mask = attn, mask
        self.text = 0 if context is None else context.shape[1]
        if attn.fused_projections:
            parts = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            added = None if context is None else attn.to_added_qkv(context).chunk(3, dim=-1)
        else:
            parts = tuple(make(hidden_states) for make in (attn.to_q, attn.to_k, attn.to_v))
            makers = () if context is None else (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = None if context is None else tuple(make(context) for make in makers)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if added is not None:
            text_query, text_key, text_value = (part.unflatten(-1, (-1, attn.head_dim)) for part in added)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if rotary is not None:
            query = apply_rotary_emb(query, rotary, sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        self.query, self.key, self.value = (t.transpose(1, 2) for t in (query, key, value))
        self.scale = attn.head_dim**-0.5

    def finish(self, output: torch.Tensor) -> Any:
        """(batch, heads, tokens, head_dim) -> (latents, text) of a double block, the whole sequence of a single one."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        if not self.text:
            return states
        text, latents = states[:, : self.text], states[:, self.text :]
        latents = self.attn.to_out[1](self.attn.to_out[0](latents.contiguous()))
        return latents, self.attn.to_add_out(text.contiguous())


class FluxProcessor(JointProcessor):
    """FluxAttnProcessor under control."""

    layer = FluxLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        attnctrl_masks: dict[str, torch.Tensor] | None = None,
        attnctrl_block_masks: dict[str, torch.Tensor] | None = None,
    ) -> Any:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.answer(*given, compiled_mask=own_mask(self.site, attnctrl_masks, attnctrl_block_masks))

    def layouts(self, layer: FluxLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = after_text(work.text, work.latents)
        return layout, layout


class FluxFamily(Family):
    """How the run reads a FLUX.1 pipeline."""

    describes = "FLUX.1 pipelines (FluxTransformer2DModel)"
    processor = FluxProcessor
    plain = (FluxAttnProcessor,)
    names = Names(extras="joint_attention_kwargs", pooled="pooled_projections")
    separate = True
    encodes = 2
    blocks = r"^(single_)?transformer_blocks\.\d+$"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "transformer", None)), FluxTransformer2DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        found = blocks_of(self.model, "transformer_blocks", "single_transformer_blocks")
        return [(Site(name, "joint", "", order), module) for order, (name, module) in enumerate(found)]

    def timestep(self, value: Any) -> float:
        return 1000 * super().timestep(value)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        return own_grid(self.signature.get(args, kwargs, "img_ids"))

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Reference tokens follow the picture's; the conditions of Fill and Control are further channels."""
        return sample[:, : grid[1] * grid[2], : int(self.model.out_channels)]

    def with_text(self, args: tuple, kwargs: dict[str, Any], text: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """Every text token has position 0."""
        ids = self.signature.get(args, kwargs, "txt_ids")
        args, kwargs = self.signature.put(args, kwargs, "txt_ids", ids.new_zeros(text.shape[1], ids.shape[-1]))
        return super().with_text(args, kwargs, text)

    def with_crop(
        self, args: tuple, kwargs: dict[str, Any], grid: Grid, rows: slice, columns: slice
    ) -> tuple[tuple, dict[str, Any]]:
        """Positions count from the crop's own corner."""
        ids = self.signature.get(args, kwargs, "img_ids")
        corner = slice(0, rows.stop - rows.start), slice(0, columns.stop - columns.start)
        ids = cropped(ids.reshape(1, -1, ids.shape[-1]), grid, *corner)[0]
        args, kwargs = self.signature.put(args, kwargs, "img_ids", ids)
        return self.with_sample(args, kwargs, cropped(self.sample(args, kwargs), grid, rows, columns))

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return pictures_of_blocks(latents, grid)

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return blocks_of_pictures(latents)

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        return output[:, : grid[1] * grid[2]]

    def required(self, pipe: Any) -> dict[str, Any]:
        """By default the pipeline asks for 512 tokens: T5 takes any number, encoders with a table of positions not."""
        limit = getattr(getattr(pipe.text_encoder_2, "config", None), "max_position_embeddings", None)
        return {} if limit is None else {"max_sequence_length": limit}

    def blank_call(
        self, site: Site, step: Step, branch: str, latents: Grid, batch: int, text: int, sample: torch.Tensor
    ) -> Call:
        """With as many tokens as the sequence has, reference tokens included."""
        empty, layout = sample.new_empty(batch, 1, text + sample.shape[1], 0), after_text(text, latents)
        return Call(site, step, branch, empty, empty, empty, 1.0, layout, layout)

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (T5 embeddings, pooled CLIP embedding, text ids)."""
        return Text(outputs[0], pooled=outputs[1])

    def outputs(self, text: Text, like: tuple) -> tuple:
        ids = like[2]
        return text.positive, text.pooled, ids.new_zeros(text.positive.shape[1], ids.shape[-1])

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """Only T5's tokens take part in the attention; CLIP gives one vector."""
        return [Reader(pipe.tokenizer_2, "prompt_2", limit=arguments.get("max_sequence_length"))]
