"""FLUX.2: double blocks, then single blocks that compute attention and MLP in one; a chat model reads the prompt."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)

from attnctrl.errors import ControlError
from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.flux import FluxProcessor
from attnctrl.processors.joint import JointProcessor, after_text, blocks_of
from attnctrl.processors.packing import own_grid
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class ParallelLayer:
    """One call of a single block's module, whose projections serve attention and MLP alike.

    hidden_states: (batch, text and latent tokens, channels).
    """

    def __init__(self, attn: Any, hidden_states: torch.Tensor, mask: torch.Tensor | None, rotary: Any) -> None:
        self.attn, self.mask = attn, mask
        width = 3 * attn.inner_dim
        projected = attn.to_qkv_mlp_proj(hidden_states)
        parts, self.mlp = projected.split([width, projected.shape[-1] - width], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts.chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary is not None:
            query = apply_rotary_emb(query, rotary, sequence_dim=1)
            key = apply_rotary_emb(key, rotary, sequence_dim=1)
        self.query, self.key, self.value = (t.transpose(1, 2) for t in (query, key, value))
        self.scale = attn.head_dim**-0.5

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) -> the module's output."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        return self.attn.to_out(torch.cat([states, self.attn.mlp_act_fn(self.mlp)], dim=-1))


class ParallelProcessor(JointProcessor):
    """Flux2ParallelSelfAttnProcessor under control."""

    layer = ParallelLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        return self.answer(attn, hidden_states, attention_mask, image_rotary_emb)

    def layouts(self, layer: ParallelLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = after_text(work.text, work.latents)
        return layout, layout


class Flux2Family(Family):
    """How the run reads a FLUX.2 pipeline, dev and klein."""

    describes = "FLUX.2 pipelines (Flux2Transformer2DModel)"
    plain = (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
    separate = True
    encodes = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "transformer", None)), Flux2Transformer2DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        found = blocks_of(self.model, "transformer_blocks", "single_transformer_blocks")
        return [(Site(name, "joint", "", order), module) for order, (name, module) in enumerate(found)]

    def stand_in(self, stock: Any, site: Site, owner: Any) -> Any:
        # Double blocks have FLUX.1's signature, layer and layout.
        double = isinstance(stock, Flux2AttnProcessor)
        return (FluxProcessor if double else ParallelProcessor)(stock, site, owner)

    def timestep(self, value: Any) -> float:
        return 1000 * super().timestep(value)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        if self.signature.get(args, kwargs, "kv_cache_mode") is not None:
            raise ControlError("FLUX.2 with cached reference tokens is not supported: use the pipeline without one.")
        return own_grid(self.signature.get(args, kwargs, "img_ids"))

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Reference tokens follow the picture's."""
        return sample[:, : grid[1] * grid[2]]

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Each token is one pixel of latents that the autoencoder has patched already."""
        return latents.transpose(1, 2).unflatten(2, grid[1:])

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return latents.flatten(2).transpose(1, 2)

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        return output[:, : grid[1] * grid[2]]

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (embeddings, text ids)."""
        return Text(outputs[0])

    def outputs(self, text: Text, like: tuple) -> tuple:
        """Text ids (batch, tokens, 4) count the tokens on their last axis."""
        ids = like[1]
        if ids.shape[1] != text.positive.shape[1]:
            ids = ids.new_zeros(len(ids), text.positive.shape[1], ids.shape[2])
            ids[..., -1] = torch.arange(ids.shape[1], device=ids.device)
        return text.positive, ids

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """The chat that the pipeline makes of a prompt: Mistral's with a system message (dev), Qwen3's (klein)."""
        limit = arguments.get("max_sequence_length")
        if hasattr(pipe, "system_message"):
            system = {"role": "system", "content": [{"type": "text", "text": pipe.system_message}]}
            user = {"role": "user", "content": [{"type": "text", "text": "{}"}]}
            template = pipe.tokenizer.apply_chat_template([system, user], add_generation_prompt=False, tokenize=False)
            tokenizer = pipe.tokenizer.tokenizer
            # Processors add special tokens to a chat only where its template does not write them.
            special = tokenizer.bos_token is None or not template.startswith(tokenizer.bos_token)

            def clean(prompt: str) -> str:
                return prompt.replace("[IMG]", "")

            left = tokenizer.padding_side == "left"
            return [Reader(tokenizer, limit=limit, template=template, clean=clean, special=special, left=left)]
        chat = [{"role": "user", "content": "{}"}]
        template = pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return [Reader(pipe.tokenizer, limit=limit, template=template, left=pipe.tokenizer.padding_side == "left")]
