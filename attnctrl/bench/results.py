"""A bench's results: rows, what they were measured on, and the JSON file that keeps them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attnctrl.bench.methods import NONE
from attnctrl.bench.stats import Estimate
from attnctrl.errors import ControlError

CHANGE = "_change"
"""Behind the name of a measure: its mean difference from the stock pipeline's, from the same prompt and noise."""


@dataclass(frozen=True)
class Row:
    """One method on the pictures with one number of objects.

    metrics: by name. images: how many pictures stand behind each metric. seconds_per_image: median over batches of
    the pipeline's time (text encoding to decoded pictures), None where nothing was drawn. error: why not.
    """

    method: str
    objects: int
    images: int
    metrics: dict[str, Estimate] = field(default_factory=dict)
    seconds_per_image: float | None = None
    error: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """Everything that a bench found. settings: what the numbers depend on besides the rows' own methods."""

    task: str
    model: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def add(self, row: Row) -> None:
        """Append a row and write the file, so that an interrupted bench loses one row at most."""
        self.rows.append(row)
        self.save()

    def find(self, method: str, objects: int, batch: int | None = None) -> Row | None:
        """The row of a method; `batch` tells rows apart where a bench varies it."""
        wanted = (method, objects, batch)
        return next((r for r in self.rows if (r.method, r.objects, r.more.get("batch")) == wanted), None)

    def ratio(self, row: Row) -> float | None:
        """How many times as long as the stock pipeline this row took per picture; None without a stock row."""
        stock = self.find(NONE, row.objects, row.more.get("batch"))
        if stock is None or not stock.seconds_per_image or row.seconds_per_image is None:
            return None
        return row.seconds_per_image / stock.seconds_per_image

    @property
    def failed(self) -> bool:
        return any(row.error is not None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {
                "method": row.method,
                "objects": row.objects,
                "metrics": {name: asdict(e) for name, e in row.metrics.items()},
                "images": row.images,
                "seconds_per_image": row.seconds_per_image,
                "ratio_to_none": self.ratio(row),
            }
            if row.error is not None:
                entry["error"] = row.error
            rows.append({**entry, **row.more})
        return {
            "task": self.task,
            "model": self.model,
            "settings": self.settings,
            "environment": self.environment,
            "rows": rows,
        }

    def save(self) -> None:
        """Write the JSON file, whole or not at all; nothing without a path."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def resume(self) -> None:
        """Take over the rows of an earlier, interrupted run of the same bench; rows with an error run again.

        Raises:
            ControlError: there is no path, or its file was made under other conditions.
        """
        if self.path is None:
            raise ControlError("--resume needs the --json file to continue from.")
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text(encoding="utf-8"))
        for name in ("task", "model", "settings", "environment"):
            now = json.loads(json.dumps(getattr(self, name)))
            if before[name] != now:
                raise ControlError(f"{self.path} cannot be continued: its {name} is {before[name]}, now {now}.")
        self.rows = [_read(row) for row in before["rows"] if "error" not in row]


def _read(row: dict[str, Any]) -> Row:
    known = ("method", "objects", "images", "seconds_per_image")
    metrics = {name: Estimate(**e) for name, e in row["metrics"].items()}
    more = {k: v for k, v in row.items() if k not in (*known, "metrics", "ratio_to_none")}
    return Row(**{k: row[k] for k in known}, metrics=metrics, more=more)


def fingerprint(pipe: Any) -> str:
    """Twelve hex digits that change when a model is trained anew under the same name."""
    digest = hashlib.blake2b(digest_size=6)
    for _, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """Versions and the machine's kind: what may change numbers or times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        **{package: version(package) for package in ("torch", "diffusers", "attnctrl")},
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }
