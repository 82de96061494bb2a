"""Runs of a page: a line with few at work at a time, each in a thread of its own, stoppable at every step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image

from attnctrl.errors import ControlError
from attnctrl.processors import family_of


class Stopped(Exception):
    """The visitor stopped the run, or left."""


@dataclass(frozen=True)
class Waiting:
    """Before a run: how many stand in line up to and with this one."""

    position: int


@dataclass(frozen=True)
class Progress:
    """A finished step, 1 to total, of what is being drawn; picture: the latents so far, where they were decoded."""

    what: str
    step: int
    total: int
    picture: Image.Image | None = None


class Line:
    """First come, first served: `at_once` at work, at most `longest` waiting."""

    def __init__(self, at_once: int = 1, longest: int = 16) -> None:
        self.at_once, self.longest = at_once, longest
        self._tickets: list[object] = []
        self._changed = threading.Condition()

    def enter(self, ticket: object) -> None:
        """Raises ControlError when the line is full."""
        with self._changed:
            if len(self._tickets) >= self.at_once + self.longest:
                raise ControlError(f"{self.longest} runs are waiting already: try again in a while.")
            self._tickets.append(ticket)

    def leave(self, ticket: object) -> None:
        with self._changed:
            self._tickets.remove(ticket)
            self._changed.notify_all()

    def position(self, ticket: object, other_than: int = -1, patience: float = 0.5) -> int:
        """0 for those at work, else the place in line; waits up to `patience` seconds for it to change."""
        with self._changed:
            if other_than >= 0:
                self._changed.wait_for(lambda: self._place(ticket) != other_than, timeout=patience)
            return self._place(ticket)

    def _place(self, ticket: object) -> int:
        return max(0, self._tickets.index(ticket) + 1 - self.at_once)


class Watch:
    """What a run tells its page, and where it learns that it is to stop.

    grid: (frames, height, width) of the latent tokens, once the denoiser was called.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.grid: tuple[int, int, int] | None = None

    def tell(self, event: Progress) -> None:
        self.told.put(("progress", event))

    def check(self) -> None:
        """Raises Stopped when the run is to stop."""
        if self.stop.is_set():
            raise Stopped


_WATCH: ContextVar[Watch | None] = ContextVar("attnctrl_watch", default=None)


def watch_denoisers(pipe: Any) -> None:
    """Let every run under a watch end at the next call of the denoiser, whoever makes it: steps, losses, inversions.

    Only runs of a `Job` have a watch; for all others nothing changes.
    """
    family = family_of(pipe)

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        watch = _WATCH.get()
        if watch is not None:
            watch.check()
            watch.grid = family.latent_grid(args, kwargs)

    for denoiser in family.denoisers:
        denoiser.register_forward_pre_hook(before, with_kwargs=True)


class Job:
    """One run, from its place in line to its result.

    work: called in a thread of its own with the run's watch.
    """

    def __init__(self, line: Line, work: Callable[[Watch], Any]) -> None:
        self.line, self.work, self.watch = line, work, Watch()

    def stop(self) -> None:
        """Have the run end before its next call of the denoiser, or leave the line."""
        self.watch.stop.set()

    def events(self) -> Iterator[Any]:
        """`Waiting` and `Progress`, then what `work` returned.

        Whoever iterates may change threads between two events, and may stop iterating: then the run stops.
        Raises Stopped, and what `work` raised. The place in the line is free once the thread has really ended.
        """
        self.line.enter(self)
        working = False
        try:
            place = self.line.position(self)
            while place > 0:
                yield Waiting(place)
                before = place
                while place == before and place > 0:
                    self.watch.check()
                    place = self.line.position(self, other_than=before)
            threading.Thread(target=self._work, name="attnctrl-run", daemon=True).start()
            working = True
            while True:
                kind, value = self.watch.told.get()
                if kind == "failed":
                    raise value
                yield value
                if kind == "result":
                    return
        finally:
            self.stop()
            if not working:
                self.line.leave(self)

    def _work(self) -> None:
        _WATCH.set(self.watch)
        try:
            self.watch.check()
            done = ("result", self.work(self.watch))
        except BaseException as error:
            done = ("failed", error)
        finally:
            self.line.leave(self)
        self.watch.told.put(done)
