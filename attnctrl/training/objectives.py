"""The losses by name, as a training step takes them: from recorded maps and a batch to one number for each scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attnctrl.control import Where
from attnctrl.errors import ControlError
from attnctrl.sites import Grid
from attnctrl.stepmaps import CrossMap, SelfMap, StepMaps, phrase_maps
from attnctrl.training.correspondence import flow_field, flow_loss, reach
from attnctrl.training.losses import RANGE, dice, divergence, group_shares, in_unit_range, localisation, region_mse
from attnctrl.training.scenes import Batch

TEXT, OWN = Where(kinds=("cross", "joint")), Where(kinds=("self", "joint"))
LATE = 500
"""Leffa's loss is for timesteps under this."""


@dataclass(frozen=True)
class Objective:
    """A loss on attention. weight: its factor beside the denoising loss, by default the paper's where there is one.

    references: whether it reads rows of the subjects' references. where: of which layers it wants maps.
    """

    loss: Callable[[StepMaps, Batch], torch.Tensor]
    weight: float
    where: Where = TEXT
    references: bool = False


def covered(masks: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Masks (..., rows, columns) on a token grid: the covered share of each token, (..., tokens)."""
    pooled = F.adaptive_avg_pool2d(masks.flatten(0, -3), grid[1:])
    return pooled.reshape(*masks.shape[:-2], -1)


def _by_layer(of_layer: Callable[[CrossMap, Batch], torch.Tensor]) -> Callable[[StepMaps, Batch], torch.Tensor]:
    """The mean of a loss over the layers that read text."""

    def loss(maps: StepMaps, batch: Batch) -> torch.Tensor:
        return torch.stack([of_layer(layer, batch) for layer in maps.cross_layers()]).mean(dim=0)

    return loss


def _own(layer: CrossMap, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of the subjects' phrases and their masks, both (scenes, subjects, latent tokens)."""
    return phrase_maps(layer.probs[: batch.scenes], batch.words), covered(batch.masks, layer.grid)


def _region(layer: CrossMap, batch: Batch) -> torch.Tensor:
    groups = torch.cat([batch.ground, batch.words], dim=1)
    shares = group_shares(layer.probs[: batch.scenes, :, : groups.shape[-1]], groups)
    return region_mse(shares[:, 1:], covered(batch.masks, layer.grid), rest=shares[:, 0])


def _garments(layer: CrossMap, batch: Batch) -> torch.Tensor:
    shares = group_shares(layer.probs[: batch.scenes, :, : batch.words.shape[-1]], batch.words)
    return region_mse(shares, covered(batch.masks, layer.grid), covered_only=True)


def _concepts(layer: CrossMap, batch: Batch) -> torch.Tensor:
    maps = phrase_maps(layer.probs[: batch.scenes], torch.cat([batch.words, batch.ground], dim=1))
    masks = covered(batch.masks, layer.grid)
    return divergence(maps, torch.cat([masks, 1 - masks.sum(1, keepdim=True).clamp(0, 1)], dim=1))


def _own_layers(maps: StepMaps) -> list[SelfMap]:
    if not maps.self_:
        raise ControlError("the loss reads what latents see of each other, but no self-attention was recorded.")
    return list(maps.self_.values())


def _rows(states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a query or key of all rows: each scene's, once for each of its subjects, and that of their references."""
    n, k = batch.words.shape[:2]
    return states[:n].repeat_interleave(k, dim=0), states[n : n + n * k]


def _positional(maps: StepMaps, batch: Batch) -> torch.Tensor:
    n, k = batch.words.shape[:2]
    values = []
    layers = _own_layers(maps)
    # MultiCrafter aggregates the layers before the loss; only those of one grid can be.
    for grid in dict.fromkeys(layer.grid for layer in layers):
        asked = covered(batch.reference_masks, grid).flatten(0, 1)
        seen = [
            reach(_rows(layer.query, batch)[1], _rows(layer.key, batch)[0], asked, layer.scale)
            for layer in layers
            if layer.grid == grid
        ]
        mean = in_unit_range(torch.stack(seen).mean(dim=0), RANGE)
        values.append(dice(mean.view(n, k, -1), covered(batch.masks, grid)))
    return torch.stack(values).mean(dim=0)


def _flow(maps: StepMaps, batch: Batch) -> torch.Tensor:
    n, k = batch.words.shape[:2]
    target = batch.pictures.repeat_interleave(k, dim=0)
    late = (batch.timesteps[:n] < LATE).repeat_interleave(k)
    total = torch.zeros(n * k, device=target.device)
    for layer in _own_layers(maps):
        size = layer.grid[1], layer.grid[2]
        flow = flow_field(_rows(layer.query, batch)[0], _rows(layer.key, batch)[1], size, layer.scale)
        flow = flow.unflatten(1, size)
        total = total + flow_loss(flow, target, batch.references.flatten(0, 1), batch.masks.flatten(0, 1), late)
    return total.view(n, k).mean(dim=1)


OBJECTIVES = {
    "localisation": Objective(_by_layer(lambda layer, batch: localisation(*_own(layer, batch))), 1e-3),
    "facial": Objective(_by_layer(lambda layer, batch: localisation(*_own(layer, batch), normalise=True)), 1e-2),
    "peaks": Objective(_by_layer(lambda layer, batch: localisation(*_own(layer, batch), peaks=True)), 1e-2),
    "region-mse": Objective(_by_layer(_region), 0.1),
    "garments": Objective(_by_layer(_garments), 0.1),
    "concepts": Objective(_by_layer(_concepts), 1.0),
    "positional": Objective(_positional, 0.1, OWN, references=True),
    "flow": Objective(_flow, 1e-3, OWN, references=True),
}
"""FastComposer, ConsistentID, DreamText, StoryMaker, AnyDressing, AttenCraft, MultiCrafter, Leffa. The weights of
AnyDressing and MultiCrafter are not published and are ours. On a stock model what AnyDressing's and StoryMaker's extra
attention sees is read of the words of the prompt, and what their references' attention would see in MultiCrafter's and
Leffa's models is read of self-attention between a scene and its references, which are further rows of the batch."""


def objective_of(name: str) -> Objective | None:
    """The loss of this name, None for "none". Raises ControlError for other names."""
    if name == "none":
        return None
    if name not in OBJECTIVES:
        raise ControlError(f'the loss "{name}" is not known: choose one of none, {", ".join(OBJECTIVES)}.')
    return OBJECTIVES[name]
