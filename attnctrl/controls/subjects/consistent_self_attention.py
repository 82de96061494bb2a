"""StoryDiffusion: the pictures of a set see random parts of a few of them, so that these look alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.subjects.rows import References, looks_of_all, placing, random_part, with_looks
from attnctrl.references import Subject
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


@dataclass(frozen=True)
class ConsistentSelfAttention(Control):
    """Consistent self-attention of StoryDiffusion (Zhou et al., arXiv 2405.01434).

    The run draws several pictures: prompt=[picture, ...]. In the decoder's self-attention every picture sees its own
    keys and a random `keep` of those of the first `anchors` pictures, drawn in every step, the same for all queries.
    Given references, whose rows stand after the pictures, are shown to all as further anchors, their background too:
    there are no masks. A layer takes part in a step with probability `early`, from `late_from` of the run on `late`;
    the first tenth is the stock one. All draws are from `seed`, where the code's cannot be repeated. With keep, early
    and late 1 and a window from 0 this is plain concatenation of keys. Each branch sees its own.
    Families: UNets; in joint attention keys keep the positions of the picture they are from.
    """

    paper: ClassVar[str] = "arXiv 2405.01434"
    fixes: ClassVar[str] = "a character that looks different in every picture of a set"

    window: Window = field(default=Window(0.1, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self", "joint"), blocks=("up", "")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    subjects: Sequence[Subject] = ()
    placing: str = placing("bias")
    anchors: int = param(4, "how many of the pictures the others look at", 0, 64)
    keep: float = param(0.5, "share of the anchors' latents that is shown", 0, 1)
    early: float = param(0.7, "probability that a layer takes part before late_from", 0, 1)
    late: float = param(0.9, "probability that a layer takes part from late_from on", 0, 1)
    late_from: float = param(0.4, "part of the run at which `late` takes over", 0, 1)
    seed: int = param(0, "of all draws", 0, 2**31 - 1)

    @property
    def idle(self) -> bool:
        nobody = self.anchors == 0 and all(s.strength == 0 for s in self.subjects)
        return self.window.empty or self.keep == 0 or nobody or (self.early == 0 and self.late == 0)

    def begin(self, sampling: Sampling) -> References:
        return References.of(sampling, self.subjects, self.name)

    def inputs(self, call: Call, state: References) -> Call:
        grid, step = call.queries.grid, call.step
        chance = self.early if step.progress < self.late_from else self.late
        coin = torch.Generator().manual_seed(hash((self.seed, step.index, call.site.order)) % 2**63)
        if grid is None or float(torch.rand(1, generator=coin)) >= chance:
            return call
        tokens = torch.arange(grid[1] * grid[2] * grid[0], device=call.query.device)
        rows = [(row, 1.0) for row in range(min(self.anchors, state.pictures.stop))]
        rows += [(state.row(number), self.subjects[i].strength) for i, number in state.shown]
        sources = [(row, random_part(tokens, self.keep, (self.seed, step.index, row)), s) for row, s in rows]
        return with_looks(call, looks_of_all(sources, state.pictures, call), self.placing)
