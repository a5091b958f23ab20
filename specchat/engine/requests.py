"""Requests that wait for a seat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from specchat.records.generation import Request


class RequestQueue:
    """Requests in order, taken from an iterable one by one.

    Args:
        requests: requests; the next one is only taken when it is looked at.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._rest: Iterator[tuple[int, Request]] = enumerate(requests)
        self._first: tuple[int, Request] | None = None

    @property
    def first(self) -> Request | None:
        """Next request; None if none is left."""
        if self._first is None:
            self._first = next(self._rest, None)
        return None if self._first is None else self._first[1]

    def take(self) -> tuple[int, Request]:
        """Remove and return the next request and its number; only after a look at it."""
        assert self._first is not None
        taken, self._first = self._first, None
        return taken
