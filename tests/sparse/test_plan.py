"""Plans of sparse attention: readings, choices, files, and runs under them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.controls.sparse.plan import Choice, Pattern, SparsePlan, cheapest
from attnctrl.controls.sparse.probing import head_errors
from attnctrl.pipelines import plan_sparse
from attnctrl.shapes import VIDEO_CALL
from tests.video_model import draw, pipeline

SOME = (
    Pattern("draft", (("density", 0.3), ("block", 16))),
    Pattern("neighborhood-tiles", (("density", 0.3), ("block", 16))),
)


def test_errors_of_heads_by_hand() -> None:
    full = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 3, 4)
    assert head_errors(full * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1), full).tolist() == [0.0, 0.25]


def test_the_cheapest_within_the_budget() -> None:
    full, near, far = Choice(0, 0.0, 1.0, 1.0), Choice(1, 0.01, 0.5, 0.6), Choice(2, 0.2, 0.1, 0.2)
    assert cheapest([full, near, far], 0.02) == near
    assert cheapest([full, near, far], 0.5) == far
    assert cheapest([full, near, far], 0.0) == full
    assert cheapest([full, Choice(1, 0.0, 0.9, 1.3)], 0.1) == full  # no pattern that is slower


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline(layers=2)


@pytest.fixture(scope="module")
def plan(pipe: Any) -> SparsePlan:
    return plan_sparse(pipe, lambda: draw(pipe, 4), budget=float("inf"), phases=2, patterns=SOME)


def test_a_plan_covers_every_layer_phase_and_head(plan: SparsePlan) -> None:
    assert plan.grid == (9, 8, 8)
    assert plan.sites.keys() == {"blocks.0.attn1", "blocks.1.attn1"}
    assert all(len(phases) == 2 and all(len(heads) == 2 for heads in phases) for phases in plan.sites.values())
    assert 0 < plan.predicted["density"] <= 1
    assert plan.at("blocks.0.attn1", 0.99) == plan.sites["blocks.0.attn1"][1]


def test_a_run_under_a_plan(plan: SparsePlan, pipe: Any, tmp_path: Path) -> None:
    """By hand-made choices: one head by a pattern, one full; from the plan and from its file alike."""
    mixed = (Choice(1, 0.1, 0.3, 0.5), Choice(0, 0.0, 1.0, 1.0))
    made = SparsePlan(plan.grid, 1, plan.patterns, dict.fromkeys(plan.sites, (mixed,)))
    made.save(tmp_path / "plan.json")
    assert SparsePlan.load(tmp_path / "plan.json") == made
    with ac.control(pipe, ac.Planned(made, fall_back=False), record=False) as run:
        drawn = draw(pipe)
    assert run.report.visited() == pytest.approx((0.3 + 1.0) / 2, abs=0.05)
    assert "Planned" in str(run.report)
    with ac.control(pipe, ac.Planned(str(tmp_path / "plan.json"), fall_back=False), record=False):
        assert torch.equal(draw(pipe), drawn)
    stock = draw(pipe)
    assert not torch.equal(drawn, stock)
    both = SparsePlan(plan.grid, 1, plan.patterns, dict.fromkeys(plan.sites, (mixed[:1] * 2,)))
    alone = ac.Draft(density=0.3, block=16, fall_back=False, window=ac.Window(), where=ac.Planned().where)
    with ac.control(pipe, ac.Planned(both, fall_back=False), record=False):
        planned = draw(pipe)
    with ac.control(pipe, alone, record=False):
        torch.testing.assert_close(planned, draw(pipe), atol=1e-5, rtol=1e-5)


def test_no_budget_is_full_attention_to_the_bit(pipe: Any) -> None:
    none = plan_sparse(pipe, lambda: draw(pipe), budget=0.0, phases=1, patterns=SOME)
    assert {choice.pattern for choice in none.choices} == {0}
    with ac.control(pipe, ac.Planned(none), record=False):
        assert torch.equal(draw(pipe), draw(pipe))


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    pipeline().save_pretrained(tmp_path / "model")
    size = [f"{name}={value}" for name, value in VIDEO_CALL.items()]
    given = ["--model", str(tmp_path / "model"), "--prompt", "a red circle", "--steps", "1", "--block", "16"]
    out = tmp_path / "plans" / "plan.json"
    command = ["plan-sparse", *given, "--device", "cpu", "--out", str(out), "--call", *size]
    assert main(command) == 0
    assert "expected: " in capsys.readouterr().out
    assert json.loads(out.read_text())["grid"] == [9, 8, 8]
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


def test_bad_input(plan: SparsePlan, pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ac.ControlError, match='no pattern "magic"'):
        plan_sparse(pipe, lambda: None, patterns=[Pattern("magic")])
    with pytest.raises(ac.ControlError, match=r"pattern draft: .*banana"):
        plan_sparse(pipe, lambda: None, patterns=[Pattern("draft", (("banana", 1),))])
    with pytest.raises(ac.ControlError, match="did not call the pipeline"):
        plan_sparse(pipe, lambda: None, patterns=SOME)
    with pytest.raises(ac.ControlError, match="give 0 or more"):
        plan_sparse(pipe, lambda: None, budget=-1.0)
    with pytest.raises(ac.ControlError, match="there is no plan"):
        SparsePlan.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"format": "other"}')
    with pytest.raises(ac.ControlError, match="is no plan of sparse attention: its format is other"):
        SparsePlan.load(tmp_path / "bad.json")
    smaller = SparsePlan((9, 4, 4), 1, plan.patterns, plan.sites)
    with pytest.raises(ac.ControlError, match="plan at this size"), ac.control(pipe, ac.Planned(smaller)):
        draw(pipe)
    fewer = SparsePlan(plan.grid, 1, plan.patterns, {"blocks.0.attn1": plan.sites["blocks.0.attn1"]})
    with pytest.raises(ac.ControlError, match=r"knows no layer blocks\.1\.attn1"), ac.control(pipe, ac.Planned(fewer)):
        draw(pipe)
