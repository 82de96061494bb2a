"""The published tables are those of the benches' own files."""

from __future__ import annotations

import pytest

from tests.families_page import written
from tests.measured_page import SECTIONS, full, merged, ratios, short


def result(*rows: tuple[str, int, float], weights: str = "a") -> dict:
    estimate = [{"present": {"value": v, "low": v - 0.1, "high": v + 0.1}} for _, _, v in rows]
    return {
        "task": "layout",
        "model": "shapes-sd",
        "settings": {"weights": weights},
        "rows": [
            {"method": m, "objects": n, "images": 8, "metrics": e, "ratio_to_none": v * 2}
            for (m, n, v), e in zip(rows, estimate, strict=True)
        ],
    }


@pytest.mark.parametrize("path", SECTIONS, ids=lambda path: path.name)
def test_the_pages_show_the_committed_results(path) -> None:
    text = path.read_text(encoding="utf-8")
    for section, make in SECTIONS[path].items():
        assert written(text, section, make()) == text, "python -m tests.measured_page --write"


def test_newer_rows_replace_older_ones() -> None:
    both = merged(result(("none", 2, 0.5), ("loco", 2, 0.6)), [result(("loco", 3, 0.7), ("loco", 2, 0.8))])
    assert [(r["method"], r["objects"], r["metrics"]["present"]["value"]) for r in both["rows"]] == [
        ("none", 2, 0.5),
        ("loco", 2, 0.8),
        ("loco", 3, 0.7),
    ]
    assert all("ratio_to_none" not in row for row in both["rows"])


def test_runs_on_other_weights_do_not_join() -> None:
    with pytest.raises(ValueError, match="settings differs"):
        merged(result(("none", 2, 0.5)), [result(("none", 3, 0.5), weights="b")])


def test_tables() -> None:
    found = result(("none", 2, 0.5), ("loco", 2, 0.75), ("loco", 3, 0.7))
    assert full(found, ["present", "iou"]).splitlines()[2] == "| `none` | 2 | 8 | 0.500 [0.400, 0.600] | - |"
    assert short(found, ["present"], ratios(found)).splitlines() == [
        "| method | 2 objects | 3 objects | time |",
        "| --- | --- | --- | --- |",
        "| none | 0.50 | - | 1.0x |",
        "| `loco` | 0.75 | 0.70 | 1.4x |",
    ]
