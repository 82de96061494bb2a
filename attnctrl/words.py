"""A word learned from a picture: the embedding under which a model takes the picture for what its prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnctrl.encoding import encode_picture
from attnctrl.errors import ControlError
from attnctrl.prompt import Reader
from attnctrl.references import Subject

EARLIEST = 0.2
"""Noise below this share of the schedule decides details alone, which a word says little about."""


def learn_word(
    pipe: Any, subject: Subject, *, steps: int = 60, rate: float = 0.1, batch: int = 2, seed: int = 0
) -> torch.Tensor:
    """The embedding of the last token of a subject's phrase, (channels,), for `DelayedSubject`.

    Textual inversion (Gal et al., arXiv 2208.01618) of the text encoder's output: with everything else as it is, the
    error of the predicted noise inside the subject's mask is descended by Adam over `steps` of `batch` noised
    references each, under the prompt of the subject, which must hold its phrase. No weight of the model changes.
    Raises ControlError for other models than UNets with one text encoder that predict noise.
    """
    from diffusers import UNet2DConditionModel

    unet: Any = getattr(pipe, "unet", None)
    config = pipe.scheduler.config
    known = isinstance(unet, UNet2DConditionModel) and not hasattr(pipe, "tokenizer_2")
    if not known or config.get("prediction_type") != "epsilon":
        raise ControlError(
            f"a word for {type(pipe).__name__} cannot be learned: that works with UNets of one text encoder that "
            "predict noise. Give DelayedSubject embeddings of your own."
        )
    with torch.no_grad():
        text, _ = pipe.encode_prompt(subject.text, pipe.device, 1, False)
        place = Reader(pipe.tokenizer).read(subject.text).find(subject.phrase)[-1]
        side = unet.config.sample_size
        fitted = [one.fitted(side, side) for one in subject.references]
        clean = encode_picture(pipe, [one.picture for one in fitted], *[side * pipe.vae_scale_factor] * 2).float()
        inside = torch.stack([one.tokens(side, side) for one in subject.references]).to(clean)
    inside = inside.view(-1, 1, side, side)
    kept = pipe.scheduler.alphas_cumprod.to(clean)
    first = int(EARLIEST * len(kept))
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        text = text.detach().clone()
        word = text[0, place].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([word], lr=rate)
        for _ in range(steps):
            which = torch.randint(len(clean), (batch,), generator=generator)
            timestep = torch.randint(first, len(kept), (batch,), generator=generator)
            noise = torch.randn(batch, *clean.shape[1:], generator=generator).to(clean)
            share = kept[timestep.to(kept.device)].view(-1, 1, 1, 1)
            noised = share.sqrt() * clean[which] + (1 - share).sqrt() * noise
            spoken = torch.cat([text[:, :place], word[None, None].to(text), text[:, place + 1 :]], dim=1)
            predicted = unet(
                noised.to(text.dtype), timestep.to(clean.device), spoken.expand(batch, -1, -1), return_dict=False
            )[0]
            error = F.mse_loss(predicted.float(), noise, reduction="none") * inside[which]
            loss = error.sum() / (inside[which].sum() * clean.shape[1])
            (word.grad,) = torch.autograd.grad(loss, [word])
            optimizer.step()
    return word.detach()


def learn_words(pipe: Any, subjects: Sequence[Subject], **params: Any) -> dict[str, torch.Tensor]:
    """A learned word for the phrase of each subject, see `learn_word`."""
    return {subject.phrase: learn_word(pipe, subject, **params) for subject in subjects}
