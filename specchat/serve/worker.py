"""The engine's thread: takes jobs from a queue and answers as many at once as the engine has seats."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event
from typing import Protocol

from specchat.chat.answer import Answer, Delta
from specchat.closing import Closeable
from specchat.errors import LostWorkerError, SpecchatError
from specchat.planner.learning import PassSteps
from specchat.planner.statistics import SharedPass
from specchat.records.generation import Request, Step
from specchat.serve.errors import ApiError, internal, of_specchat, stopping
from specchat.threads import Thread


class ManyGenerator(Protocol):
    """The part of `specchat.engine.engine.Engine` that a server uses."""

    def generate_many(
        self, requests: Iterable[Request | None], *, cancel: Event | None = None
    ) -> Iterator[tuple[int, Step]]:
        """Answer many requests; see `Engine.generate_many`."""

    def relieve(self) -> None:
        """Give layers back to the system if memory is short, and notice lost workers; only between answers."""


# Seconds between two looks at the memory while nobody is answered: another program may need it.
_IDLE_S = 2.0


@dataclass(frozen=True)
class Ended:
    """The last record of an answer.

    Attributes:
        error: reason why the answer is not complete, or None.
    """

    error: ApiError | None = None


@dataclass(eq=False)
class Job:
    """An answer that a client waits for.

    Attributes:
        request: request for the engine; its event ends the job.
        answer: accumulated answer; other threads may read it after `Ended`.
        post: receives the answer's records, in the engine's thread.
        submitted: time at which the job came.
        queue_s: seconds until the engine took the job.
    """

    request: Request
    answer: Answer
    post: Callable[[Delta | Ended], None]
    submitted: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0

    @property
    def cancel(self) -> Event:
        """Event that ends the job."""
        assert self.request.cancel is not None, "every job can be ended alone"
        return self.request.cancel

    def begin(self) -> None:
        """Note that the engine takes the job."""
        self.answer.submitted = time.perf_counter()
        self.queue_s = self.answer.submitted - self.submitted


class AnswerWorker(Closeable):
    """The only thread that runs the engine.

    Args:
        engine: engine that answers.
        most_waiting: most jobs that wait for a seat; further ones are refused.
        observe: receives each finished job and its error; called in the engine's thread.
        learn: receives the steps of each pass; called in the engine's thread.
        warn: receives one line when the draft is given up, or about an error that is no answer's own.
    """

    def __init__(
        self,
        engine: ManyGenerator,
        *,
        most_waiting: int,
        observe: Callable[[Job, ApiError | None], None] = lambda _job, _error: None,
        learn: Callable[[SharedPass], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._engine = engine
        self._most_waiting = most_waiting
        self._observe = observe
        self._learn = learn
        self._warn = warn
        self._waiting: SimpleQueue[Job | None] = SimpleQueue()
        self._live: dict[int, Job] = {}  # by number of the request
        self._stop = Event()
        self._has_lost = False
        self._thread = Thread(self._run)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of jobs that wait for a seat."""
        return self._waiting.qsize()

    @property
    def num_answering(self) -> int:
        """Number of answers in progress."""
        return len(self._live)

    def submit(self, job: Job) -> None:
        """Add a job to the queue.

        Raises:
            ApiError: too many jobs wait, or the server is shutting down.
        """
        if self._stop.is_set():
            raise stopping()
        if self.num_waiting >= self._most_waiting:
            raise ApiError(429, f"{self._most_waiting} requests wait already: try again later", "queue_full")
        self._waiting.put(job)

    def stop(self) -> None:
        """End all answers at the next layer, and refuse new jobs; called by the thread that submits."""
        self._stop.set()
        self._waiting.put(None)

    def close(self) -> None:
        """Stop, and wait until the engine is free."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._waiting.get(timeout=_IDLE_S)
            except Empty:
                self._relieve()
                continue
            if job is not None:
                self._answer(job)
        while not self._waiting.empty():
            job = self._waiting.get()
            if job is not None:
                self._end(job, stopping())

    def _relieve(self) -> None:
        """Give layers back if memory is short while nobody is answered."""
        try:
            self._engine.relieve()
        except LostWorkerError as lost:
            if not self._has_lost:
                self._has_lost = True
                self._warn(f"{lost.message}: no request can be answered until the server is started again")
        except Exception as caught:  # noqa: BLE001  the next answer says what is wrong
            self._warn(f"memory is short: {_described(caught)}")

    def _answer(self, first: Job) -> None:
        """Answer a job, and all that come until no answer is in progress."""
        error, pass_steps = stopping(), PassSteps()
        try:
            for number, step in self._engine.generate_many(self._requests(first), cancel=self._stop):
                if step.warning is not None:
                    self._warn(step.warning)
                if (job := self._live.get(number)) is not None:  # else its text has ended before
                    shared = pass_steps.add(step, samples=not job.request.sampling.greedy)
                    self._take(number, job, step)
                    if shared is not None:
                        self._learn(shared)
        except Exception as caught:  # noqa: BLE001  the server goes on, whatever ended these answers
            self._warn(f"answers failed: {_described(caught)}")
            error = of_specchat(caught) if isinstance(caught, SpecchatError) else internal()
        for number in list(self._live):
            self._end(self._live.pop(number), error)

    def _requests(self, first: Job) -> Iterator[Request | None]:
        """Yield the requests of waiting jobs, and None when none waits."""
        job: Job | None = first
        number = 0
        while True:
            if job is not None and job.cancel.is_set():
                self._end(job, None)
            elif job is not None:
                job.begin()
                self._live[number] = job
                number += 1
                yield job.request
            while self._waiting.empty():
                yield None
            job = self._waiting.get()

    def _take(self, number: int, job: Job, step: Step) -> None:
        """Pass on what a step adds to its answer, and end the job with the answer."""
        if step.finish_reason in ("interrupt", "error"):
            del self._live[number]
            error = of_specchat(step.error) if step.error is not None else None
            self._end(job, stopping() if self._stop.is_set() and error is None else error)
            return
        for delta in job.answer.take(step):
            job.post(delta)
        if job.answer.finish_reason is None:
            return
        job.cancel.set()  # after a stop string, the engine would go on
        for delta in job.answer.finish():
            job.post(delta)
        del self._live[number]
        self._end(job, None)

    def _end(self, job: Job, error: ApiError | None) -> None:
        self._observe(job, error)
        job.post(Ended(error))


def _described(error: Exception) -> str:
    return error.message if isinstance(error, SpecchatError) else f"{type(error).__name__}: {error}"
