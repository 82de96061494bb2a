"""`bench kernels`: token groups, sparse blocks and columns of the map against what PyTorch offers, in time and memory.

At FLUX's sizes on a GPU. Without one, PyTorch's forms run at a small size, which says little about a GPU: the table
then says that the GPU's figures are not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from attnctrl.bench.kernel_blocks import DENSITIES, block_cases, random_blocks
from attnctrl.bench.kernel_shapes import FLUX, LONG, MASKS, SMALL, Shape, share_allowed, share_visited
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import Estimate, ratio_of_medians
from attnctrl.bench.tables import markdown
from attnctrl.kernels import SparseBlocks, TokenGroups, column_probabilities, group_attention, probabilities

COLUMNS = 8
REPETITIONS, QUICK_REPETITIONS = 30, 5
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
UNMASKED, BOOLEAN, GROUPS, FLEX = "unmasked SDPA", "SDPA, boolean mask", "token groups", "FlexAttention"
WITH_COLUMNS, MATERIALISED = f"token groups, {COLUMNS} columns", f"materialised, {COLUMNS} columns"
RATIOS = {"to_unmasked": UNMASKED, "to_boolean": BOOLEAN, "to_groups": GROUPS}
NOT_MEASURED = (
    "GPU figures: not measured (there is no CUDA device here). The table is PyTorch's forms on the CPU at a small size."
)


@dataclass(frozen=True)
class Case:
    """Something to time: `run` maps query, key and value to results. held: bytes that its mask occupies meanwhile."""

    name: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    held: int = 0


@dataclass(frozen=True)
class Measured:
    """seconds: one per repetition. peak: bytes beyond the inputs, None on the CPU, which keeps no such count."""

    seconds: list[float]
    peak: int | None


def dtype_of(device: torch.device) -> torch.dtype:
    """What models run in: bf16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cases(shape: Shape, groups: TokenGroups, device: torch.device) -> Iterator[Case]:
    """What is compared under one mask; on the CPU PyTorch chooses its own backend for the unmasked attention."""
    scale = shape.head_dim**-0.5
    dense = groups.dense()
    chosen = torch.arange(COLUMNS, device=device)
    visible = groups.visible(chosen)

    def grouped(form: str | None) -> Callable[..., tuple]:
        return lambda q, k, v: (group_attention(q, k, v, groups, scale, form=form),)

    def columns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output, lse = group_attention(q, k, v, groups, scale, return_lse=True)
        return output, column_probabilities(q, k[:, :, chosen], lse, scale, visible)

    def materialised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        probs = probabilities(q, k, dense, scale)
        return probs.to(v.dtype) @ v, probs[..., chosen]

    yield from unmasked(scale, device)
    bits = groups.query_bits.nbytes + groups.key_bits.nbytes
    yield Case(BOOLEAN, sdpa(scale, dense), dense.nbytes)
    yield Case(GROUPS, grouped(None), bits)
    yield Case(FLEX, grouped("flex"), bits)
    yield Case(WITH_COLUMNS, columns, bits)
    yield Case(MATERIALISED, materialised, dense.nbytes)


def unmasked(scale: float, device: torch.device) -> Iterator[Case]:
    """Attention without a mask: on a GPU by each of BACKENDS, on the CPU as PyTorch chooses."""
    if device.type != "cuda":
        yield Case(UNMASKED, sdpa(scale))
        return
    for name, backend in BACKENDS.items():
        yield Case(f"{UNMASKED}, {name}", sdpa(scale, backend=backend))


def sdpa(scale: float, mask: torch.Tensor | None = None, backend: SDPBackend | None = None) -> Callable[..., tuple]:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if backend is None:
            return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale),)
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v, scale=scale),)

    return run


def sparse_cases(shape: Shape, mask: SparseBlocks, device: torch.device) -> Iterator[Case]:
    """What is compared under sparse blocks."""
    yield from unmasked(shape.head_dim**-0.5, device)
    for name, run in block_cases(shape, mask, device):
        yield Case(name, run, mask.visited.nbytes)


def time_case(case: Case, shape: Shape, backward: bool, repetitions: int, device: torch.device, seed: int) -> Measured:
    """Time one case, forward or forward and backward, after two runs that compile and warm up."""
    generator = torch.Generator(device).manual_seed(seed)
    # In memory (batch, tokens, heads, head_dim), as the projections of a transformer leave them.
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    inputs = [
        torch.randn(size, generator=generator, device=device).to(dtype_of(device)).transpose(1, 2).detach()
        for _ in range(3)
    ]
    for tensor in inputs:
        tensor.requires_grad_(backward)

    def once() -> None:
        results = case.run(*inputs)
        if backward:
            torch.autograd.grad(results, inputs, [torch.ones_like(result) for result in results])

    with torch.set_grad_enabled(backward):
        for _ in range(2):
            once()
        if device.type != "cuda":
            return Measured([_wall(once) for _ in range(repetitions)], None)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = [_events(once) for _ in range(repetitions)]
        return Measured(seconds, torch.cuda.max_memory_allocated(device) - before + case.held)


def _wall(once: Callable[[], None]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _events(once: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure(device: torch.device, repetitions: int, seed: int, results: Results) -> None:
    """Add a row for every shape, mask, direction and case; one that cannot run is a row with its reason."""
    shapes, more = (FLUX, ()) if device.type == "cuda" else ((SMALL,), (LONG,))
    for shape in shapes:
        for name, make in MASKS.items():
            groups = make(shape).to(device)
            about = {"mask": name, "allowed": share_allowed(groups), "visited": share_visited(groups)}
            compare(shape, list(cases(shape, groups, device)), about, device, repetitions, seed, results)
    for shape in (*shapes, *more):
        for density in DENSITIES:
            mask = random_blocks(shape, density, device)
            about = {"mask": f"blocks, {density}", "allowed": mask.density(), "visited": mask.density()}
            compare(shape, list(sparse_cases(shape, mask, device)), about, device, repetitions, seed, results)


def compare(
    shape: Shape,
    under: list[Case],
    about: dict[str, Any],
    device: torch.device,
    repetitions: int,
    seed: int,
    results: Results,
) -> None:
    """Add the rows of one mask, forward, and forward and backward."""
    for backward in (False, True):
        direction = "forward + backward" if backward else "forward"
        more = {"shape": shape.name, **about, "direction": direction}
        found: dict[str, Measured] = {}
        for case in tqdm(under, desc=f"{shape.name}, {about['mask']}, {direction}"):
            try:
                found[case.name] = time_case(case, shape, backward, repetitions, device, seed)
            except (RuntimeError, NotImplementedError) as error:  # out of memory; a backend that refuses
                reason = str(error).strip().splitlines()[0]
                results.add(Row(case.name, 0, 0, error=reason, more=more))
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for row in rows_of(found, repetitions, more):
            results.add(row)


def rows_of(found: dict[str, Measured], repetitions: int, about: dict[str, Any]) -> list[Row]:
    """The rows of one comparison; the faster unmasked attention is the one that others are divided by."""
    unmasked = [one for name, one in found.items() if name.startswith(UNMASKED)]
    base = {name: one for name, one in found.items() if name in RATIOS.values()}
    if unmasked:
        base[UNMASKED] = min(unmasked, key=lambda one: statistics.median(one.seconds))
    rows = []
    for name, one in found.items():
        metrics: dict[str, Estimate] = {
            metric: ratio_of_medians(one.seconds, base[other].seconds)
            for metric, other in RATIOS.items()
            if other in base
        }
        more = {**about, "peak_bytes": one.peak}
        rows.append(Row(name, 0, repetitions, metrics, statistics.median(one.seconds), more=more))
    return rows


def table(results: Results) -> str:
    """One line per row, in milliseconds, ratios and MiB; reasons of what could not run follow below."""
    head = [
        "shape",
        "mask",
        "allowed",
        "visited",
        "what",
        "direction",
        "ms",
        *(f"x {n}" for n in RATIOS.values()),
        "MiB",
    ]
    body = []
    for row in results.rows:
        if row.seconds_per_image is None:
            continue
        more = row.more
        peak = "-" if more["peak_bytes"] is None else f"{more['peak_bytes'] / 2**20:.0f}"
        ratios = [f"{row.metrics[name].value:.2f}" if name in row.metrics else "-" for name in RATIOS]
        shares = [f"{more[name]:.2f}" for name in ("allowed", "visited")]
        milliseconds = f"{1000 * row.seconds_per_image:.3f}"
        body.append([more["shape"], more["mask"], *shares, row.method, more["direction"], milliseconds, *ratios, peak])
    lines = [markdown(head, body)]
    if results.settings["device"] != "cuda":
        lines = [NOT_MEASURED, "", *lines]
    errors = [
        f"- {r.method}, {r.more['shape']}, {r.more['mask']}, {r.more['direction']}: {r.error}"
        for r in results.rows
        if r.error is not None
    ]
    return "\n".join([*lines, *([""] if errors else []), *errors])
