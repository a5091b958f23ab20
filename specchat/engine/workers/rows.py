"""Rows between ranks over gloo: two threads send and receive, so that the engine's thread can hear of lost ranks, too.

Ranks find each other by a store whose entries travel over the authenticated connections. A wait of gloo that ended by a
time limit would close its connection for good, so these waits have none: the signs of life have (connection.py). Gloo
ends the process if a message has another size than the receiver expects. So every hop begins with a head of one size,
which tells the size of the rows, or that the pass was stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specchat.engine.workers.connection import Arrived, Mailbox
from specchat.errors import WorkerUnreachableError
from specchat.threads import Thread

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STOPPED = -1
_HEAD = 3  # number of the dtype or _STOPPED, rows, width
_FOREVER = timedelta(days=365)
_LOOK_S = 0.05
# Seconds that connecting all machines may take.
_JOINING_S = 20.0


@dataclass(frozen=True)
class Broken:
    """A hop that failed because the connection to another rank broke."""

    rank: int
    reason: str


class SharedStore(dist.Store):  # type: ignore[misc, name-defined]
    """The entries by which gloo finds the other ranks, equal on all of them.

    Args:
        tell: sends a new entry to the other ranks.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__()
        self._tell = tell
        self._entries: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, key: str, value: str) -> None:
        """Take over an entry of another rank."""
        with self._changed:
            self._entries[key] = bytes.fromhex(value)
            self._changed.notify_all()

    def end(self) -> None:
        """Let all waits fail: a rank is lost."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def set(self, key: str, value: Any) -> None:
        """Add an entry on all ranks."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.put(key, data.hex())
        self._tell(key, data.hex())

    def get(self, key: str) -> bytes:
        """Return an entry, and wait for a missing one."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._entries or self._is_closed)
            if key not in self._entries:
                raise RuntimeError("a rank was lost before all had connected")
            return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until entries are there."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Return whether entries are there."""
        with self._changed:
            return all(key in self._entries for key in keys)


class RowExchange:
    """The hops of one rank.

    Args:
        group: connections of gloo to all other ranks.
        mailbox: receives rows as `Rows`, and `Broken`.
        listen: waits for what the mailbox receives, until it is `Rows`; raises an error for anything else.
    """

    def __init__(self, group: Any, mailbox: Mailbox, listen: Callable[[], Rows]) -> None:
        self._group = group
        self._mailbox = mailbox
        self._listen = listen
        self._outgoing: SimpleQueue[tuple[Tensor | None, int] | None] = SimpleQueue()
        self._incoming: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        for run in (self._send, self._receive):
            Thread(run).start()

    def send(self, rows: Tensor | None, to: int) -> None:
        """Send rows; see `Exchange`."""
        self._outgoing.put((rows, to))

    def expect(self, source: int, num_rows: int) -> None:
        """Begin to receive rows; see `Exchange`."""
        self._incoming.put((source, num_rows))

    def take(self) -> Tensor | None:
        """Wait for rows; see `Exchange`."""
        return self._listen().rows

    def close(self) -> None:
        """End the threads; one that waits for a lost rank ends with the process, or with that rank."""
        self._outgoing.put(None)
        self._incoming.put(None)

    def _send(self) -> None:
        while (order := self._outgoing.get()) is not None:
            rows, to = order
            try:
                if rows is None:
                    self._group.send([torch.tensor([_STOPPED, 0, 0])], to, 0).wait()
                    continue
                self._group.send([torch.tensor([_DTYPES.index(rows.dtype), *rows.shape])], to, 0).wait()
                self._group.send([rows.view(torch.uint8)], to, 0).wait()
            except RuntimeError as error:
                self._mailbox.put(Broken(to, str(error)))
                return

    def _receive(self) -> None:
        while (order := self._incoming.get()) is not None:
            source, num_rows = order
            try:
                head = torch.zeros(_HEAD, dtype=torch.int64)
                self._group.recv([head], source, 0).wait()
                number, length, width = head.tolist()
                if number == _STOPPED:
                    self._mailbox.put(Rows(None))
                    continue
                assert length == num_rows, f"{length} rows instead of {num_rows}"
                rows = torch.empty(length, width, dtype=_DTYPES[number])
                self._group.recv([rows.view(torch.uint8)], source, 0).wait()
            except RuntimeError as error:
                self._mailbox.put(Broken(source, str(error)))
                return
            self._mailbox.put(Rows(rows))


@dataclass(frozen=True)
class Joined:
    """Connections to all ranks."""

    group: Any


@dataclass(frozen=True)
class Rows:
    """Rows that arrived; None if the pass was stopped."""

    rows: Tensor | None


def make_group(store: SharedStore, rank: int, size: int, host: str) -> Any:
    """Connect all ranks; every rank must call this at the same time.

    Args:
        store: entries that all ranks share.
        rank: rank of this process.
        size: number of ranks.
        host: address of this machine by which the other ranks reach it.

    Raises:
        RuntimeError: a rank was lost, or its address cannot be reached.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _FOREVER
    options._threads = 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def connect_group(
    store: SharedStore, rank: int, size: int, host: str, mailbox: Mailbox, verdict: Callable[[object], Exception]
) -> Any:
    """Connect all ranks, and hear of lost ones meanwhile.

    Args:
        store: entries that all ranks share.
        rank: rank of this process.
        size: number of ranks.
        host: address of this machine by which the other ranks reach it.
        mailbox: receives `Joined`, and what else comes.
        verdict: returns the error for anything else.

    Raises:
        WorkerUnreachableError: the machines cannot reach each other.
        Exception: the verdict.
    """

    def join() -> None:
        try:
            mailbox.put(Joined(make_group(store, rank, size, host)))
        except RuntimeError as error:
            mailbox.put(Broken(rank, str(error)))

    Thread(join).start()
    until, answers = time.monotonic() + _JOINING_S, list[object]()
    try:
        item = mailbox.get(timeout=_JOINING_S)
        # A worker may have loaded its layers before this rank sees that all are connected. And the reason for a broken
        # connection may follow.
        while isinstance(item, Broken) or (isinstance(item, Arrived) and item.is_answer):
            answers += [item] if isinstance(item, Arrived) else []
            item = mailbox.get(timeout=max(until - time.monotonic(), 0))
    except Empty:
        raise WorkerUnreachableError(
            f"the machines cannot reach each other: {host} got no connections of all others",
            hint="allow connections between all machines, on all ports",
        ) from None
    if not isinstance(item, Joined):
        raise verdict(item)
    for each in answers:
        mailbox.put(each)
    return item.group


def next_item(mailbox: Mailbox, look: Callable[[], None]) -> Any:
    """Wait for the next item of a mailbox, and call `look` now and then meanwhile."""
    while True:
        try:
            return mailbox.get(timeout=_LOOK_S)
        except Empty:
            look()
