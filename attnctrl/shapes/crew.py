"""Several processes that train one model together, each on its share of every batch.

On a CPU, two processes of one thread each outrun one process of two threads when the machine is shared: threads
wait for each other at every operation, processes once a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn


@dataclass(frozen=True)
class Crew:
    """Which of how many processes this one is; alone by default."""

    rank: int = 0
    size: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch: every size-th row; the batch is to be a multiple of size."""
        return batch[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the crew."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def agree(self, value: float) -> float:
        """The largest of everyone's values, so that all stop at the same step."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return float(shared)


SOLO = Crew()


def run(processes: int, out: Path, work: Callable[..., None], *arguments: Any) -> None:
    """work(crew, *arguments) in this process, or in several that meet in the directory `out`."""
    if processes > 1:
        run_crew(processes, work, arguments, out / "meeting")
    else:
        work(SOLO, *arguments)


def run_crew(size: int, work: Callable[..., None], arguments: tuple[Any, ...], meeting: Path) -> None:
    """Call work(crew, *arguments) in `size` new processes and wait for them.

    Args:
        size: 2 or more; the machine's threads are split evenly.
        work: a module-level function.
        arguments: picklable.
        meeting: a path for the processes to find one another; any file there is removed.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed; the others are ended.
    """
    meeting.unlink(missing_ok=True)
    threads = max(1, torch.get_num_threads() // size)
    multiprocessing.spawn(_member, (size, threads, str(meeting), work, arguments), nprocs=size, daemon=True)
    meeting.unlink(missing_ok=True)


def _member(
    rank: int, size: int, threads: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    # Linux may share the processor out by session rather than by process: let each count as one.
    if hasattr(os, "setsid"):
        os.setsid()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        work(Crew(rank, size), *arguments)
    finally:
        distributed.destroy_process_group()
