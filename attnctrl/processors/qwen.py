"""QwenImage: joint attention over [text, latents], prompts inside a chat template, references of Edit forms last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, apply_rotary_emb_qwen

from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.joint import JointProcessor, after_text, blocks_of
from attnctrl.processors.masked import longer
from attnctrl.processors.packing import blocks_of_pictures, cropped, pictures_of_blocks
from attnctrl.processors.work import Work
from attnctrl.prompt import Reader
from attnctrl.sites import Grid, Site, TokenLayout
from attnctrl.text import Text


class QwenLayer:
    """One call of a QwenImage attention module.

    hidden_states: (batch, latent tokens, channels). context: (batch, text tokens, channels). visible: (batch, text
    tokens) bool, False for padding. refused: the place of an attention mask, which the stock processor does not take.
    rotary: the frequencies of latents and of text.
    """

    def __init__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        visible: torch.Tensor | None,
        refused: None,
        rotary: Any,
    ) -> None:
        self.attn, self.text = attn, context.shape[1]
        latent_rotary, text_rotary = (None, None) if rotary is None else rotary
        latents = (
            self._heads(hidden_states, attn.to_q, attn.norm_q, latent_rotary),
            self._heads(hidden_states, attn.to_k, attn.norm_k, latent_rotary),
            self._heads(hidden_states, attn.to_v),
        )
        text = (
            self._heads(context, attn.add_q_proj, attn.norm_added_q, text_rotary),
            self._heads(context, attn.add_k_proj, attn.norm_added_k, text_rotary),
            self._heads(context, attn.add_v_proj),
        )
        self.query, self.key, self.value = (
            torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(text, latents, strict=True)
        )
        self.scale = self.query.shape[-1] ** -0.5
        self.mask = None
        if visible is not None:
            rest = visible.new_ones(len(visible), hidden_states.shape[1])
            self.mask = torch.cat([visible, rest], dim=1)[:, None, None, :]

    def _heads(self, states: torch.Tensor, project: Any, norm: Any = None, rotary: Any = None) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, tokens, heads, head_dim)."""
        states = project(states).unflatten(-1, (-1, self.attn.inner_dim // self.attn.heads))
        states = states if norm is None else norm(states)
        return states if rotary is None else apply_rotary_emb_qwen(states, rotary, use_real=False)

    def finish(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, head_dim) -> (latents, text)."""
        states = output.transpose(1, 2).flatten(2).to(self.query.dtype)
        latents = states[:, self.text :].contiguous()
        for module in self.attn.to_out:
            latents = module(latents)
        return latents, self.attn.to_add_out(states[:, : self.text].contiguous())


class QwenProcessor(JointProcessor):
    """QwenDoubleStreamAttnProcessor2_0 under control."""

    layer = QwenLayer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        given = (attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask)
        return self.answer(*given, image_rotary_emb)

    def layouts(self, layer: QwenLayer, work: Work) -> tuple[TokenLayout, TokenLayout]:
        layout = after_text(work.text, work.latents)
        return layout, layout


class QwenFamily(Family):
    """How the run reads a QwenImage pipeline."""

    describes = "QwenImage and QwenImage-Edit pipelines (QwenImageTransformer2DModel)"
    processor = QwenProcessor
    plain = (QwenDoubleStreamAttnProcessor2_0,)
    separate = True
    encodes = 2

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe.transformer)

    @staticmethod
    def fits(pipe: Any) -> bool:
        """Not QwenImage-Layered, which draws several pictures as one sequence."""
        model = uncompiled(getattr(pipe, "transformer", None))
        return isinstance(model, QwenImageTransformer2DModel) and not model.config.use_layer3d_rope

    def sites(self) -> list[tuple[Site, Any]]:
        found = blocks_of(self.model, "transformer_blocks")
        return [(Site(name, "joint", "", order), module) for order, (name, module) in enumerate(found)]

    def timestep(self, value: Any) -> float:
        return 1000 * super().timestep(value)

    def latent_grid(self, args: tuple, kwargs: dict[str, Any]) -> Grid:
        """From `img_shapes`: for each prompt the picture's grid, or a list of it and its references' grids."""
        first = self.signature.get(args, kwargs, "img_shapes")[0]
        frames, height, width = first[0] if isinstance(first, list) else first
        return int(frames), int(height), int(width)

    def latents(self, sample: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Reference tokens follow the picture's."""
        return sample[:, : grid[1] * grid[2]]

    def with_text(self, args: tuple, kwargs: dict[str, Any], text: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
        """Text of another length has no padding."""
        mask = self.signature.get(args, kwargs, "encoder_hidden_states_mask")
        if mask is not None and mask.shape[1] != text.shape[1]:
            args, kwargs = self.signature.put(args, kwargs, "encoder_hidden_states_mask", None)
        return super().with_text(args, kwargs, text)

    def with_crop(
        self, args: tuple, kwargs: dict[str, Any], grid: Grid, rows: slice, columns: slice
    ) -> tuple[tuple, dict[str, Any]]:
        shape = (grid[0], rows.stop - rows.start, columns.stop - columns.start)
        shapes = [
            [shape, *one[1:]] if isinstance(one, list) else shape
            for one in self.signature.get(args, kwargs, "img_shapes")
        ]
        args, kwargs = self.signature.put(args, kwargs, "img_shapes", shapes)
        return self.with_sample(args, kwargs, cropped(self.sample(args, kwargs), grid, rows, columns))

    def unpacked(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return pictures_of_blocks(latents, grid)

    def packed(self, latents: torch.Tensor, grid: Grid) -> torch.Tensor:
        return blocks_of_pictures(latents)

    def prediction(self, output: torch.Tensor, grid: Grid) -> torch.Tensor:
        return output[:, : grid[1] * grid[2]]

    def text(self, outputs: tuple) -> Text:
        """The result of `encode_prompt`: (embeddings, their mask or None)."""
        return Text(outputs[0])

    def outputs(self, text: Text, like: tuple) -> tuple:
        return text.positive, longer(like[1], text.positive)

    def readers(self, pipe: Any, arguments: dict[str, Any]) -> list[Reader]:
        """The pipeline's template without its first tokens. In Edit forms the pictures' tokens stand in it."""
        template, drop = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        limit = int(arguments.get("max_sequence_length") or pipe.tokenizer_max_length)
        pictures = arguments.get("image")
        if pictures is None:
            return [Reader(pipe.tokenizer, limit=limit, template=template, drop=drop)]
        if "<|image_pad|>" not in template:
            # Edit Plus names its pictures before the prompt.
            count = len(pictures) if isinstance(pictures, list) else 1
            mark = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
            template = template.replace("{}", "".join(mark.format(i + 1) for i in range(count)) + "{}", 1)
        # The processor puts many tokens in place of each mark, all of them before the prompt.
        blank = template.replace("{}", "", 1)
        full = pipe.processor(text=[blank], images=pictures, return_tensors="pt")["input_ids"].shape[1]
        more = full - len(pipe.tokenizer(blank)["input_ids"])
        return [Reader(pipe.tokenizer, limit=limit - more, offset=more, template=template, drop=drop)]
