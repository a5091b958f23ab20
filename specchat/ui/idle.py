"""Watching the memory while nobody is answered: another program may need it, and pinned memory cannot be swapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from specchat.chat.generator import Generator
from specchat.threads import Thread

_EVERY_S = 2.0


@contextmanager
def watching_memory(engine: Generator | None) -> Iterator[None]:
    """Let the engine give layers back inside the context, if memory becomes short; nothing is generated meanwhile.

    Args:
        engine: engine that waits; None while it is still loading.

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
