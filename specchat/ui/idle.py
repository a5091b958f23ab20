"""Watching memory and workers while nobody is answered.

Another program may need the memory, and pinned memory cannot be swapped. A worker may be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

from specchat.chat.generator import Generator
from specchat.errors import LostWorkerError
from specchat.threads import Thread

_EVERY_S = 2.0


@contextmanager
def watching(engine: Generator | None, tell: Callable[[LostWorkerError], None]) -> Iterator[None]:
    """Let the engine look after itself inside the context; nothing is generated meanwhile.

    It gives layers back if memory becomes short. A worker that is lost is told once, and then the watch is over.

    Args:
        engine: engine that waits; None while it is still loading.
        tell: receives the error of a worker that is lost, in another thread.

    Raises:
        BaseException: giving layers back failed with this error; raised at the end of the context.
    """
    if engine is None:
        yield
        return
    end, errors = Event(), list[BaseException]()

    def watch() -> None:
        try:
            while not end.wait(_EVERY_S):
                engine.relieve()
        except LostWorkerError as error:
            tell(error)
        except BaseException as error:  # noqa: BLE001  raised again where it is handled
            errors.append(error)

    thread = Thread(watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    if errors:
        raise errors[0]
