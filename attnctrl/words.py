"""Words for what pictures show: embeddings under which a model takes a picture for what its prompt says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
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
WAYS = ("learned", "found")
"""`learn_word`, by gradients; `find_word`, without."""
MOST_WORDS = 2000
"""A vocabulary beyond this is not searched whole: that would take minutes."""
AT_ONCE = 32


def learn_word(
    pipe: Any, subject: Subject, *, steps: int = 60, rate: float = 0.1, batch: int = 2, seed: int = 0
) -> torch.Tensor:
    """The embedding of the last token of a subject's phrase, (channels,), for `DelayedSubject`.

    Textual inversion (Gal et al., arXiv 2208.01618) of the text encoder's output: with everything else as it is, the
    error of the predicted noise inside the subject's mask is descended by Adam over `steps` of `batch` noised
    references each, under the prompt of the subject, which must hold its phrase. No weight of the model changes.
    Raises ControlError for other models than UNets with one text encoder that predict noise.
    """
    sitting = _sit(pipe, subject, "learned")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        word = sitting.text[sitting.place].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([word], lr=rate)
        for _ in range(steps):
            loss = sitting.errors(word[None].expand(batch, -1), sitting.draw(batch, generator)).mean()
            (word.grad,) = torch.autograd.grad(loss, [word])
            optimizer.step()
    return word.detach()


def find_word(
    pipe: Any, subject: Subject, *, among: Sequence[str] | None = None, draws: int = 4, seed: int = 0
) -> tuple[str, torch.Tensor]:
    """The word before a subject's noun that fits its pictures best, "" for none, and the noun's embedding with it.

    No gradients: the words compete by the error of the predicted noise inside the subject's mask, all on the same
    noised references, as in a diffusion classifier (Li et al., arXiv 2303.16203). After every `draws` of noise the
    worse half drops out, so that about twice `draws` predictions a word are made. The second result, (channels,), is
    for `DelayedSubject`.

    Args:
        among: the words, such as colours or materials; None: every word of the tokenizer of at least three letters.

    Raises:
        ControlError: other models than UNets with one text encoder that predict noise; too large a vocabulary.
    """
    sitting = _sit(pipe, subject, "found")
    words = ["", *dict.fromkeys(_vocabulary(pipe.tokenizer) if among is None else among)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embeddings = _nouns(pipe, subject, words)
        sums = torch.zeros(len(words), device=embeddings.device)
        left = torch.arange(len(words), device=embeddings.device)
        while len(left) > 1:
            for _ in range(draws):
                one = sitting.draw(1, generator)
                for some in left.split(AT_ONCE):
                    sums[some] += sitting.errors(embeddings[some], one)
            left = left[sums[left].argsort()[: (len(left) + 1) // 2]]
    best = int(left[0])
    return words[best], embeddings[best]


@dataclass(frozen=True)
class Word:
    """An embedding, (channels,), for the last token of a subject's phrase. found: the word before it that the embedding
    stands for, "" for none; None where the embedding was learned."""

    embedding: torch.Tensor
    found: str | None = None


def words_for(
    pipe: Any, subjects: Sequence[Subject], way: str = "learned", among: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Word]:
    """A word for the phrase of each subject, "learned" or "found": see `learn_word` and `find_word`.

    Raises ControlError for other ways, and for words to choose among where they are learned.
    """
    if way not in WAYS:
        raise ControlError(f'words are "{way}": choose one of {", ".join(WAYS)}.')
    if way == "found":
        found = {subject.phrase: find_word(pipe, subject, among=among, seed=seed) for subject in subjects}
        return {phrase: Word(embedding, word) for phrase, (word, embedding) in found.items()}
    if among is not None:
        raise ControlError('learned words are not chosen among others: with among=[...] use words="found".')
    return {subject.phrase: Word(learn_word(pipe, subject, seed=seed)) for subject in subjects}


@dataclass(frozen=True)
class _Sitting:
    """A subject in front of its model.

    clean: (references, channels, side, side) latents; inside: (references, 1, side, side), 1 in the mask. text:
    (tokens, channels) of the subject's prompt; place: of the token in question.
    """

    pipe: Any
    clean: torch.Tensor
    inside: torch.Tensor
    text: torch.Tensor
    place: int

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Which references, timesteps, and noise, so many."""
        kept = len(self.pipe.scheduler.alphas_cumprod)
        which = torch.randint(len(self.clean), (count,), generator=generator)
        timestep = torch.randint(int(EARLIEST * kept), kept, (count,), generator=generator)
        noise = torch.randn(count, *self.clean.shape[1:], generator=generator).to(self.clean)
        return which, timestep, noise

    def errors(self, words: torch.Tensor, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The mean squared error inside the mask, (n,), with words (n, channels) in place, for n draws or one."""
        which, timestep, noise = drawn
        share = self.pipe.scheduler.alphas_cumprod[timestep].to(self.clean).view(-1, 1, 1, 1)
        noised = share.sqrt() * self.clean[which] + (1 - share).sqrt() * noise
        text = self.text.expand(len(words), -1, -1)
        spoken = torch.cat([text[:, : self.place], words[:, None].to(text), text[:, self.place + 1 :]], dim=1)
        predicted = self.pipe.unet(
            noised.expand(len(words), -1, -1, -1).to(text.dtype),
            timestep.expand(len(words)).to(self.clean.device),
            spoken,
            return_dict=False,
        )[0]
        inside = self.inside[which]
        error = F.mse_loss(predicted.float(), noise.expand(len(words), -1, -1, -1), reduction="none") * inside
        return error.sum(dim=(1, 2, 3)) / (inside.sum(dim=(1, 2, 3)) * error.shape[1])


def _sit(pipe: Any, subject: Subject, way: str) -> _Sitting:
    from diffusers import UNet2DConditionModel

    unet: Any = getattr(pipe, "unet", None)
    known = isinstance(unet, UNet2DConditionModel) and not hasattr(pipe, "tokenizer_2")
    if not known or pipe.scheduler.config.get("prediction_type") != "epsilon":
        raise ControlError(
            f"a word for {type(pipe).__name__} cannot be {way}: that works with UNets of one text encoder that "
            "predict noise. Give DelayedSubject embeddings of your own."
        )
    # What is made in inference mode no loss could use.
    with torch.inference_mode(False), torch.no_grad():
        text, _ = pipe.encode_prompt(subject.text, pipe.device, 1, False)
        place = Reader(pipe.tokenizer).read(subject.text).find(subject.phrase)[-1]
        side = unet.config.sample_size
        fitted = [one.fitted(side, side) for one in subject.references]
        clean = encode_picture(pipe, [one.picture for one in fitted], *[side * pipe.vae_scale_factor] * 2).float()
        inside = torch.stack([one.tokens(side, side) for one in subject.references]).to(clean)
        return _Sitting(pipe, clean, inside.view(-1, 1, side, side), text[0], place)


def _vocabulary(tokenizer: Any) -> list[str]:
    whole = sorted(t[:-4] for t in tokenizer.get_vocab() if re.fullmatch(r"[a-z]{3,}</w>", t))
    if not whole or len(whole) > MOST_WORDS:
        raise ControlError(
            f"the tokenizer has {len(whole)} words to choose from, up to {MOST_WORDS} are tried: give among=[...], "
            "such as colours or materials."
        )
    return whole


def _nouns(pipe: Any, subject: Subject, words: Sequence[str]) -> torch.Tensor:
    """The embeddings (words, channels) of the last token of a subject's phrase, with each word before its last word."""
    start, _, noun = subject.phrase.rpartition(" ")
    at = re.search(re.escape(subject.phrase), subject.text, re.IGNORECASE)
    if at is None:
        raise ControlError(
            f'"{subject.phrase}" is spelled otherwise in its prompt "{subject.text}": write it as there.'
        )
    phrases = [" ".join(filter(None, (start, word, noun))) for word in words]
    texts = [subject.text[: at.start()] + phrase + subject.text[at.end() :] for phrase in phrases]
    reader = Reader(pipe.tokenizer)
    places = [reader.read(text).find(phrase)[-1] for text, phrase in zip(texts, phrases, strict=True)]
    chunks = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
    states = torch.cat([pipe.encode_prompt(chunk, pipe.device, 1, False)[0] for chunk in chunks])
    return states[torch.arange(len(texts)), places]
