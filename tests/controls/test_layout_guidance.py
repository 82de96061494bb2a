"""Layout guidance against its paper."""

from __future__ import annotations

import torch

import attnctrl as ac
from attnctrl.controls.layout.layout_guidance import box_energy
from attnctrl.stepmaps import CrossMap, StepMaps
from tests.methods import SITES, sampling, step
from tests.probes import REGIONS

LEFT, RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])  # halves of 2 x 2


def columns(*maps: torch.Tensor) -> torch.Tensor:
    """(1, 4, tokens) from one map per token."""
    return torch.stack(maps, dim=-1)[None]


def member(rows: list[list[int]], tokens: int) -> torch.Tensor:
    """(1, regions, tokens) bool from lists of positions."""
    out = torch.zeros(1, len(rows), tokens, dtype=torch.bool)
    for row, positions in enumerate(rows):
        out[0, row, positions] = True
    return out


def test_the_energy_by_hand() -> None:
    uniform = torch.full((4,), 0.3)
    three_quarters = torch.tensor([0.2, 0.1, 0.1, 0.0])
    probs = columns(uniform, LEFT * 0.7, three_quarters)
    masks = torch.stack([LEFT, LEFT])[None]
    # Words: (1 - 1/2)^2, (1 - 1)^2, (1 - 3/4)^2. The first region has two words, the second one.
    energy = box_energy(probs, member([[0, 1], [2]], 3), masks)
    torch.testing.assert_close(energy, torch.tensor([(0.25 / 2 + 0.0625) / 2]))


def test_only_the_shape_of_a_map_counts() -> None:
    probs = columns(torch.tensor([0.2, 0.1, 0.1, 0.0]))
    tokens, masks = member([[0]], 1), LEFT[None, None]
    torch.testing.assert_close(box_energy(probs * 0.01, tokens, masks), box_energy(probs, tokens, masks))


def test_extremes() -> None:
    tokens = member([[0]], 1)
    assert box_energy(columns(RIGHT), tokens, LEFT[None, None]).item() == 1.0
    assert box_energy(columns(torch.zeros(4)), tokens, LEFT[None, None]).item() == 1.0
    assert box_energy(columns(RIGHT), member([[], []], 1), torch.stack([LEFT, RIGHT])[None]).item() == 0.0


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (torch.rand(2, 6, 3, dtype=torch.float64, generator=generator) + 0.1).requires_grad_(True)
    masks = (torch.rand(2, 2, 6, generator=generator) > 0.5).double()
    tokens = torch.tensor([[[True, True, False], [False, False, True]], [[True, False, False], [False] * 3]])
    assert torch.autograd.gradcheck(lambda p: box_energy(p, tokens, masks), probs)


def test_layers_of_several_grids_are_averaged_each_with_masks_of_its_own() -> None:
    control = ac.LayoutGuidance(REGIONS)
    given = sampling(grid=(2, 2))
    state = control.begin(given)
    fine, coarse = torch.full((1, 8, 24), 0.5), torch.zeros(1, 4, 24)
    coarse[0, [0, 2], 2] = 0.5  # cat: all on the left, where it belongs
    coarse[0, [0, 2], 5] = 0.5  # dog: all on the wrong side
    maps = StepMaps({"fine": CrossMap(SITES[1], (1, 2, 4), fine), "coarse": CrossMap(SITES[1], (1, 2, 2), coarse)})
    found = control.loss(maps, step(0), state)
    torch.testing.assert_close(found.value, torch.tensor([(0.25 + 0.5) / 2]))
    assert found.done is not None
    assert found.done.tolist() == [False]


def test_enough_stops_the_descent() -> None:
    state = ac.LayoutGuidance(REGIONS).begin(sampling(grid=(2, 2)))
    maps = StepMaps({"c": CrossMap(SITES[1], (1, 2, 2), torch.full((1, 4, 24), 0.1))})  # E = 0.25
    for enough, done in ((0.2, False), (0.25, True), (0.5, True)):
        found = ac.LayoutGuidance(REGIONS, enough=enough).loss(maps, step(0), state).done
        assert found is not None
        assert found.tolist() == [done]
