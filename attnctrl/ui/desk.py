"""Where requests of all visitors come in: each becomes a job, whose visitor alone hears of it and can stop it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from PIL import Image

from attnctrl.errors import ControlError
from attnctrl.models import load_pipeline
from attnctrl.ui.backend import SHIPPED_CLIPS, Backend
from attnctrl.ui.files import Outbox
from attnctrl.ui.jobs import Job, Line, Stopped
from attnctrl.ui.request import Request
from attnctrl.ui.result import Drawn, Pictures, Result
from attnctrl.ui.runs import controls_of, draw
from attnctrl.ui.snippets import command, python

_LOG = logging.getLogger(__name__)


class Desk:
    """The page's backend, line and outbox, and each visitor's jobs."""

    def __init__(self, backend: Backend, at_once: int = 1, longest: int = 16) -> None:
        self.backend, self.line, self.outbox = backend, Line(at_once, longest), Outbox()
        self._clips: Backend | None = None
        self._loading = threading.Lock()
        self._jobs: list[tuple[str, Job]] = []

    def drawer(self, task: str) -> Backend:
        """The backend of a tab, once its model is there.

        Clips are drawn by the page's model where it draws clips, else by the shipped one, which is loaded when it is
        asked for first. Raises ControlError for tabs of pictures where the page's model draws clips.
        """
        if (task == "video") == self.backend.clips:
            return self.backend
        if task != "video":
            raise ControlError(f"{self.backend.model} draws clips: this tab needs a model that draws pictures.")
        with self._loading:
            if self._clips is None:
                clips, device = Backend(SHIPPED_CLIPS, self.backend.files), self.backend.pipe.device
                self._clips = clips.open(lambda: load_pipeline(SHIPPED_CLIPS, device=device))
            return self._clips

    def run(self, request: Request, visitor: str, pictures: Pictures = ()) -> Iterator[Any]:
        """What `Job.events` gives, a `Result` last. Raises as it does, and ControlError before there is a job."""
        if request.task in ("layout", "video"):
            controls_of(request, self.backend)
        job = Job(self.line, lambda watch: draw(self.drawer(request.task), request, watch, pictures))
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
        """The run's picture or clip for download, with its request: the controlled one where there is one."""
        picture = result.controlled or result.stock
        assert picture is not None
        return self.outbox.put(picture, self.drawer(request.task).model, request.data())

    def shown(self, request: Request, drawn: Drawn | None) -> Image.Image | str | None:
        """What the page is given to show: pictures as they are, clips as files."""
        if not isinstance(drawn, list):
            return drawn
        return self.outbox.put(drawn, self.drawer(request.task).model, request.data())

    def snippets(self, request: Request, result: Result | None = None) -> tuple[str, str]:
        """The request as a program and as a command line; where it cannot be said so, a comment that says why."""
        model = self.drawer(request.task).model
        if request.task == "explain" and result is not None and result.maps is not None:
            request = replace(request, phrases=result.maps.phrases)
        try:
            line = command(request, model, self.backend.files)
        except ControlError as error:
            line = f"# {error}"
        return python(request, model, self.backend.files), line


def sentence(error: BaseException) -> str:
    """Why a run ended without a picture, for its visitor; what nobody foresaw goes to the log too."""
    if isinstance(error, Stopped):
        return "Stopped before the picture was done."
    if isinstance(error, ControlError):
        return str(error)
    _LOG.error("a run failed", exc_info=error)
    return f"the run failed: {type(error).__name__}: {str(error)[:300]}"
