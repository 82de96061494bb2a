"""Wan 2.1 and 2.2: self-attention over video latents and cross-attention to text, with an optional image branch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel, WanVideoToVideoPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from attnctrl.kernels import attention
from attnctrl.processors.family import Family, keep_length, uncompiled
from attnctrl.processors.joint import JointProcessor
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text

# With an image branch the stock processor takes this many tokens from the end for text, whatever their number.
TEXT_TOKENS = 512


class WanLayer:
    """One call of a WanAttention module."""

    def __init__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.attn, self.mask, self.image = attn, mask, None
        if context is not None and attn.add_k_proj is not None:
            count = context.shape[1] - TEXT_TOKENS
            self.image, context = context[:, :count], context[:, count:]
        if context is None and attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query = attn.to_q(hidden_states)
            key, value = self._projected(hidden_states if context is None else context)
        query, key, value = self._heads(attn.norm_q(query)), self._heads(attn.norm_k(key)), self._heads(value)
        if rotary is not None:
            query, key = rotated(query, *rotary), rotated(key, *rotary)
        self.query, self.key, self.value = query, key, value
        self.scale = query.shape[-1] ** -0.5

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def _projected(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.attn.fused_projections and self.attn.is_cross_attention:
            key, value = self.attn.to_kv(context).chunk(2, dim=-1)
            return key, value
        return self.attn.to_k(context), self.attn.to_v(context)

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of any text as the blocks are given it, (batch, tokens, channels)."""
        key, value = self._projected(context)
        return self._heads(self.attn.norm_k(key)), self._heads(value)

    def _image_attention(self, image: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        if attn.fused_projections:
            key, value = attn.to_added_kv(image).chunk(2, dim=-1)
        else:
            key, value = attn.add_k_proj(image), attn.add_v_proj(image)
        return attention(self.query, self._heads(attn.norm_added_k(key)), self._heads(value), None, self.scale)

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, latent tokens, head_dim) -> the layer's output; the image has a softmax of its own."""
        states = output.to(self.query.dtype)
        if self.image is not None:
            states = states + self._image_attention(self.image)
        return self.attn.to_out[1](self.attn.to_out[0](states.transpose(1, 2).flatten(2)))


def rotated(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels. states: (batch, heads, tokens, head_dim).

    cosine, sine: (1, tokens, 1, head_dim), each value twice.
    """
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine.transpose(1, 2)[..., 0::2], sine.transpose(1, 2)[..., 1::2]
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).type_as(states)


class WanProcessor(JointProcessor):
    """WanAttnProcessor under control."""

    layer = WanLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def layouts(self, layer: WanLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        queries = TokenLayout.of_latents(work.latents)
        return queries, queries if self.site.kind == "self" else TokenLayout.of_text(layer.key.shape[2])

    def more(self, layer: WanLayer) -> dict[str, Any]:
        if self.site.kind == "self":
            return {}
        embed = self.owner.family.models[self.site.expert].condition_embedder.text_embedder
        return {"project": lambda text: layer.keys_values(embed(text))}


class WanFamily(Family):
    """How the run reads a Wan pipeline; Wan 2.2 has one denoiser for the noisy steps and one for the others."""

    describes = "Wan 2.1 and 2.2 pipelines (WanTransformer3DModel)"
    processor = WanProcessor
    plain = (WanAttnProcessor,)
    separate = True

    def __init__(self, pipe: Any) -> None:
        super().__init__(*dict.fromkeys(_denoisers(pipe)))
        # The 5B model of Wan 2.2 is given the first frame in place of its latents.
        given = isinstance(pipe, WanImageToVideoPipeline) and pipe.config.expand_timesteps
        self.given_frames = 1 if given else 0

    @staticmethod
    def fits(pipe: Any) -> bool:
        known = isinstance(pipe, (WanPipeline, WanImageToVideoPipeline, WanVideoToVideoPipeline))
        return known and all(isinstance(uncompiled(d), WanTransformer3DModel) for d in _denoisers(pipe))

    def sites(self) -> list[tuple[Site, Any]]:
        layers = [
            (expert, f"{'transformer_2.' if expert else ''}blocks.{i}", block)
            for expert, model in enumerate(self.models)
            for i, block in enumerate(model.blocks)
        ]
        return [
            (Site(f"{name}.{attn}", kind, "", 2 * order + late, expert=expert), getattr(block, attn))
            for order, (expert, name, block) in enumerate(layers)
            for late, (attn, kind) in enumerate((("attn1", "self"), ("attn2", "cross")))
        ]

    def timestep(self, value: Any) -> float:
        """With one timestep per token, that of given frames is 0."""
        return super().timestep(value.max() if isinstance(value, torch.Tensor) else value)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        sizes = self.signature.get(args, kwargs, "hidden_states").shape[2:]
        frames, height, width = (size // patch for size, patch in zip(sizes, self.model.config.patch_size, strict=True))
        return int(frames), int(height), int(width)

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The mask and latents of a given image are further channels, or the first frame."""
        return sample[:, : int(self.model.config.out_channels), self.given_frames :]

    def drawn(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return latents[:, :, self.given_frames :]

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (positive, negative)."""
        return Text(*outputs)

    def outputs(self, text: Text, like: tuple) -> tuple:
        if self.model.config.image_dim is not None:
            keep_length(text, like[0], "Wan's image branch counts its text tokens from the end")
        return text.positive, text.negative

    def required(self, pipe: Any) -> dict[str, Any]:
        """By default the pipeline asks for 512 tokens: T5 takes any number, encoders with a table of positions not."""
        limit = getattr(getattr(pipe.text_encoder, "config", None), "max_position_embeddings", None)
        return {} if limit is None else {"max_sequence_length": limit}

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        return [Reader(pipe.tokenizer, limit=arguments["max_sequence_length"], clean=prompt_clean)]


def _denoisers(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [denoiser for denoiser in found if denoiser is not None]
