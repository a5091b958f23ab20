"""A model that is loaded in a thread while its user may type already."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from specchat.errors import AllocationError
from specchat.threads import Thread
from specchat.ui.progress import Pace

T = TypeVar("T")

_LOADING = "loading the model"


class LoadReporter:
    """What is being loaded just now; told in the thread that loads, asked by whoever owns the screen."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._text = _LOADING
        self._warnings: list[str] = []

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """While bytes move; the function takes bytes so far and bytes altogether."""
        pace = Pace(what)

        def update(done: int, total: int) -> None:
            self._text = pace.text(done, total)

        yield update
        self._text = _LOADING

    def warn(self, text: str) -> None:
        """Something that did not go as asked; shown at the next opportunity."""
        self._warnings.append(text)

    def line(self) -> str:
        """What is going on, and since when."""
        return f"{self._text} · {time.monotonic() - self._begin:.0f} s"

    def take_warnings(self) -> list[str]:
        """The warnings that nobody has seen yet."""
        taken, self._warnings = self._warnings, []
        return taken


class BackgroundLoad(Generic[T]):
    """Loads in a thread of its own, from `start` on.

    Args:
        load: does it; is told where to report.
    """

    def __init__(self, load: Callable[[LoadReporter], T]) -> None:
        self.reporter = LoadReporter()
        self._load = load
        self._result: T | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = Thread(self._run)
        self._has_begun = False

    def start(self) -> None:
        """Begins, once: the first libraries that loading imports hold up all other threads for tenths of a second."""
        if self._has_begun:
            return
        self._has_begun = True
        try:
            self._thread.start()
        except AllocationError as error:
            self._error = error
            self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    @property
    def error(self) -> BaseException | None:
        """What it failed with, if it has."""
        return self._error

    def wait(self, timeout_s: float) -> bool:
        """Until it is done, but not longer than that; whether it is."""
        self.start()
        return self._done.wait(timeout_s)

    def result(self) -> T:
        """What was loaded.

        Raises:
            BaseException: whatever loading failed with.
        """
        self.start()
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def close(self, close: Callable[[T], None]) -> None:
        """Lets go of the result if there is one; what is still being loaded ends with the process."""
        if self.is_done and self._result is not None:
            close(self._result)

    def _run(self) -> None:
        try:
            self._result = self._load(self.reporter)
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            self._error = error
        self._done.set()
