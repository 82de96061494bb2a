"""What a fine-tuning learns: a LoRA of the denoiser's attention and the embeddings of new words; and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from attnctrl.errors import ControlError
from attnctrl.shapes.pretrained import LORA, need_peft

ADAPTER = "subjects"
WORDS = "words.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_words(pipe: Any, words: Sequence[str]) -> list[int]:
    """Give the tokenizer and the text encoder new words; their ids. Every new row is the mean of the rows there were.

    Raises ControlError for a word that the tokenizer knows already.
    """
    known = pipe.tokenizer.get_vocab()
    taken = [word for word in words if word in known]
    if taken:
        raise ControlError(f'the tokenizer knows the word "{taken[0]}" already: choose another.')
    table = pipe.text_encoder.get_input_embeddings().weight
    mean = table.detach().mean(dim=0)
    pipe.tokenizer.add_tokens(list(words))
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    ids = [int(i) for i in pipe.tokenizer.convert_tokens_to_ids(list(words))]
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[ids] = mean
    return ids


class Learner(nn.Module):
    """A UNet with a LoRA and its text encoder with some learned rows, as one module; all else is frozen.

    Learned are `trained()`: the LoRA's matrices and the rows of `words`, which the tokenizer got from `add_words`.
    """

    def __init__(self, pipe: Any, words: Sequence[str], rank: int) -> None:
        super().__init__()
        need_peft("fine-tuning subjects")
        from peft import LoraConfig

        if not isinstance(pipe, StableDiffusionPipeline) or pipe.scheduler.config.prediction_type != "epsilon":
            raise ControlError(
                f"{type(pipe).__name__} cannot be fine-tuned by this: it takes Stable Diffusion pipelines of one text "
                "encoder that predict noise. The losses and record() work on every supported model."
            )
        self.unet, self.text = pipe.unet, pipe.text_encoder
        ids = add_words(pipe, words)
        self.unet.requires_grad_(False)
        self.text.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        self.unet.add_adapter(config, adapter_name=ADAPTER)
        table = self.text.get_input_embeddings().weight
        self.table = next(name for name, p in self.text.named_parameters() if p is table)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.words = nn.Parameter(table[ids].detach().clone())
        self.names = tuple(words)

    def lora(self) -> list[nn.Parameter]:
        """The matrices of the LoRA."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def trained(self) -> nn.ParameterDict:
        """Everything that is learned, by name."""
        named = {n.replace(".", "/"): p for n, p in self.unet.named_parameters() if p.requires_grad}
        return nn.ParameterDict({**named, "words": self.words})

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The predicted noise, like `noisy` (rows, channels, height, width); ids: (rows, text tokens)."""
        table = self.text.get_parameter(self.table).index_copy(0, self.ids, self.words)
        text = torch.func.functional_call(self.text, {self.table: table}, kwargs={"input_ids": ids})
        predicted: torch.Tensor = self.unet(noisy, timesteps, text.last_hidden_state, return_dict=False)[0]
        return predicted

    def settle(self) -> None:
        """Put the learned rows into the text encoder, so that its pipeline draws with them."""
        with torch.no_grad():
            self.text.get_parameter(self.table)[self.ids] = self.words

    def save(self, folder: Path) -> None:
        """The LoRA as `load_lora_weights` of a pipeline reads it, and the words, one tensor (channels,) for each."""
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.unet, adapter_name=ADAPTER)
        layers = {name: tensor.detach().float().cpu().contiguous() for name, tensor in layers.items()}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
        words = self.words.detach().float().cpu()
        save_file({name: row.clone() for name, row in zip(self.names, words, strict=True)}, folder / WORDS)


def load_subjects(pipe: Any, folder: str | Path) -> list[str]:
    """Give a pipeline the LoRA and the words of a fine-tuning; the words, for use in prompts.

    By the pipeline's own `load_lora_weights` and `load_textual_inversion`. Raises ControlError where the folder has not
    both files, or peft is not installed.
    """
    folder = Path(folder)
    missing = [name for name in (LORA, WORDS) if not (folder / name).exists()]
    if missing:
        raise ControlError(f"{folder} has no {missing[0]}: give the OUT of a training of subjects.")
    need_peft("loading fine-tuned subjects")
    words = load_file(folder / WORDS)
    pipe.load_lora_weights(folder, weight_name=LORA, adapter_name=ADAPTER)
    pipe.load_textual_inversion(list(words.values()), token=list(words))
    return list(words)
