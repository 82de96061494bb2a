"""What every registered method must do, by one table over the registry."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import ATTENTION_POINTS
from attnctrl.controls import REGISTRY, method
from tests import tiny
from tests.methods import CLASSIC, busy, subject
from tests.probes import REGIONS, Nudge
from tests.spies import COND, UNCOND, watch

# A second method for each. RegionMask's strong boost leaves losses on word shares nothing to do, hence the others; RAG
# leaves nothing of its regions' attention to others.
PARTNER = dict.fromkeys(REGISTRY, "region-prompts") | {
    "region-prompts": "region-mask",
    "region-mask": "loco",
    "rag": "loco",
}
REGIONAL = [name for name in CLASSIC if "regions" in REGISTRY[name].control.__dataclass_fields__]
ATTENTION = [
    name
    for name in CLASSIC
    if set(REGISTRY[name].make(()).points()) & set(ATTENTION_POINTS) and "noise" not in REGISTRY[name].make(()).points()
]
WORDS = [name for name in CLASSIC if "learned" in vars(REGISTRY[name].control)]


@cache
def pictures(*names: str, reverse: bool = False) -> Any:
    """The picture of a short run under these methods, in this order, and its report."""
    pipe = tiny.sd()
    controls = []
    for name in names:
        (about,) = subject(REGISTRY[name])
        controls.append(busy(name, tuple(reversed(about)) if reverse else about))
    with ac.control(pipe, *controls) as run:
        drawn = tiny.draw(pipe, steps=2)
    return drawn, run.report


@pytest.mark.parametrize("name", CLASSIC)
def test_it_acts(name: str) -> None:
    (drawn, report), (stock, _) = pictures(name), pictures()
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-4)
    assert {row.control for row in report.rows.values()} == {REGISTRY[name].control.__name__}
    acted, able = {row.point for row in report.rows.values()}, set(busy(name).points())
    # These edit the prompt of models with joint attention only.
    assert acted == able - ({"context"} if name in ("region-prompts", "rag") else set())


@pytest.mark.parametrize("name", CLASSIC)
def test_it_acts_on_sdxl(name: str) -> None:
    pipe = tiny.sdxl()
    with ac.control(pipe, busy(name)):
        drawn = tiny.draw(pipe, steps=2)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, tiny.draw(pipe, steps=2), atol=1e-5)


@pytest.mark.parametrize("name", CLASSIC)
def test_it_composes_with_another(name: str) -> None:
    other = PARTNER[name]
    (together, report), (alone, _), (partner, _) = pictures(name, other), pictures(name), pictures(other)
    assert torch.isfinite(together).all()
    assert not torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(together, partner, atol=1e-4)
    by_number = {index: row.control for (index, _), row in report.rows.items()}
    assert by_number == {0: REGISTRY[name].control.__name__, 1: REGISTRY[other].control.__name__}
    reverse, report = pictures(other, name)
    assert torch.isfinite(reverse).all()
    by_number = {index: row.control for (index, _), row in report.rows.items()}
    assert by_number == {0: REGISTRY[other].control.__name__, 1: REGISTRY[name].control.__name__}


@pytest.mark.parametrize("name", REGIONAL)
def test_the_order_of_disjoint_regions_does_not_matter(name: str) -> None:
    torch.testing.assert_close(pictures(name)[0], pictures(name, reverse=True)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", REGIONAL)
def test_it_matters_where_the_regions_are(name: str) -> None:
    pipe = tiny.sd()
    swapped = (ac.Region("cat", box=REGIONS[1].box), ac.Region("dog", box=REGIONS[0].box))
    with ac.control(pipe, busy(name, swapped)):
        drawn = tiny.draw(pipe, steps=2)
    assert not torch.allclose(drawn, pictures(name)[0], atol=1e-4)


def test_the_tables_hold_what_they_should() -> None:
    assert REGIONAL == ["region-mask", "region-prompts", "dense-diffusion", "layout-guidance", "refocus", "loco", "rag"]
    assert ATTENTION == ["region-mask", "region-prompts", "dense-diffusion", "rag"]
    assert WORDS == ["dynamic-prompt"]


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_control_leaves_the_unconditional_half_alone(name: str) -> None:
    pipe = tiny.sd()
    stock, seen = watch(pipe, steps=1), watch(pipe, busy(name), steps=1)
    torch.testing.assert_close(seen.predictions[0][UNCOND], stock.predictions[0][UNCOND], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen.predictions[0][COND], stock.predictions[0][COND], atol=1e-4)
    assert torch.equal(seen.samples[0], stock.samples[0])


@pytest.mark.parametrize("name", WORDS)
def test_a_loss_on_words_moves_those_of_the_conditional_half_alone(name: str) -> None:
    pipe = tiny.sd()
    stock, seen = watch(pipe, steps=1), watch(pipe, busy(name), steps=1)
    assert torch.equal(seen.samples[0], stock.samples[0])
    assert torch.equal(seen.texts[0][UNCOND], stock.texts[0][UNCOND])
    changed = (seen.texts[0][COND] != stock.texts[0][COND]).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 5]  # cat and dog


MOVING = [n for n in CLASSIC if n not in (*ATTENTION, *WORDS) and "mask" not in REGISTRY[n].make(()).points()]
"""Of the others, those that mask only read the noise."""


@pytest.mark.parametrize("name", MOVING)
def test_a_loss_moves_both_halves_by_the_same(name: str) -> None:
    """Both branches of guidance must see the same latents."""
    pipe = tiny.sd()
    stock, seen = watch(pipe, steps=1), watch(pipe, busy(name), steps=1)
    assert torch.equal(seen.samples[0][UNCOND], seen.samples[0][COND])
    assert not torch.allclose(seen.samples[0], stock.samples[0], atol=1e-5)


@pytest.mark.parametrize("name", CLASSIC)
def test_its_window_is_kept(name: str) -> None:
    """Outside its window a method leaves the stock attention; only an edit of the prompt lasts for the whole run."""
    pipe = tiny.sd()
    with ac.control(pipe, busy(name, window=ac.Window(0.5, 0.75))) as run:
        tiny.draw(pipe, steps=4)
    steps = {row.point: row.steps for row in run.report.rows.values()}
    steps.pop("context", None)
    assert steps
    assert all(s == {2} for s in steps.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize("name", REGISTRY)
def test_it_documents_itself(name: str) -> None:
    entry = REGISTRY[name]
    assert entry.name == name
    assert entry.task in ("layout", "fidelity", "guidance", "editing", "readout", "subjects", "sparse")
    assert entry.control.__doc__
    assert entry.control.paper
    assert entry.control.fixes
    for field in entry.params.values():
        assert field.metadata["help"]
        if _is_number(getattr(busy(name), field.name)) and field.name != "seed":
            assert field.metadata.get("choices") or None not in (field.metadata["low"], field.metadata["high"])


@pytest.mark.parametrize("name", REGISTRY)
def test_parameters_out_of_range_are_refused(name: str) -> None:
    entry = REGISTRY[name]
    tried = 0
    for field in entry.params.values():
        low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
        bad: list[Any] = ["nonsense"] if choices else []
        bad += [low - 0.5, float("nan")] if low is not None else []
        bad += [high + 0.5] if high is not None else []
        for value in bad:
            sentence = rf"{entry.control.__name__}: {field.name} is .*: (choose one of|it must be in \[)"
            with pytest.raises(ac.ControlError, match=sentence):
                entry.make(*subject(entry), **{field.name: value})
            tried += 1
        for value in (low, high):
            if value is not None:
                entry.make(*subject(entry), **{field.name: value})  # the ends of the range belong to it
    assert tried > 0 or not any(_is_number(field.default) for field in entry.params.values())


@pytest.mark.parametrize("name", REGISTRY)
def test_unknown_parameters_are_refused(name: str) -> None:
    known = next(iter(REGISTRY[name].params))
    with pytest.raises(ac.ControlError, match=rf'method "{name}" has no parameter "strenght": it has {known}'):
        REGISTRY[name].make((), strenght=1.0)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ac.ControlError, match=r'method "dense" is unknown: choose one of region-mask, .*a-star'):
        method("dense")
    assert method("loco") is REGISTRY["loco"]


@pytest.mark.parametrize("name", CLASSIC)
def test_a_nudge_beside_it_is_its_own_control(name: str) -> None:
    """A sampling-level control changes what comes after a step, not what the method does in it."""
    pipe = tiny.sd()
    alone = watch(pipe, busy(name), steps=2)
    nudged = watch(pipe, busy(name), Nudge(by=0.5), steps=2)
    assert torch.equal(nudged.predictions[0], alone.predictions[0])
    # Further predictions that a method asks for have the rows of one branch alone.
    second, expected = ([s for s in seen.samples if len(s) == 2][1] for seen in (nudged, alone))
    assert not torch.allclose(second, expected, atol=1e-2)
