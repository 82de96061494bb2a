"""docs/families.md says of every family what its tiny pipelines establish here."""

from __future__ import annotations

import pytest

from attnctrl.processors import FAMILIES
from tests.families import COLUMNS, EXACT, PIPELINES, Measured, facts
from tests.families_page import PAGE, refusals, rows_of, table, title, verdict, worst, written

TEXT = PAGE.read_text()
MATRIX, FACTS = rows_of(TEXT, "matrix"), rows_of(TEXT, "facts")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_matrix_says_what_is_measured(name: str) -> None:
    """Verdicts, not figures: exact where it says so, an error within the tolerance, or the sentence that refuses."""
    measured, said = Measured(name), MATRIX[title(name)]
    found = [verdict(measured.cell(column)) for column in COLUMNS]
    assert found == [verdict(cell) for cell in said]
    assert found[0] == EXACT


@pytest.mark.parametrize("name", PIPELINES)
def test_the_facts_are_those_of_the_pipelines(name: str) -> None:
    said, found = FACTS[title(name)], facts(name)
    for cell, value in zip(said, (found.pipeline, found.text, found.guidance, found.sites), strict=True):
        assert value in cell.split("; ")


def test_every_family_has_its_rows() -> None:
    assert MATRIX.keys() == FACTS.keys()
    assert len(MATRIX) == len(FAMILIES)


def test_what_is_refused_is_answered_as_the_page_says() -> None:
    section = f"<!-- refused -->\n{refusals()}\n<!-- /refused -->"
    assert section in TEXT, "python -m tests.families_page --write"


def test_verdicts_and_tables() -> None:
    assert verdict("3e-05") == verdict("0") == "rounding"
    assert verdict("2e-04") == "an error of 2e-04"
    assert worst([EXACT, "1e-07", "3e-06", "0"]) == "3e-06"
    assert worst([EXACT, EXACT]) == EXACT
    assert worst(["1e-07", "cannot: it does not."]) == "cannot: it does not."
    page = "a\n<!-- matrix -->\nold\n<!-- /matrix -->\nb\n"
    page = written(page, "matrix", table(["family", "none"], [["x", "1"], ["y", "2"]]))
    assert rows_of(page, "matrix") == {"x": ["1"], "y": ["2"]}
    assert page.startswith("a\n")
    assert page.endswith("\nb\n")
