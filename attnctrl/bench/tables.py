"""Results as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from attnctrl.bench.results import Results, Row


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, for terminals as much as for pages."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def results_table(results: Results, metrics: Sequence[str]) -> str:
    """One line per row: method, objects, pictures, the metrics with 95% intervals, seconds, ratio to `none`.

    Errors follow as a list below the table.
    """
    head = ["method", "objects", "images", *metrics, "s/image", "x none"]
    body = [_cells(results, row, metrics) for row in sorted(results.rows, key=lambda r: r.objects)]
    table = markdown(head, body)
    errors = [f"- {r.method}, {r.objects} objects: {r.error}" for r in results.rows if r.error is not None]
    return "\n".join([table, *([""] if errors else []), *errors])


def _cells(results: Results, row: Row, metrics: Sequence[str]) -> list[str]:
    ratio = results.ratio(row)
    return [
        row.method,
        str(row.objects),
        str(row.images),
        *(str(row.metrics[m]) if m in row.metrics else "error" if row.error else "-" for m in metrics),
        "-" if row.seconds_per_image is None else f"{row.seconds_per_image:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]
