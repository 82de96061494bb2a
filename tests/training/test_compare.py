"""The comparison of fine-tunings: what is asked for, and its table."""

from __future__ import annotations

import pytest

from attnctrl.bench.results import Row
from attnctrl.errors import ControlError
from attnctrl.shapes.detect import Detection
from attnctrl.training.compare import asked_pictures, parse_ways, score, table
from attnctrl.training.scenes import taught_subjects


def test_half_of_the_pictures_show_subjects_that_never_met() -> None:
    subjects = taught_subjects(6)
    place = {(s.shape, s.colour): i for i, s in enumerate(subjects)}
    asked = asked_pictures(subjects, 20, seed=4)
    assert [one.together for one in asked] == [True, False] * 10
    for one in asked:
        first, second = (place[pair] for pair in one.task.layout.asked)
        assert first != second
        assert (first // 2 == second // 2) == one.together
        assert one.prompt.startswith(f"a <s{first}> {subjects[first].shape} and a <s{second}> ")
    again, other = asked_pictures(subjects, 20, seed=4), asked_pictures(subjects, 20, seed=5)
    assert [(a.prompt, a.task.seed) for a in asked] == [(a.prompt, a.task.seed) for a in again]
    assert [a.prompt for a in asked] != [a.prompt for a in other]
    assert all(one.together for one in asked_pictures(subjects[:2], 4, seed=0))


def test_pictures_are_judged_by_the_subjects_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws nothing names nothing; batches are drawn from each picture's own noise."""
    drawn: list[tuple[int, int]] = []

    class Nothing:
        def set_progress_bar_config(self, **_: object) -> None: ...

        def __call__(self, prompts: list[str], *, generator: list, **_: object) -> Nothing:
            drawn.append((len(prompts), generator[0].initial_seed()))
            self.images = [0] * len(prompts)
            return self

    monkeypatch.setattr("attnctrl.training.compare.detect", lambda picture: Detection([], "white"))
    asked = asked_pictures(taught_subjects(4), 5, seed=1)
    scores = score(Nothing(), asked, steps=2, batch=4)
    assert drawn == [(4, asked[0].task.seed), (1, asked[4].task.seed)]
    grounds = [float(one.task.layout.background == "white") for one in asked]
    assert [s["prompt"] for s in scores] == [pytest.approx(g / 3) for g in grounds]
    assert all(s["identity"] == s["blend"] == s["whole"] == 0 for s in scores)


def test_ways() -> None:
    assert parse_ways("none, localisation=0.5,flow") == [
        ("none", "none", None),
        ("localisation=0.5", "localisation", 0.5),
        ("flow", "flow", None),
    ]
    with pytest.raises(ControlError, match='the loss "magic" is not known'):
        parse_ways("magic")
    with pytest.raises(ControlError, match="write a loss, or a loss=weight"):
        parse_ways("flow=much")


def row(way: str, seed: int, identity: list[float], blend: list[float]) -> Row:
    more = {
        "way": way,
        "seed": seed,
        "together": [True, False],
        "scores": {"identity": identity, "blend": blend},
    }
    return Row(f"{way} seed {seed}", 2, 2, more=more)


def test_the_table_pairs_pictures_of_the_same_seed() -> None:
    rows = [
        row("none", 0, [0.0, 0.5], [1.0, 0.0]),
        row("none", 1, [0.5, 0.5], [1.0, 0.0]),
        row("flow", 0, [1.0, 0.5], [0.0, 0.0]),
        row("flow", 1, [1.0, 1.0], [0.5, 0.0]),
        # A seed that the base lacks has nothing to be compared with.
        row("flow", 2, [0.0, 0.0], [1.0, 1.0]),
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows, ("identity", "blend")).splitlines()
    ]
    head, body = lines[0], lines[2:]
    assert head == ["pictures", "loss", "n", "identity", "identity less none's", "blend", "blend less none's"]
    assert [(one[0], one[1], one[2]) for one in body] == [
        (part, way, n) for part, n in (("all", "4"), ("together", "2"), ("apart", "2")) for way in ("none", "flow")
    ]
    assert body[0][3].startswith("0.375 ")
    assert body[0][4] == "-"
    assert body[1][3].startswith("0.875 ")
    assert body[1][4].startswith("0.500 ")
    assert body[1][6].startswith("-0.375 ")
    assert body[3][4].startswith("0.750 ")
    assert body[5][4].startswith("0.250 ")
