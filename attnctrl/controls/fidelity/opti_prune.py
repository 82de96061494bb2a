"""OptiPrune: choose the start noise by its attention, and leave similar latent tokens out of self-attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from attnctrl.control import ATTENTION_POINTS, Control, Where, Window, param
from attnctrl.controls.fidelity.attend_excite import excited_maps, neglect
from attnctrl.controls.fidelity.conflict_scores import overlap, subject_rows
from attnctrl.controls.fidelity.init_no import ENOUGH_CROSS, ENOUGH_SELF, LIMIT, check_start
from attnctrl.controls.fidelity.noise_search import search
from attnctrl.errors import ControlError
from attnctrl.pairs import named, resolve_subjects
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, TokenLayout
from attnctrl.subjects import Phrases, Subjects

READ = Where(kinds=("cross", "joint", "self"), near=1 / 16)
"""The maps that score a noise."""

JITTER = 0.05
"""Standard deviation of the random part of the similarity that chooses each patch's base."""


def patches(grid: Grid, size: int) -> torch.Tensor:
    """The tokens of each patch of size x size, (patches, size * size), filled with -1 at the borders."""
    frames, height, width = grid
    cells = torch.full((frames, -(-height // size) * size, -(-width // size) * size), -1)
    cells[:, :height, :width] = torch.arange(frames * height * width).reshape(grid)
    cut = cells.unfold(1, size, size).unfold(2, size, size)
    return cut.reshape(-1, size * size)


def pruned(features: torch.Tensor, cells: torch.Tensor, count: int, jitter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Which tokens are kept, and which of the kept stands for each token.

    In each patch the token with the highest mean cosine to the others, plus `jitter`, is the base. Of the others, the
    `count` most similar to their patch's base are left out, and the base stands for them. features: (batch, tokens,
    channels); cells: see `patches`; jitter: (tokens,). -> (batch, kept) positions in order, and (batch, tokens)
    indices into them.
    """
    batch, tokens, _ = features.shape
    count = min(count, tokens - len(cells))
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    held = (cells >= 0).to(unit)[..., None]
    inside = unit[:, cells.clamp(min=0)] * held  # (batch, patches, cells, channels)
    others = inside.sum(dim=2, keepdim=True) - inside
    score = (inside * others).sum(dim=-1) / (held.sum(dim=1) - 1).clamp(min=1)
    score = (score + jitter[cells.clamp(min=0)]).masked_fill(cells < 0, float("-inf"))
    best = score.argmax(dim=-1)  # (batch, patches)
    base = cells.expand(batch, -1, -1).gather(2, best[..., None])
    chosen = inside.gather(2, best[..., None, None].expand(-1, -1, 1, inside.shape[-1]))
    likeness = (inside * chosen).sum(dim=-1)
    free = (cells >= 0) & (cells != base)
    ranked = torch.full((batch, tokens + 1), float("-inf"), device=features.device)
    place = torch.where(free, cells, tokens)  # a column of its own for what must stay
    ranked.scatter_(1, place.flatten(1), torch.where(free, likeness, float("-inf")).flatten(1))
    order = ranked[:, :tokens].argsort(dim=1, descending=True, stable=True)
    kept = order[:, count:].sort(dim=1).values
    owner = torch.zeros(batch, tokens + 1, dtype=torch.long, device=features.device)
    spots = torch.where(cells >= 0, cells, tokens).expand(batch, -1, -1)
    owner.scatter_(1, spots.flatten(1), base.expand_as(spots).flatten(1))
    owner = owner[:, :tokens].scatter(1, kept, kept)
    where = torch.zeros_like(owner).scatter(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    return kept, where.gather(1, owner)


@dataclass
class _Pruning:
    """maps: by site, the step and what `pruned` gave for it, shared by the guidance branches."""

    subjects: Subjects
    searching: bool = False
    maps: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class OptiPrune(Control):
    """OptiPrune: Boosting Prompt-Image Consistency with Attention-Guided Noise and Dynamic Token Selection (2025).

    Noise: the search of `InitNO` under S_cross + S_self. Tokens: in self-attention of the finest grid, in each patch of
    `patch` x `patch` tokens a base is kept, and of the others the share `ratio` of all tokens that is most similar to
    its base takes no part; each copies its base's output. The choice is random to a small degree, repeats with `seed`,
    and is the same for all pictures and for both guidance branches. No official code is public and the abstract leaves
    weights, thresholds and ratio open: those of the search are InitNO's. Tokens are compared by their keys and with
    their own patch's base only, so that no array is tokens x tokens. While the search reads attention, no token is left
    out. Without phrases it does nothing. phrases are the subjects; by default every noun of the prompt.
    Families: the search, all; token pruning, those with layers of self-attention alone (else set ratio=0).
    """

    paper: ClassVar[str] = "OptiPrune, 2025"
    fixes: ClassVar[str] = "a named subject is missing, slow self-attention at high resolution"

    phrases: Phrases | None = None
    rounds: int = param(5, "noises tried; 0 keeps the given one", 0, 50)
    iterations: int = param(10, "steps per noise", 0, 100)
    rate: float = param(0.01, "learning rate of the noise", 0, 1)
    self_weight: float = param(1.0, "weight of S_self", 0, 10)
    ratio: float = param(0.3, "share of the tokens that is left out", 0, 0.9)
    patch: int = param(2, "side of the patches, in tokens", 1, 16)
    seed: int = param(0, "of the random choice of bases", 0, 2**31)
    where: Where = field(default=Where(kinds=("self",), near=1.0), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    window: Window = field(default=Window(), kw_only=True)

    @property
    def searches(self) -> bool:
        return self.rounds > 0 and self.iterations > 0 and self.rate > 0

    @property
    def prunes(self) -> bool:
        return self.ratio > 0 and self.patch > 1

    @property
    def idle(self) -> bool:
        return self.window.empty or not (self.searches or self.prunes) or not named(self.phrases, None)

    def points(self) -> tuple[str, ...]:
        return tuple(p for p in super().points() if self.prunes or p not in ATTENTION_POINTS)

    def conflict(self, other: Control) -> str | None:
        touched = set(other.points()) & {*ATTENTION_POINTS, "loss"}
        if self.prunes and not other.idle and touched and "self" in other.where.kinds:
            return "both work on self-attention, where OptiPrune leaves tokens out (ratio=0 would keep them)."
        return None

    def begin(self, sampling: Sampling) -> _Pruning:
        if self.searches:
            check_start(self, sampling)
        if self.prunes and not self.where.select(sampling.sites, sampling.latent_grid):
            raise ControlError(
                "OptiPrune leaves tokens out of self-attention, which this model has not apart from the text's: set "
                "ratio=0 for its search of a start noise alone."
            )
        return _Pruning(resolve_subjects(sampling, self.phrases))

    def noise(self, noise: torch.Tensor, sampling: Sampling, state: _Pruning) -> torch.Tensor:
        if not self.searches:
            return noise
        read, valid = sampling.maps_of, state.subjects.valid
        assert read is not None

        def score(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            maps = read(drawn, READ)
            found, (_, grid) = excited_maps(maps, state.subjects), maps.mean_cross()
            cross = neglect(found, valid)
            own = overlap(subject_rows(maps, found, grid), valid) if self.self_weight else torch.zeros_like(cross)
            enough = (cross.detach() < ENOUGH_CROSS) & (own.detach() < ENOUGH_SELF)
            return cross + self.self_weight * own, enough

        state.searching = True
        try:
            return search(noise, score, self.rounds, self.iterations, self.rate, LIMIT)
        finally:
            state.searching = False

    def inputs(self, call: Call, state: _Pruning) -> Call:
        if state.searching:
            return call
        step, kept, _ = state.maps.get(call.site.name, (-1, None, None))
        if step != call.step.index or kept is None:
            kept, stands_for = self._choose(call)
            state.maps[call.site.name] = call.step.index, kept, stands_for
        index = kept[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[-1])
        fewer = TokenLayout(slice(0, kept.shape[1]), slice(kept.shape[1], kept.shape[1]))
        query, key, value = (t.gather(2, index) for t in (call.query, call.key, call.value))
        return replace(call, query=query, key=key, value=value, queries=fewer, keys=fewer)

    def output(self, output: torch.Tensor, call: Call, state: _Pruning) -> torch.Tensor:
        if state.searching:
            return output
        _, _, stands_for = state.maps[call.site.name]
        return output.gather(2, stands_for[:, None, :, None].expand(-1, output.shape[1], -1, output.shape[-1]))

    def _choose(self, call: Call) -> tuple[torch.Tensor, ...]:
        """Kept tokens and their substitutes for a site and step, without a gradient."""
        grid, key = call.queries.grid, call.key.detach()
        assert grid is not None
        tokens = key.shape[2]
        generator = torch.Generator().manual_seed(hash((self.seed, call.step.index, call.site.order)) % 2**63)
        jitter = JITTER * torch.randn(tokens, generator=generator).to(key.device)
        cells = patches(grid, self.patch).to(key.device)
        return pruned(key.transpose(1, 2).flatten(2), cells, int(self.ratio * tokens), jitter)
