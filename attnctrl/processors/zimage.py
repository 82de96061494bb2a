"""Z-Image: joint attention over [latents, text], each part padded to a multiple of 32 tokens; a batch is a list."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZSingleStreamAttnProcessor
from torch.nn.utils.rnn import pad_sequence

from attnctrl.calls import rows_of
from attnctrl.errors import ControlError
from attnctrl.processors.family import Family, Names, keep_length, uncompiled
from attnctrl.processors.joint import JointProcessor
from attnctrl.processors.work import Branch, Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class ZImageLayer:
    """One call of a Z-Image attention module.

    hidden_states: (batch, tokens, channels), text and latents in one, so that there is no context. mask: (batch,
    tokens) bool, or one for every query, or None. rotary: (batch, tokens, head_dim / 2) complex.
    """

    def __init__(
        self, attn: Any, hidden_states: torch.Tensor, context: None, mask: torch.Tensor | None, rotary: Any
    ) -> None:
        self.attn = attn
        self.mask = mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        self.query, self.key, self.value = (t.transpose(1, 2) for t in (query, key, value))
        self.scale = self.query.shape[-1] ** -0.5

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) -> the module's output."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        for module in self.attn.to_out:
            states = module(states)
        return states


def rotated(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, heads, head_dim) turned by (batch, tokens, head_dim / 2) complex factors, in float32."""
    with torch.amp.autocast(states.device.type, enabled=False):
        pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotary.unsqueeze(2)).flatten(3).type_as(states)


class ZImageProcessor(JointProcessor):
    """ZSingleStreamAttnProcessor under control."""

    layer = ZImageLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)

    def layouts(self, layer: ZImageLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = TokenLayout.of_latents(work.latents)
        if self.site.kind == "joint":
            # The padding of the latents belongs to neither.
            first = padded(layout.latent.stop)
            layout = TokenLayout(layout.latent, slice(first, first + work.text), work.latents)
        return layout, layout


def padded(tokens: int) -> int:
    """The next multiple of 32."""
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


class ZImageFamily(Family):
    """How the run reads a Z-Image pipeline. Samples and texts travel as lists, with one tensor for each row."""

    describes = "Z-Image pipelines (ZImageTransformer2DModel)"
    processor = ZImageProcessor
    plain = (ZSingleStreamAttnProcessor,)
    names = Names(latents="x", timestep="t", text="cap_feats")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        return isinstance(uncompiled(getattr(pipe, "transformer", None)), ZImageTransformer2DModel)

    def sites(self) -> list[tuple[Site, Any]]:
        """The refiner of the latents and the main layers; the refiner of the text sees no latents."""
        found = [
            (f"{name}.{i}.attention", kind, block.attention)
            for name, kind in (("noise_refiner", "self"), ("layers", "joint"))
            for i, block in enumerate(getattr(self.model, name))
        ]
        return [(Site(name, kind, "", order), module) for order, (name, kind, module) in enumerate(found)]

    # one call of the denoiser -----------------------------------------------------------------------------------
    def sample(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """(rows, channels, 1, height, width)."""
        samples = self.signature.get(args, kwargs, "x")
        if isinstance(samples[0], list):
            raise ControlError("Z-Image's omni form, with pictures among its inputs, is not supported yet.")
        return torch.stack(samples)

    def with_sample(self, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        return self.signature.put(args, kwargs, "x", list(sample.unbind()))

    def with_text(self, args: tuple, kwargs: dict[str, Any], text: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        return self.signature.put(args, kwargs, "cap_feats", list(text.unbind()))

    def text_tokens(self, args: tuple, kwargs: dict[str, Any], rows: slice) -> int:
        return padded(max(len(text) for text in self.signature.get(args, kwargs, "cap_feats")[rows]))

    def images_per_prompt(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """The pipeline repeats each prompt's very tensor, one after the other."""
        texts = self.signature.get(args, kwargs, "cap_feats")
        return next((i for i, text in enumerate(texts) if text is not texts[0]), len(texts))

    def branches(self, rows: int, pictures: int, number: int) -> tuple[Branch, ...]:
        """The conditional rows come first."""
        found = super().branches(rows, pictures, number)
        names = [branch.name for branch in reversed(found)]
        return tuple(Branch(name, branch.rows) for name, branch in zip(names, found, strict=True))

    def picked(self, args: tuple, kwargs: dict[str, Any], rows: int, kept: slice) -> tuple[tuple, dict[str, Any]]:
        times = rows_of(self.signature.get(args, kwargs, "t"), rows, kept)
        for name, value in (
            ("x", self.signature.get(args, kwargs, "x")[kept]),
            ("t", times),
            ("cap_feats", self.signature.get(args, kwargs, "cap_feats")[kept]),
        ):
            args, kwargs = self.signature.put(args, kwargs, name, value)
        return args, kwargs

    def timestep(self, value: Any) -> float:
        return 1000 * (1 - super().timestep(value))

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        height, width = self.signature.get(args, kwargs, "x")[0].shape[-2:]
        patch = self.signature.get(args, kwargs, "patch_size") or 2
        return 1, height // patch, width // patch

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        return sample[:, :, 0]

    def output(self, result: Any) -> torch.Tensor:
        return torch.stack(result[0])

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The pipeline turns the sign."""
        return -output[:, :, 0].float()

    # its text ---------------------------------------------------------------------------------------------------
    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: lists of (tokens, channels); here, zeros fill up as pad tokens do later."""
        positive, negative = outputs
        return Text(_stacked(positive), _stacked(negative) if negative else None)

    def outputs(self, text: Text, like: tuple) -> tuple:
        why = "Z-Image counts the positions of its latents from the end of the text, and refines all text together"
        keep_length(text, _stacked(like[0]), why)
        return _unstacked(text.positive, like[0]), _unstacked(text.negative, like[1])

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        chat = [{"role": "user", "content": "{}"}]
        template = pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return [Reader(pipe.tokenizer, limit=arguments.get("max_sequence_length"), template=template)]


def _stacked(texts: list[torch.Tensor]) -> torch.Tensor:
    """(tokens, channels) each -> (batch, tokens, channels), a multiple of 32 tokens."""
    together = pad_sequence(texts, batch_first=True)
    return torch.nn.functional.pad(together, (0, 0, 0, padded(together.shape[1]) - together.shape[1]))


def _unstacked(together: torch.Tensor | None, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The reverse: as many tokens as each had."""
    if together is None:
        return []
    return [row[: len(old)] for row, old in zip(together, like, strict=True)]
