"""One thread that owns the model: it answers what waits together, and changes over to a new commit in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import TypeAlias

from treelora_cli.api import Project
from treelora_cli.backend.values import Prediction
from treelora_cli.errors import SKIP_BAD, DataError, ProjectError, TreeLoraError, first_line, is_out_of_memory
from treelora_cli.learning.answering import Answerer, Input, read_through
from treelora_cli.serving.limits import Limits, Refusal

_LOOK_EVERY = 1.0
"""Seconds between looks at ``state.json`` while nothing is asked."""
_TRY_AGAIN = 5.0
"""Seconds until a commit that could not be read is tried again."""
_Stamp: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Serving:
    """What answers are made with.

    Attributes:
        project: At the commit.
        answerer: ``None`` where nothing is learned.
        scores: Of each task, when all were last scored.
    """

    project: Project
    answerer: Answerer | None
    scores: tuple[float | None, ...]

    @classmethod
    def at(cls, project: Project, prepare: Callable[[Project], Answerer]) -> Serving:
        """Read everything that answers at a project's commit need."""
        if not project.tasks:
            return cls(project, None, ())
        scores = project.matrix.standing().now
        return cls(project, prepare(project), scores)


@dataclass(frozen=True)
class Answered:
    """Answers of one request, and the commit that gave them."""

    predictions: list[Prediction]
    serving: Serving


@dataclass
class _Job:
    inputs: Sequence[Input]
    future: Future[Answered] = field(default_factory=Future)


class Worker:
    """Answers requests of many threads in one.

    Args:
        project: Opened; its model is loaded here, before anything is answered.
        prepare: Returns what answers with a project.
        limits: How much may wait, and how much is answered together.
        note: Shows one line to whoever runs the server.

    Raises:
        TreeLoraError: The model cannot be loaded, or nothing is learned.
    """

    def __init__(
        self, project: Project, prepare: Callable[[Project], Answerer], limits: Limits, note: Callable[[str], None]
    ) -> None:
        self._prepare = prepare
        self._limits = limits
        self._note = note
        self._file = project.root / "state.json"
        self._stamp = self._looked_at()
        self._again_at = 0.0
        self._waiting: deque[_Job] = deque()
        self._change = Condition()
        self._ending = False
        self.answered = 0
        self.problem: str | None = None
        self.serving = Serving.at(project, prepare)
        self._thread = Thread(target=self._run, name="answering", daemon=True)
        self._thread.start()

    # -- for those who ask ----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Raise ``Refusal`` (429) when as much waits as may, and (503) when the server ends."""
        if self._ending:
            raise Refusal(503, "The server is ending. Try again later.")
        if len(self._waiting) >= self._limits.waiting:
            raise Refusal(429, f"{self._limits.waiting} requests wait already. Try again later.")

    def submit(self, inputs: Sequence[Input]) -> Future[Answered]:
        """Have inputs answered; whoever cancels the future before its turn spares the work.

        Raises:
            Refusal: Too much waits already.
        """
        job = _Job(inputs)
        with self._change:
            self.check_room()
            self._waiting.append(job)
            self._change.notify()
        return job.future

    def stop(self) -> None:
        """Answer what waits, take nothing more, and return when the thread has ended."""
        with self._change:
            self._ending = True
            self._change.notify()
        self._thread.join()

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._change:
                if not (self._waiting or self._ending):
                    self._change.wait(_LOOK_EVERY)
                if self._ending and not self._waiting:
                    return
            self._change_over()
            jobs = self._next()
            if jobs:
                self._answer(jobs)

    def _next(self) -> list[_Job]:
        """Take requests up to the size of a batch, at least one; those whose client is gone are left out."""
        jobs: list[_Job] = []
        with self._change:
            count = 0
            while self._waiting and (not jobs or count + len(self._waiting[0].inputs) <= self._limits.batch):
                job = self._waiting.popleft()
                if job.future.set_running_or_notify_cancel():
                    jobs.append(job)
                    count += len(job.inputs)
        return jobs

    def _answer(self, jobs: list[_Job]) -> None:
        """Answer together; where one request's input is at fault, each alone, so that the others do not suffer."""
        try:
            predictions = self._asked([one for job in jobs for one in job.inputs])
        except Exception as error:  # whatever it is, the thread goes on and whoever asked is told
            if len(jobs) == 1:
                jobs[0].future.set_exception(_told(error))
                return
            for job in jobs:
                self._answer([job])
            return
        start = 0
        for job in jobs:
            own = predictions[start : start + len(job.inputs)]
            start += len(job.inputs)
            job.future.set_result(Answered(own, self.serving))
        self.answered += len(jobs)

    def _asked(self, inputs: Sequence[Input]) -> list[Prediction]:
        if self.serving.answerer is None:
            raise ProjectError("Nothing is learned yet. Run: treelora train-task DATA")
        return self.serving.answerer(inputs)

    # -- another commit -------------------------------------------------------------------------------

    def _looked_at(self) -> _Stamp | None:
        try:
            facts = self._file.stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    def _change_over(self) -> None:
        """Take in what was committed since; what cannot be read is said, and the commit before goes on answering."""
        stamp, now = self._looked_at(), time.monotonic()
        if stamp == self._stamp and (self.problem is None or now < self._again_at):
            return
        self._stamp, self._again_at = stamp, now + _TRY_AGAIN
        try:
            project = self.serving.project.newest()
            if project.digest != self.serving.project.digest:
                self.serving = Serving.at(project, self._prepare)
                self._note(f"Now at commit {project.digest[:12]}: {counted(len(project.tasks), 'task')}.")
            self.problem = None
        except (TreeLoraError, OSError, MemoryError) as error:
            if self.problem != str(error):
                self._note(f"The newest commit cannot be used, the one before answers: {error}")
            self.problem = str(error)


def prepared(project: Project, inference: str | None, threshold: str | None = None) -> Answerer:
    """Return what answers with a project, after all that it needs was read and found whole.

    Raises:
        TreeLoraError: Nothing is learned, or a file is damaged.
    """
    answerer = project.answerer(inference=inference, threshold=threshold)
    read_through(answerer.memory)
    return answerer


def counted(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _told(error: Exception) -> Refusal:
    """Return what whoever asked is told of an error."""
    if isinstance(error, DataError):
        return Refusal(422, str(error).removesuffix(SKIP_BAD))
    if is_out_of_memory(error):
        return Refusal(503, "Out of memory. Send fewer or smaller inputs at once.")
    if isinstance(error, TreeLoraError):
        return Refusal(503, str(error))
    return Refusal(500, f"Unexpected {type(error).__name__}: {first_line(error)}")
