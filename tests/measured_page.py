"""The tables of measurements in docs/ and README.md, made from the benches' own files in docs/results.

python -m tests.measured_page                        # print them
python -m tests.measured_page --write                # put them into the pages
python -m tests.measured_page --merge INTO FILE ...  # rows of files join a result; a newer row replaces its like

A result may take several runs, on several days. They join only where all that their numbers depend on is equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from attnctrl.bench import fidelity, guidance, readout
from attnctrl.bench.layout import GUIDED_THEN_MASKED
from attnctrl.bench.results import CHANGE
from attnctrl.bench.results import Row as BenchRow
from attnctrl.bench.sparse import COMPARED
from attnctrl.training.compare import table as comparison
from tests.families_page import table, written

DOCS = Path(__file__).parent.parent / "docs"
PAGE, README, RESULTS = DOCS / "measured.md", DOCS.parent / "README.md", DOCS / "results"
TRAINING = DOCS / "training.md"
SPARSE, SUBJECTS = DOCS / "sparse.md", DOCS / "subjects.md"
FIDELITY, READOUT = DOCS / "fidelity.md", DOCS / "readout.md"
LORA = "`eligen`, with its LoRA"
NAMES = {GUIDED_THEN_MASKED: "layout-guidance, then region-mask *", "none": "none", "ideal": "ideal", LORA: LORA}
SHOWN = (*COMPARED, "jitter")
DECIDES = ("task", "model", "settings")

Result = dict[str, Any]
Row = dict[str, Any]


def read(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def merged(first: Result, others: Iterable[Result]) -> Result:
    """`first` with the rows of `others`, in order of first appearance.

    Raises:
        ValueError: they were measured on different things.
    """
    rows = {(row["method"], row["objects"]): row for row in first["rows"]}
    for other in others:
        for name in DECIDES:
            if other[name] != first[name]:
                raise ValueError(f"{name} differs: {first[name]} and {other[name]}")
        rows |= {(row["method"], row["objects"]): row for row in other["rows"]}
    ordered = sorted(rows.values(), key=lambda row: row["objects"])
    return {**first, "rows": [{k: v for k, v in row.items() if k != "ratio_to_none"} for row in ordered]}


def mean(row: Row, metric: str, form: str = ".3f") -> str:
    found = row["metrics"].get(metric)
    return "-" if found is None else format(found["value"], form)


def interval(row: Row, metric: str, form: str = ".3f", scale: float = 1.0) -> str:
    found = row["metrics"].get(metric)
    if found is None:
        return "-"
    value, low, high = (format(scale * found[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def decibels(row: Row, metric: str) -> str:
    return interval(row, metric, ".1f")


def full(result: Result, metrics: Sequence[str]) -> str:
    """Every row with its intervals."""
    body = [
        [f"`{row['method']}`", str(row["objects"]), str(row["images"]), *(interval(row, m) for m in metrics)]
        for row in result["rows"]
    ]
    return table(["method", "objects", "images", *metrics], body)


def short(result: Result, metrics: Sequence[str], times: dict[str, float]) -> str:
    """One row per method, `metrics` with slashes per number of objects, and its time in stock runs where known."""
    objects = sorted({row["objects"] for row in result["rows"]})
    cells = {(row["method"], row["objects"]): row["metrics"] for row in result["rows"]}
    body = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        by_objects = [cells.get((method, n)) for n in objects]
        figures = ["-" if c is None else " / ".join(f"{c[m]['value']:.2f}" for m in metrics) for c in by_objects]
        time = [f"{times[method]:.1f}x" if method in times else "-"] if times else []
        body.append([NAMES.get(method, f"`{method}`"), *figures, *time])
    return table(["method", *(f"{n} objects" for n in objects), *(["time"] if times else [])], body)


def ratios(result: Result) -> dict[str, float]:
    """Time of each method in stock runs, of one run of the bench: only there were all measured side by side."""
    found: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row.get("ratio_to_none") is not None:
            found.setdefault(row["method"], []).append(row["ratio_to_none"])
    return {method: sum(each) / len(each) for method, each in found.items()}


def sparse(result: Result) -> str:
    """One row per method and density, densest first, within a density by likeness to the dense clips.

    The changes are those of the detector's shares against the dense clips of the same seeds, in percentage points.
    """
    dense, *rows = result["rows"]

    def density(row: Row) -> float:
        return float(row["method"].rpartition("@")[2])

    def change(row: Row, metric: str) -> str:
        return interval(row, metric + CHANGE, "+.1f", 100)

    body = [["full attention", "1.00", "-", "-", "-", *(mean(dense, m) for m in SHOWN)]]
    for row in sorted(rows, key=lambda r: (-density(r), -r["metrics"]["psnr"]["value"])):
        forms = {"visited": ".2f", "recall": ".2f", "psnr": ".1f", "ssim": ".3f"}
        like = [mean(row, metric, form) for metric, form in forms.items()]
        body.append([f"`{row['method']}`", *like, *(change(row, m) for m in COMPARED), mean(row, "jitter")])
    shown = [name.removesuffix("_kept") for name in SHOWN]
    return table(["method@asked", "visited", "recall", "PSNR, dB", "SSIM", *shown], body)


def joint() -> Result:
    """The FLUX-class model's results, and its LoRA's as one more method."""
    base, lora = read("layout_dit"), read("layout_entities")
    named = [{**row, "method": LORA} for row in lora["rows"]]
    return {**base, "rows": [*base["rows"], *named]}


def edits(result: Result) -> str:
    """Edits of given pictures: one row for each way, the kinds of edits together, and what was asked of each kind."""
    head = ["method", "edits", "edited", "kept", "background PSNR", "leak_out", "leak_in", "edited by kind"]
    body = []
    for row in result["rows"]:
        by_kind = {n.removeprefix("edited_"): e for n, e in row["metrics"].items() if n.startswith("edited_")}
        kinds = ", ".join(f"{kind} {estimate['value']:.2f}" for kind, estimate in by_kind.items())
        figures = [interval(row, m) for m in ("edited", "kept")]
        loud = [decibels(row, "background_psnr"), *(interval(row, m) for m in ("leak_out", "leak_in"))]
        body.append([f"`{row['method']}`", str(row["images"]), *figures, *loud, kinds])
    return table(head, body)


def inversions(result: Result) -> str:
    """Pictures drawn anew under their own prompt, in dB."""
    metrics = ("psnr", "round_trip", "to_round_trip")
    body = [
        [f"`{row['method']}`", str(row["images"]), *(decibels(row, metric) for metric in metrics)]
        for row in result["rows"]
    ]
    return table(["inversion", "images", *metrics], body)


def trained(name: str) -> str:
    """Fine-tunings side by side."""
    return comparison([BenchRow(row["method"], row["objects"], row["images"], more=row) for row in read(name)["rows"]])


LAYOUT = ("present", "in_box", "iou", "fitted_iou", "bound", "extra", "background")
LOSSES = ("loss", "loss_bound", "loss_unbound")

SECTIONS: dict[Path, dict[str, Callable[[], str]]] = {
    PAGE: {
        "layout": lambda: full(read("layout"), LAYOUT),
        "joint": lambda: full(read("layout_dit"), LAYOUT),
        "entities": lambda: full(read("layout_entities"), LAYOUT),
        "edit": lambda: edits(read("edit")),
        "two": lambda: edits(read("edit_two")),
        "edit-dit": lambda: edits(read("edit_dit")),
        "edit-instruct": lambda: edits(read("edit_instruct")),
        "inversion": lambda: inversions(read("inversion")),
        "dose": lambda: full(read("dose"), ("present", "in_box", "iou", "bound", "background")),
    },
    TRAINING: {
        "alike": lambda: trained("training_alike"),
        "told": lambda: trained("training_told"),
    },
    SUBJECTS: {
        "subjects": lambda: full(read("subjects"), ("identity", "blend", "prompt", "whole", "diversity", "memory")),
        "counts": lambda: full(read("subjects_counts"), ("identity", "blend", "prompt", "whole")),
    },
    SPARSE: {
        "sparse": lambda: sparse(read("sparse")),
        "densities": lambda: sparse(read("sparse_densities")),
    },
    FIDELITY: {
        "fidelity": lambda: full(read("fidelity"), fidelity.TABLE),
        "more": lambda: full(read("fidelity_more"), fidelity.TABLE),
        "fewer": lambda: full(read("fidelity_fewer"), fidelity.TABLE),
        "others": lambda: full(read("fidelity_others"), fidelity.TABLE),
        "tuning": lambda: full(read("fidelity_tuning"), fidelity.TABLE),
        "losses": lambda: full(read("fidelity_losses"), (*LOSSES, "bound")),
        "guidance": lambda: full(read("guidance"), guidance.TABLE),
    },
    READOUT: {"readout": lambda: full(read("readout"), readout.TABLE)},
    README: {
        "layout": lambda: short(read("layout"), ("present", "in_box", "iou"), ratios(read("layout_times"))),
        "joint": lambda: short(joint(), ("present", "in_box", "iou"), {}),
    },
}


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--merge"]:
        into, files = Path(arguments[1]), [json.loads(Path(f).read_text(encoding="utf-8")) for f in arguments[2:]]
        first = json.loads(into.read_text(encoding="utf-8")) if into.exists() else files[0]
        into.write_text(json.dumps(merged(first, files), indent=1) + "\n", encoding="utf-8")
        return
    for path, sections in SECTIONS.items():
        page = path.read_text(encoding="utf-8")
        for name, make in sections.items():
            page = written(page, name, make())
        if "--write" in arguments:
            path.write_text(page, encoding="utf-8")
        else:
            print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
