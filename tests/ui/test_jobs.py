"""The line and its jobs: order, positions, stopping, and that a place is free when its thread has ended."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from attnctrl.errors import ControlError
from attnctrl.ui.jobs import Job, Line, Progress, Stopped, Waiting, Watch


def until(condition: Any) -> None:
    """Wait until it holds, at most 20 seconds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)


class Held:
    """Work that ends when it is told to, or when its watch says so."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()

    def __call__(self, watch: Watch) -> str:
        self.began.set()
        while not self.go.wait(0.005):
            watch.check()
        watch.tell(Progress("picture", 1, 1))
        return "drawn"


class Reader(threading.Thread):
    """Reads a job's events as a page does."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.job, self.seen, self.error = job, [], None  # type: tuple[Job, list, BaseException | None]
        self.start()

    def run(self) -> None:
        try:
            for event in self.job.events():
                self.seen.append(event)
        except BaseException as error:
            self.error = error


def free(line: Line) -> bool:
    return not line._tickets


def test_jobs_are_served_in_order_and_told_their_place() -> None:
    line, works = Line(), [Held() for _ in range(3)]
    readers = []
    for work in works:
        readers.append(Reader(Job(line, work)))
        until(lambda: len(line._tickets) == len(readers))
    until(lambda: readers[2].seen == [Waiting(2)])
    # A job has its place before its thread gets to its work, and the page hears of it later still.
    until(lambda: readers[1].seen == [Waiting(1)] and works[0].began.is_set())
    assert not works[1].began.is_set()
    works[0].go.set()
    until(lambda: works[1].began.is_set() and readers[2].seen[-1] == Waiting(1))
    works[1].go.set()
    works[2].go.set()
    for reader in readers:
        reader.join(20)
        assert reader.seen[-2:] == [Progress("picture", 1, 1), "drawn"]
    until(lambda: free(line))


def test_two_places_serve_two_at_once() -> None:
    line, works = Line(at_once=2), [Held(), Held()]
    readers = [Reader(Job(line, work)) for work in works]
    until(lambda: all(work.began.is_set() for work in works))
    for work in works:
        work.go.set()
    for reader in readers:
        reader.join(20)
        assert reader.seen[-1] == "drawn"


def test_a_job_is_stopped_in_line_and_at_work() -> None:
    line, first, second = Line(), Held(), Held()
    working, waiting = Reader(Job(line, first)), None
    until(first.began.is_set)
    waiting = Reader(Job(line, second))
    until(lambda: waiting.seen == [Waiting(1)])
    waiting.job.stop()
    waiting.join(20)
    assert isinstance(waiting.error, Stopped)
    assert not second.began.is_set()
    working.job.stop()
    working.join(20)
    assert isinstance(working.error, Stopped)
    until(lambda: free(line))


def test_a_job_that_nobody_reads_any_more_stops() -> None:
    line, ended = Line(), threading.Event()

    def work(watch: Watch) -> None:
        watch.tell(Progress("picture", 1, 2))
        try:
            Held()(watch)
        finally:
            ended.set()

    events = Job(line, work).events()
    assert next(events) == Progress("picture", 1, 2)
    assert not ended.is_set()
    events.close()
    until(lambda: ended.is_set() and free(line))


def test_what_work_raises_is_raised() -> None:
    def fail(watch: Watch) -> None:
        raise ControlError("it cannot be.")

    line = Line()
    with pytest.raises(ControlError, match="it cannot be"):
        list(Job(line, fail).events())
    until(lambda: free(line))


def test_a_full_line_refuses() -> None:
    line, work = Line(longest=1), Held()
    readers = [Reader(Job(line, work))]
    until(work.began.is_set)
    readers.append(Reader(Job(line, Held())))
    until(lambda: len(line._tickets) == 2)
    with pytest.raises(ControlError, match="1 runs are waiting already"):
        next(Job(line, Held()).events())
    for reader in readers:
        reader.job.stop()
        reader.join(20)
    until(lambda: free(line))
