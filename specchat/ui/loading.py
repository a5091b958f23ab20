"""Loading a model in a background thread, while the user can already type."""

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
    """The progress of loading: the loading thread updates it, the thread of the screen reads it."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._text = _LOADING
        self._warnings: list[str] = []

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Report a transfer for the duration of a context.

        Returns:
            Context with a function that takes the bytes done and the total bytes.
        """
        pace = Pace(what)

        def update(done: int, total: int) -> None:
            self._text = pace.text(done, total)

        yield update
        self._text = _LOADING

    def warn(self, text: str) -> None:
        """Store a warning, to be shown before the next message."""
        self._warnings.append(text)

    def line(self) -> str:
        """Return the current progress and the elapsed time in one line."""
        return f"{self._text} · {time.monotonic() - self._begin:.0f} s"

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        taken, self._warnings = self._warnings, []
        return taken


class BackgroundLoad(Generic[T]):
    """A load in a background thread, which begins with `start`.

    Args:
        load: function that loads the model and reports its progress.
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
        """Start loading, if it has not started yet.

        The imports at the start of loading block all other threads for tenths of a second.
        """
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
        """Whether loading has succeeded or failed."""
        return self._done.is_set()

    @property
    def error(self) -> BaseException | None:
        """Error of a failed load, or None."""
        return self._error

    def wait(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds for the load, and return whether it is done."""
        self.start()
        return self._done.wait(timeout_s)

    def result(self) -> T:
        """Wait for the load and return its result.

        Raises:
            BaseException: loading failed with this error.
        """
        self.start()
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def close(self, close: Callable[[T], None]) -> None:
        """Close the result, if there is one; an unfinished load ends with the process."""
        if self.is_done and self._result is not None:
            close(self._result)

    def _run(self) -> None:
        try:
            self._result = self._load(self.reporter)
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            self._error = error
        self._done.set()
