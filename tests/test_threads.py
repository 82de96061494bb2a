"""Several threads on one set of weights, interleaved step by step."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnctrl as ac
from tests import tiny
from tests.probes import REGIONS
from tests.spies import assert_restored, snapshot

STEPS = 3
JOBS: dict[str, tuple[str, tuple[ac.Control, ...], bool]] = {
    # name: (prompt, controls, whether it enters a block at all)
    "mask": ("a cat and a dog", (ac.RegionMask(REGIONS),), True),
    "losses": ("a dog and a cat", (ac.DenseDiffusion(REGIONS), ac.AStar(("cat", "dog"))), True),
    "no controls": ("a red bird", (), False),
}


def work(pipe: Any, job: str, callback: Any = None) -> tuple[torch.Tensor, ac.Run | None]:
    prompt, controls, block = JOBS[job]
    if not block:
        return tiny.draw(pipe, prompt, STEPS, callback_on_step_end=callback), None
    with ac.control(pipe, *controls) as run:
        return tiny.draw(pipe, prompt, STEPS, callback_on_step_end=callback), run


def together(pipe: Any, jobs: dict[str, Any]) -> dict[str, tuple[torch.Tensor, ac.Run | None]]:
    """Every job in its own thread; a barrier makes them end each step together, so that all are always under way."""
    barrier = threading.Barrier(len(jobs), timeout=60)
    results: dict[str, Any] = {}

    def meet(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        barrier.wait()
        return values

    def thread(job: str, own: Any) -> None:
        try:
            results[job] = work(own, job, meet)
        except BaseException as error:
            barrier.abort()
            results[job] = error

    threads = [threading.Thread(target=thread, args=item) for item in jobs.items()]
    for one in threads:
        one.start()
    for one in threads:
        one.join(timeout=120)
    for job, result in results.items():
        assert not isinstance(result, BaseException), f"{job}: {result!r}"
    return results


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
def test_each_thread_gets_what_it_gets_alone(model: Any) -> None:
    pipe = model()
    alone = {job: work(pipe, job)[0] for job in JOBS}
    assert not torch.equal(alone["mask"], alone["losses"])
    before = snapshot(pipe)
    for _ in range(3):
        # The third thread draws with the original pipeline: to it the model must look stock.
        jobs = {"mask": ac.share(pipe), "losses": ac.share(pipe), "no controls": pipe}
        results = together(pipe, jobs)
        for job, expected in alone.items():
            assert torch.equal(results[job][0], expected), job
    assert_restored(before, pipe)


def test_each_run_keeps_its_own_books() -> None:
    pipe = tiny.sd()
    jobs = {"mask": ac.share(pipe), "losses": ac.share(pipe)}
    runs = {job: run for job, (_, run) in together(pipe, jobs).items()}
    mask, losses = runs["mask"], runs["losses"]
    assert mask is not None
    assert losses is not None
    assert {row.control for row in mask.report.rows.values()} == {"RegionMask"}
    assert {row.control for row in losses.report.rows.values()} == {"DenseDiffusion", "AStar"}
    assert mask.losses == []
    assert [v.step for v in losses.losses] == [0, 1]
    assert mask.sampling is not None
    assert mask.sampling.prompts == ["a cat and a dog"]


def test_the_model_is_restored_when_the_last_of_several_runs_leaves() -> None:
    """The first block is left while the second one is in the middle of a run."""
    pipe = tiny.sd()
    before = snapshot(pipe)
    one, two = ac.share(pipe), ac.share(pipe)
    alone, _ = work(two, "losses")
    entered, left = threading.Event(), threading.Event()
    results: list[torch.Tensor] = []

    def pause(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        if index == 0:
            entered.set()
            assert left.wait(60)
        return values

    thread = threading.Thread(target=lambda: results.append(work(two, "losses", pause)[0]))
    with ac.control(one, ac.RegionMask(REGIONS)):
        tiny.draw(one, steps=1)
        thread.start()
        assert entered.wait(60)
    assert snapshot(pipe).keys() != before.keys()  # the other run still needs our processors
    left.set()
    thread.join(60)
    assert torch.equal(results[0], alone)
    assert_restored(before, pipe)
