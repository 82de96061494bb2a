"""PAROAttention's calibration: an axis order and static masks for every head of every layer, and their file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnctrl.errors import ControlError
from attnctrl.kernels.blocks_grid import axis_order
from attnctrl.sites import Grid

AXES = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
"""The six orders of (frames, height, width), slowest first, by the numbers of the official code."""
FORMAT = "attnctrl-paro-1"


def axis_orders(grid: Grid) -> torch.Tensor:
    """The latents in each of the six orders, int64 (6, latents)."""
    return torch.stack([axis_order(grid, axes) for axes in AXES])


@dataclass(frozen=True)
class SitePlan:
    """One layer's part. grid: for which it was made. order: int64 (heads,), numbers of `AXES`.

    masks: by phase of the run, uint8 (heads, ceil(blocks * blocks / 8)), the bits of (blocks, blocks), rows first.
    """

    grid: Grid
    order: torch.Tensor
    masks: dict[int, torch.Tensor]

    def visited(self, phase: int, blocks: int) -> torch.Tensor:
        """The blocks of a phase, or of the nearest one that was calibrated: bool (heads, blocks, blocks)."""
        bits = self.masks[min(self.masks, key=lambda known: (abs(known - phase), known))]
        every = torch.arange(8, device=bits.device, dtype=torch.uint8)
        each = ((bits[..., None] >> (7 - every)) & 1).flatten(1)[:, : blocks * blocks]
        return each.bool().view(-1, blocks, blocks)


def packed(visited: torch.Tensor) -> torch.Tensor:
    """bool (heads, blocks, blocks) as the bits of a `SitePlan`."""
    return torch.from_numpy(np.packbits(visited.flatten(1).cpu().numpy(), axis=1))


@dataclass(frozen=True)
class ParoPlan:
    """What PAROAttention needs to know of a model at one size of its videos; made by `pipelines.calibrate_paro`.

    block: tokens per block. density: of the blocks, which the masks keep. phases: equal parts of the noise schedule,
    each with masks of its own. sites: by the names of the attention layers.
    """

    block: int
    density: float
    phases: int
    sites: dict[str, SitePlan]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as safetensors: of each site `grid`, `order`, and a tensor of bits for each phase."""
        tensors: dict[str, torch.Tensor] = {}
        for name, site in self.sites.items():
            tensors |= {f"{name}/grid": torch.tensor(site.grid), f"{name}/order": site.order.to(torch.uint8)}
            tensors |= {f"{name}/phase{phase}": bits.contiguous() for phase, bits in site.masks.items()}
        facts = {"format": FORMAT, "block": self.block, "density": self.density, "phases": self.phases}
        save_file(tensors, Path(path), metadata={"plan": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ParoPlan:
        """Read what `save` wrote. Raises ControlError for files that are no plan."""
        if not Path(path).is_file():
            raise ControlError(f"there is no PAROAttention plan at {path}: make one with pipelines.calibrate_paro.")
        try:
            with safe_open(Path(path), framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("plan", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:  # of safetensors' own kind, which it does not export everywhere
            raise ControlError(f"{path} is no PAROAttention plan: {error}.") from None
        if facts.get("format") != FORMAT:
            raise ControlError(f"{path} is no PAROAttention plan of the format {FORMAT}: calibrate again.")
        sites = {}
        for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors):
            frames, height, width = tensors[f"{name}/grid"].tolist()
            known = [phase for phase in range(facts["phases"]) if f"{name}/phase{phase}" in tensors]
            masks = {phase: tensors[f"{name}/phase{phase}"] for phase in known}
            sites[name] = SitePlan((frames, height, width), tensors[f"{name}/order"].long(), masks)
        return cls(facts["block"], facts["density"], facts["phases"], sites)
