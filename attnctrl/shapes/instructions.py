"""Edits of scenes and instructions that ask for them, in the words that the shared tokenizer has.

That vocabulary has no verbs, so an instruction names what is there and what it is to become: "red circle to blue",
"a red circle to a star", "red circle to background" for what is to go, "background to black".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .captions import article
from .world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, Thing, sample_scene

KINDS: dict[str, float] = {
    "recolour": 0.22, "reshape": 0.22, "replace": 0.12, "remove": 0.16, "background": 0.12, "two": 0.16,
}  # fmt: skip
"""What an edit does to one thing, to the background, or to two things at once; with its share of the training."""

GONE = "background"
"""What a thing that is to be removed becomes."""
P_ARTICLE, P_SHORT, P_COMMA = 0.5, 0.4, 0.3

Part = tuple[str, str]
"""Words of the source and what they are to become: ("red circle", "blue circle")."""


@dataclass(frozen=True)
class Change:
    """A scene and what it becomes: equal but for the last things, and the background.

    parts: what is asked for, in full words. reversible: whether the way back can be asked for as well.
    """

    kind: str
    before: Scene
    after: Scene
    parts: tuple[Part, ...]

    @property
    def reversible(self) -> bool:
        return all(target != GONE for _, target in self.parts)

    def reversed(self) -> Change:
        """The way back. Raises ValueError where something was removed: it could stand anywhere."""
        if not self.reversible:
            raise ValueError("what was removed cannot be asked for again: an instruction never says where.")
        return Change(self.kind, self.after, self.before, tuple((target, source) for source, target in self.parts))


def instruction_for(parts: Sequence[Part]) -> str:
    """The canonical instruction: "red circle to blue circle and green star to background".

    Raises ValueError when there are no parts.
    """
    if not parts:
        raise ValueError("an instruction needs at least one change")
    return " and ".join(f"{source} to {target}" for source, target in parts)


def shortened(source: str, target: str) -> str:
    """The target without the word that it shares with the source: "blue" of ("red circle", "blue circle")."""
    before, after = source.split(), target.split()
    if len(before) != 2 or len(after) != 2:
        return target
    kept = [word for word, old in zip(after, before, strict=True) if word != old]
    return kept[0] if len(kept) == 1 else target


def training_instruction(change: Change, rng: np.random.Generator) -> str:
    """A random way of asking for a change: with or without articles, in full or short, parts in any order."""
    draw = rng.random(1 + 2 * len(change.parts))
    told = []
    for i, which in enumerate(rng.permutation(len(change.parts))):
        source, target = change.parts[which]
        with_article, short = draw[1 + 2 * i] < P_ARTICLE, draw[2 + 2 * i] < P_SHORT
        bare = shortened(source, target) if short else target
        if with_article:
            source = f"{article(source)} {source}"
            # A colour alone and the mere background have no article.
            bare = bare if bare in (*COLOURS, *BACKGROUNDS, GONE) else f"{article(bare)} {bare}"
        told.append(f"{source} to {bare}")
    return (", " if draw[0] < P_COMMA else " and ").join(told)


def sample_change(rng: np.random.Generator, kind: str | None = None) -> Change:
    """Draw a scene and an edit of it; what comes of it never occurs among `HELD_OUT`.

    Raises ValueError for a kind that is not of KINDS.
    """
    if kind is None:
        kind = list(KINDS)[int(rng.choice(len(KINDS), p=np.array(list(KINDS.values()))))]
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    scene = sample_scene(rng, {2: 0.5, 3: 0.5} if kind == "two" else None)
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    if kind == "background":
        others = [b for b in BACKGROUNDS if b != scene.background]
        ground = others[int(rng.integers(len(others)))]
        part = (f"{scene.background} background", f"{ground} background")
        return Change(kind, Scene(tuple(things), scene.background), Scene(tuple(things), ground), (part,))
    count = 2 if kind == "two" else 1
    kept, parts = things[:-count], []
    taken, after = {t.pair for t in things}, list(kept)
    for thing in things[-count:]:
        how = kind if kind != "two" else ("recolour", "reshape", "replace", "remove")[int(rng.integers(4))]
        new = None if how == "remove" else _other(rng, thing, how, taken)
        parts.append((_words(thing), GONE if new is None else _words(new)))
        if new is not None:
            taken.add(new.pair)
            after.append(new)
    return Change(kind, Scene(tuple(things), scene.background), Scene(tuple(after), scene.background), tuple(parts))


def _other(rng: np.random.Generator, thing: Thing, how: str, taken: set[tuple[str, str]]) -> Thing:
    colours = (thing.colour,) if how == "reshape" else [c for c in COLOURS if c != thing.colour]
    shapes = (thing.shape,) if how == "recolour" else [s for s in SHAPES if s != thing.shape]
    free = [(c, s) for c in colours for s in shapes if (c, s) not in HELD_OUT and (c, s) not in taken]
    colour, shape = free[int(rng.integers(len(free)))]
    return Thing(shape, colour, thing.cx, thing.cy, thing.r)


def _words(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"
