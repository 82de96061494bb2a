"""The search of heads: on scores known beforehand, and as a command on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.headhunt import Query, all_bound, candidates, hunt, objective_of, well_formed
from attnctrl.headset import Head, HeadSet
from attnctrl.shapes.layouts import sample_layout
from tests import tiny

HEADS: list[Head] = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_each_round_adds_the_best_to_those_chosen_before() -> None:
    """Heads that are worth little alone can be worth much together."""
    worth = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 2.0, ("b", 1): 0.0}
    asked: list[tuple[Head, ...]] = []

    def score(heads: tuple[Head, ...]) -> float:
        asked.append(heads)
        return sum(worth[h] for h in heads) + (10.0 if {("a", 1), ("b", 1)} <= {*heads} else 0.0)

    saved: list[list[Head]] = []
    found = hunt(score, HEADS, 2, 1, after_round=lambda now: saved.append(list(now.heads)))
    assert found.heads == [("a", 1), ("b", 1)]
    assert saved == [[("a", 1)], [("a", 1), ("b", 1)]]
    assert [h for h, _ in found.rounds[0]] == [("a", 1), ("b", 0), ("a", 0), ("b", 1)]
    assert found.rounds[1][0] == (("b", 1), 13.0)
    assert len(asked) == 4 + 3
    assert hunt(score, HEADS, 9, 3).heads[:3] == [("a", 1), ("b", 0), ("a", 0)]


def test_a_search_goes_on_and_ties_go_to_the_earlier_head(tmp_path: Path) -> None:
    first = hunt(lambda heads: 0.0, HEADS, 1, 1)
    assert first.heads == [("a", 0)]
    first.save(tmp_path / "heads.json")
    again = hunt(lambda heads: float(heads[-1] == ("b", 1)), HEADS, 2, 1, HeadSet.load(tmp_path / "heads.json"))
    assert again.heads == [("a", 0), ("b", 1)]
    assert again.rounds[0] == first.rounds[0]


def test_the_built_in_objectives() -> None:
    from attnctrl.bench.tasks import Task

    layout = sample_layout(np.random.default_rng(0), 2, split="tune")
    query = Query(layout.prompt, 0, tuple(layout.asked))
    ideal = Task(layout, 0).ideal
    assert well_formed(ideal, query) == all_bound(ideal, query) == 1.0
    one_missing = Query("", 0, (*query.asked, ("nothing", "nowhere")))  # type: ignore[misc]
    assert well_formed(ideal, one_missing) == pytest.approx(2 / 3)
    assert all_bound(ideal, one_missing) == 0.0
    with pytest.raises(ac.ControlError, match='score scenes of the shapes world, not the prompt "a cat"'):
        well_formed(ideal, Query("a cat", 0))


def test_objectives_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def bright(picture, prompt):\n    return picture.mean() + len(prompt)\n")
    assert objective_of(f"{tmp_path / 'mine.py'}:bright")(np.ones((2, 2, 3)), Query("four", 0)) == 5.0
    for wrong in ("nonsense", "math:nothing", f"{tmp_path / 'none.py'}:f"):
        with pytest.raises(
            ac.ControlError, match=r"is unknown: choose well-formed, bound, module:function or file\.py"
        ):
            objective_of(wrong)


def test_the_command_ranks_and_saves_a_set_that_soft_pag_reads(tmp_path: Path, capsys: Any) -> None:
    pipe, layer = tiny.sd(), "mid_block.attentions.0.transformer_blocks.0.attn1"
    heads = candidates(pipe, ["mid_block"])
    assert heads == [(layer, h) for h in range(pipe.unet.get_submodule(layer).heads)]
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.py").write_text("def bright(picture, prompt):\n    return picture.mean()\n")
    size = ["--call", "height=32", "width=32", "--device", "cpu", "--steps", "1", "--images", "2"]
    given = ["headhunt", "--model", str(tmp_path / "model"), "--prompt", tiny.PROMPT, "--layer", "mid_block", *size]
    mine = ["--objective", f"{tmp_path / 'mine.py'}:bright", "--keep", "1", "--out", str(tmp_path / "heads.json")]
    assert main([*given, *mine, "--rounds", "1"]) == 0
    found = HeadSet.load(tmp_path / "heads.json")
    assert [h for h, _ in sorted(found.rounds[0])] == heads
    assert found.heads == [found.rounds[0][0][0]]
    assert "round 1" in capsys.readouterr().out
    assert main([*given, *mine, "--rounds", "2", "--seed", "9"]) == 2
    assert "is of another search" in capsys.readouterr().err
    with ac.control(pipe, ac.SoftPAG(str(tmp_path / "heads.json"))) as run:
        tiny.draw(pipe, steps=1)
    assert run.report.acted(0)


def test_layers_without_heads_are_refused() -> None:
    with pytest.raises(ac.ControlError, match="no head to choose from in nowhere: the layers are down_blocks"):
        candidates(tiny.sd(), ["nowhere"])
