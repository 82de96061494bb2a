"""What a fine-tuning on the shapes world learns from: scenes of two subjects, whose colours no caption names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from attnctrl.encoding import encode_picture
from attnctrl.errors import ControlError
from attnctrl.prompt import Reader
from attnctrl.shapes.captions import article
from attnctrl.shapes.render import render, thing_mask
from attnctrl.shapes.world import BACKGROUNDS, HELD_OUT, SHAPES, Scene, Thing, place, sample_pairs, scene_rng

RADII = (0.12, 0.20)
VIEW_RADII = (0.16, 0.20)
_STREAM = 500


@dataclass(frozen=True)
class Taught:
    """A subject that gets a word of its own: `word` stands where a colour would, "a <s0> circle"."""

    word: str
    shape: str
    colour: str

    @property
    def name(self) -> str:
        """The words of a caption whose tokens are the subject's."""
        return f"{self.word} {self.shape}"


def taught_subjects(count: int, seed: int = 0) -> tuple[Taught, ...]:
    """So many subjects of different shapes and colours, 2, 4, 6 or 8; subjects 2i and 2i + 1 share their scenes.

    Raises ControlError for other counts.
    """
    if count not in (2, 4, 6, 8):
        raise ControlError(f"{count} subjects: give 2, 4, 6 or 8, for they share scenes two by two.")
    pairs = sample_pairs(scene_rng(seed + _STREAM, 0), count, "never", distinct=True)
    return tuple(Taught(f"<s{i}>", shape, colour) for i, (colour, shape) in enumerate(pairs))


def caption_of(named: list[Taught], background: str) -> str:
    """The prompt of a picture with these subjects: "a <s0> circle and a <s1> square on a white background"."""
    return f"{' and '.join(f'a {one.name}' for one in named)} on {article(background)} {background} background"


@dataclass(frozen=True)
class Batch:
    """Some scenes, and behind them in the rows that the model sees, where there are any, their subjects' references.

    n scenes of k subjects, m = n + n * k rows with references, else n. clean, noise: (m, channels, height, width)
    latents; timesteps: (m,); ids: (m, text tokens). words: (n, k, text tokens) bool, the tokens of each subject;
    ground: (n, 1, text tokens) bool, those of the background; masks: (n, k, rows, columns) of the picture, in [0, 1].
    pictures: (n, 3, rows, columns) in [0, 1]. references, reference_masks: (n, k, 3, rows, columns), (n, k, rows,
    columns).
    """

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    ids: torch.Tensor
    words: torch.Tensor
    ground: torch.Tensor
    masks: torch.Tensor
    pictures: torch.Tensor
    references: torch.Tensor
    reference_masks: torch.Tensor

    @property
    def scenes(self) -> int:
        return len(self.words)

    def to(self, device: Any) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class Scenes:
    """The rendered scenes of one fine-tuning, encoded once; every batch is a function of (seed, number) alone.

    Each scene shows two subjects that belong together, anywhere, on any ground; each subject has one further picture
    that shows it alone, its reference. alike: the two of a scene have one shape, any, so that the caption does not say
    which of them is which: "a <s0> heart and a <s1> heart". The tokenizer must know the words already.
    """

    def __init__(self, pipe: Any, subjects: tuple[Taught, ...], count: int, seed: int = 0, alike: bool = False) -> None:
        self.seed, self.steps = seed, int(pipe.scheduler.config.num_train_timesteps)
        self.subjects, self.reader = subjects, Reader(pipe.tokenizer)
        rng = scene_rng(seed + _STREAM, 1)
        pairs = [list(range(i, i + 2)) for i in range(0, len(subjects), 2)]
        self.chosen = torch.tensor([pairs[i % len(pairs)][:: 1 if rng.random() < 0.5 else -1] for i in range(count)])
        shown = [[subjects[i] for i in row] for row in self.chosen.tolist()]
        if alike:
            shown = [self._of_one_shape(pair, rng) for pair in shown]
        scenes = [self._scene(pair, rng) for pair in shown]
        views = [self._view(subject, rng) for subject in subjects]
        captions = [caption_of(pair, scene.background) for pair, scene in zip(shown, scenes, strict=True)]
        view_captions = [caption_of([s], view.background) for s, view in zip(subjects, views, strict=True)]
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.pictures, self.views = render(scenes, side, rng), render(views, side)
        self.masks = torch.stack([torch.stack([thing_mask(t, side) for t in scene.things]) for scene in scenes])
        self.view_masks = torch.stack([thing_mask(view.things[0], side) for view in views])
        chunks = [encode_picture(pipe, part, side, side) for part in torch.cat([self.pictures, self.views]).split(16)]
        self.latents, self.view_latents = torch.cat(chunks).float().cpu().split([count, len(subjects)])
        self.ids, self.view_ids = (self._ids(pipe.tokenizer, texts) for texts in (captions, view_captions))
        named = [[subject.name for subject in pair] for pair in shown]
        self.words = torch.stack([self._tokens(text, phrases) for text, phrases in zip(captions, named, strict=True)])
        grounds = [f"{article(scene.background)} {scene.background} background" for scene in scenes]
        self.ground = torch.stack([self._tokens(t, [g]) for t, g in zip(captions, grounds, strict=True)])

    def batch(self, number: int, size: int, rank: int = 0, ranks: int = 1, references: bool = False) -> Batch:
        """Process `rank`'s part of batch `number`, which is `size` scenes in all; references: with rows for them."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + number)
        scenes = torch.randint(len(self.latents), (size,), generator=generator)
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (strata * self.steps).long().clamp(max=self.steps - 1)
        other = torch.randn(size, self.masks.shape[1], *self.latents.shape[1:], generator=generator)
        mine = slice(rank, None, ranks)
        scenes, noise, timesteps, other = scenes[mine], noise[mine], timesteps[mine], other[mine]
        who = self.chosen[scenes]
        clean, ids = self.latents[scenes], self.ids[scenes]
        if references:
            # As noisy as their scene, so that what the two see of each other is comparable.
            clean, ids = (
                torch.cat([clean, self.view_latents[who.flatten()]]),
                torch.cat([ids, self.view_ids[who.flatten()]]),
            )
            noise = torch.cat([noise, other.flatten(0, 1)])
            timesteps = torch.cat([timesteps, timesteps.repeat_interleave(who.shape[1])])
        return Batch(
            clean,
            noise,
            timesteps,
            ids,
            self.words[scenes],
            self.ground[scenes],
            self.masks[scenes],
            self.pictures[scenes],
            self.views[who],
            self.view_masks[who],
        )

    def _of_one_shape(self, pair: list[Taught], rng: Any) -> list[Taught]:
        shapes = [shape for shape in SHAPES if not any((s.colour, shape) in HELD_OUT for s in pair)]
        shape = shapes[int(rng.integers(len(shapes)))]
        return [replace(subject, shape=shape) for subject in pair]

    def _scene(self, shown: list[Taught], rng: Any) -> Scene:
        while (spots := place(rng, [float(rng.uniform(*RADII)) for _ in shown])) is None:
            pass
        things = tuple(Thing(s.shape, s.colour, *spot) for s, spot in zip(shown, spots, strict=True))
        return Scene(things, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])

    def _view(self, subject: Taught, rng: Any) -> Scene:
        r = float(rng.uniform(*VIEW_RADII))
        cx, cy = (float(v) for v in rng.uniform(1.2 * r, 1 - 1.2 * r, 2))
        return Scene(
            (Thing(subject.shape, subject.colour, cx, cy, r),), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        )

    @staticmethod
    def _ids(tokenizer: Any, texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def _tokens(self, text: str, phrases: list[str]) -> torch.Tensor:
        """(phrases, text tokens) bool."""
        read = self.reader.read(text)
        rows = torch.zeros(len(phrases), read.limit, dtype=torch.bool)
        for row, phrase in zip(rows, phrases, strict=True):
            row[list(read.find(phrase))] = True
        return rows
