"""Where requests of all visitors come in: each becomes a job, whose visitor alone hears of it and can stop it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attnctrl.errors import ControlError
from attnctrl.ui.backend import Backend
from attnctrl.ui.files import Outbox
from attnctrl.ui.jobs import Job, Line, Stopped
from attnctrl.ui.request import Request
from attnctrl.ui.result import Pictures, Result
from attnctrl.ui.runs import controls_of, draw
from attnctrl.ui.snippets import command, python

_LOG = logging.getLogger(__name__)


class Desk:
    """The page's backend, line and outbox, and each visitor's jobs."""

    def __init__(self, backend: Backend, at_once: int = 1, longest: int = 16) -> None:
        self.backend, self.line, self.outbox = backend, Line(at_once, longest), Outbox()
        self._jobs: list[tuple[str, Job]] = []

    def run(self, request: Request, visitor: str, pictures: Pictures = ()) -> Iterator[Any]:
        """What `Job.events` gives, a `Result` last. Raises as it does, and ControlError before there is a job."""
        if request.task == "layout":
            controls_of(request, self.backend)
        job = Job(self.line, lambda watch: draw(self.backend, request, watch, pictures))
        self._jobs.append((visitor, job))
        try:
            yield from job.events()
        finally:
            job.stop()
            self._jobs.remove((visitor, job))

    def stop(self, visitor: str) -> int:
        """Stop the visitor's runs, those in line too; returns how many there were."""
        jobs = [job for whose, job in [*self._jobs] if whose == visitor]
        for job in jobs:
            job.stop()
        return len(jobs)

    def file(self, request: Request, result: Result) -> str:
        """The run's picture for download, with its request: the controlled one where there is one."""
        picture = result.controlled or result.stock
        assert picture is not None
        return self.outbox.put(picture, self.backend.model, request.data())

    def snippets(self, request: Request, result: Result | None = None) -> tuple[str, str]:
        """The request as a program and as a command line; where it cannot be said so, a comment that says why."""
        if request.task == "explain" and result is not None and result.maps is not None:
            request = replace(request, phrases=result.maps.phrases)
        try:
            line = command(request, self.backend.model, self.backend.files)
        except ControlError as error:
            line = f"# {error}"
        return python(request, self.backend.model, self.backend.files), line


def sentence(error: BaseException) -> str:
    """Why a run ended without a picture, for its visitor; what nobody foresaw goes to the log too."""
    if isinstance(error, Stopped):
        return "Stopped before the picture was done."
    if isinstance(error, ControlError):
        return str(error)
    _LOG.error("a run failed", exc_info=error)
    return f"the run failed: {type(error).__name__}: {str(error)[:300]}"
