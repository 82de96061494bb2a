"""The tables of docs/families.md, made by running every tiny pipeline.

python -m tests.families_page          # print them
python -m tests.families_page --write  # put them into the page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from attnctrl.processors import family_of
from tests.families import COLUMNS, EXACT, PIPELINES, TOLERANCE, Facts, Measured, facts
from tests.refusals import REFUSED, sentence

PAGE = Path(__file__).parent.parent / "docs" / "families.md"


def title(name: str) -> str:
    """The family of a tiny pipeline, as the page calls it."""
    described = family_of(PIPELINES[name].make()).describes
    return described.partition(" (")[0].removesuffix(" pipelines").removesuffix("Pipeline")


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def worst(cells: Sequence[str]) -> str:
    """One cell for several pipelines: a reason before any figure, the largest figure before exactness."""
    reasons = [cell for cell in cells if verdict(cell) not in (EXACT, "rounding")]
    figures = sorted((cell for cell in cells if verdict(cell) == "rounding"), key=float)
    return reasons[0] if reasons else figures[-1] if figures else EXACT


def verdict(cell: str) -> str:
    """What a cell says, figures aside: they may differ from machine to machine, within the tolerance."""
    try:
        return "rounding" if float(cell) <= TOLERANCE else f"an error of {cell}"
    except ValueError:
        return cell


def matrix(measured: dict[str, dict[str, list[str]]]) -> str:
    """measured: for each family and column the cells of its pipelines."""
    rows = [[family, *(worst(cells[column]) for column in COLUMNS)] for family, cells in measured.items()]
    return table(["family", *COLUMNS], rows)


def facts_table(found: dict[str, list[Facts]]) -> str:
    rows = [
        [family, *("; ".join(dict.fromkeys(getattr(one, field) for one in ones)) for field in Facts.__annotations__)]
        for family, ones in found.items()
    ]
    return table(["family", "tested pipelines", "text stands", "guidance branches", "attention layers"], rows)


def refusals() -> str:
    return table(["family", "tried", "answer"], [[title(name), what, sentence(trial)] for name, what, trial in REFUSED])


def rows_of(page: str, section: str) -> dict[str, list[str]]:
    """The cells of a generated table by their first one; of rows with the same first cell, the last one."""
    body = re.split(r"<!-- /?" + section + r" -->", page)[1]
    lines = [line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in body.strip().splitlines()]
    return {first: rest for first, *rest in lines[2:]}


def written(page: str, section: str, text: str) -> str:
    """The page with another table in a section."""
    before, _, after = re.split(r"(?<=<!-- " + section + r" -->)\n|\n(?=<!-- /" + section + r" -->)", page)
    return f"{before}\n{text}\n{after}"


def main() -> None:
    cells: dict[str, dict[str, list[str]]] = {}
    found: dict[str, list[Facts]] = {}
    for name in PIPELINES:
        family, measured = title(name), Measured(name)
        print(name, file=sys.stderr, flush=True)
        for column in COLUMNS:
            cells.setdefault(family, {}).setdefault(column, []).append(measured.cell(column))
        found.setdefault(family, []).append(facts(name))
    tables = {"matrix": matrix(cells), "facts": facts_table(found), "refused": refusals()}
    page = PAGE.read_text()
    for section, text in tables.items():
        page = written(page, section, text)
    if "--write" in sys.argv:
        PAGE.write_text(page)
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    from tests import conftest  # noqa: F401  (quiet libraries, one thread)

    main()
