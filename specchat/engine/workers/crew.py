"""The workers of a model, as rank 0 sees them: requests, passes, and the end of all if one of them is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from queue import Empty
from typing import Any

from specchat.closing import Closeable
from specchat.engine.streaming.base import DeviceCounters, StreamCounters
from specchat.engine.workers.connection import PATIENCE_S, Arrived, Connection, Lost, Mailbox
from specchat.engine.workers.messages import counters_of
from specchat.engine.workers.rows import Broken, RowExchange, Rows, SharedStore, connect_group, next_item
from specchat.engine.workers.wire import Channel, Message, connect, shown
from specchat.errors import LostWorkerError, SpecchatError, UsageError, VersionMismatchError
from specchat.version import __version__

_UNUSED = DeviceCounters(StreamCounters(0, 0.0), 0.0)
_LIBRARIES = ("torch", "transformers")
_RESTART = "start the workers again; the chat is saved up to its last answer: specchat run -c"


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all machines; the build of a library may differ."""
    return {"specchat": __version__, **{name: version(name).partition("+")[0] for name in _LIBRARIES}}


class Crew(Closeable):
    """Connections to all workers, in the order of their ranks.

    Args:
        addresses: host and port of each worker; ranks begin at 1.
        token: token that all machines know.

    Raises:
        WorkerUnreachableError: a worker does not answer.
        WrongTokenError: a worker has another token.
        VersionMismatchError: a worker has other versions.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], token: bytes) -> None:
        self._mailbox: Mailbox = Mailbox()
        self._connections: list[Connection] = []
        self._names = ["", *(shown(*address) for address in addresses)]
        self._exchange: RowExchange | None = None
        self._store = SharedStore(self._tell_entry)
        self._number = 0
        self._is_stopped = True
        self._cancel: threading.Event | None = None
        self._lost: LostWorkerError | None = None
        self._used: dict[int, DeviceCounters] = {}
        try:
            for rank, (host, port) in enumerate(addresses, 1):
                channel = connect(host, port, token)
                self._connections.append(Connection(channel, rank, self._mailbox, partial(self._take, rank)))
            self._check_versions()
            self._check_addresses([each.channel for each in self._connections])
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """Number of ranks, this one included."""
        return len(self._names)

    def name(self, rank: int) -> str:
        """Return a worker's name in messages."""
        return f"worker {rank} ({self._names[rank]})"

    def ask(self, what: str, requests: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Ask every worker for something, and wait for all answers.

        Args:
            what: type of the request.
            requests: values for each worker.

        Raises:
            SpecchatError: a worker refuses; the error is the worker's own, with its name.
            LostWorkerError: a worker is lost.
        """
        self.begin(what, requests)
        return self.answers()

    def echo_s(self, rank: int, count: int) -> float:
        """Return the seconds until a worker has answered a message of `count` characters."""
        begin = time.perf_counter()
        self._connections[rank - 1].send({"type": "echo", "text": "x" * count})
        self._answers([rank])
        return time.perf_counter() - begin

    def begin(self, what: str, requests: Sequence[Mapping[str, Any]]) -> None:
        """Ask every worker for something; see `ask`."""
        for connection, values in zip(self._connections, requests, strict=True):
            connection.send({"type": what, **values})

    def answers(self) -> list[Message]:
        """Wait for the answers of all workers; see `ask`."""
        return self._answers([each.rank for each in self._connections])

    def _answers(self, ranks: Sequence[int]) -> list[Message]:
        found: dict[int, Message] = {}
        while found.keys() < set(ranks):
            item = self._mailbox.get()
            if isinstance(item, Arrived) and item.message["type"] == "done":
                found[item.rank] = item.message
            elif isinstance(item, Arrived) and item.message["type"] == "refused":
                raise self._refusal(item)
            else:
                raise self._verdict(item)
        return [found[rank] for rank in sorted(found)]

    def join(self) -> RowExchange:
        """Connect all ranks for rows; the workers have been asked to do the same.

        Raises:
            WorkerUnreachableError: the machines cannot reach each other.
            LostWorkerError: a worker is lost.
        """
        host = self._connections[0].channel.here
        group = connect_group(self._store, 0, self.size, host, self._mailbox, self._verdict)
        self._exchange = RowExchange(group, self._mailbox, self._listen)
        return self._exchange

    def begin_pass(self, values: dict[str, Any], cancel: threading.Event | None) -> None:
        """Begin a pass on all workers; see `Announcer`.

        Raises:
            LostWorkerError: a worker is lost.
        """
        self.check()
        self._number += 1
        self._cancel, self._is_stopped = cancel, False
        for connection in self._connections:
            connection.send({"type": "pass", "number": self._number, **values})

    def stop_pass(self) -> None:
        """Stop the pass on all workers; see `Announcer`."""
        if not self._is_stopped:
            self._is_stopped = True
            for connection in self._connections:
                connection.send({"type": "stop", "number": self._number})

    def check(self) -> None:
        """Check that no worker was lost since the last pass.

        Raises:
            LostWorkerError: one was.
        """
        if self._lost is not None:
            raise self._lost
        try:
            item = self._mailbox.get_nowait()
        except Empty:
            return
        raise self._verdict(item)

    def counters(self) -> tuple[DeviceCounters, ...]:
        """Return the totals of each worker, as it has told them with its last pass."""
        return tuple(self._used.get(rank, _UNUSED) for rank in range(1, self.size))

    def close(self) -> None:
        """End the work of all workers, and close the connections."""
        for connection in self._connections:
            connection.send({"type": "bye"})
        self._close_all()

    def _close_all(self) -> None:
        self._store.end()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _check_versions(self) -> None:
        own = versions()
        requests = [{"versions": own}] * len(self._connections)
        for rank, answer in enumerate(self.ask("hello", requests), 1):
            others = answer["versions"]
            if different := [name for name in own if others.get(name) != own[name]]:
                there = ", ".join(f"{name} {others.get(name)}" for name in different)
                here = ", ".join(f"{name} {own[name]}" for name in different)
                raise VersionMismatchError(
                    f"{self.name(rank)} has {there}, but this machine has {here}",
                    hint="install the same versions on all machines",
                )

    def _check_addresses(self, channels: Sequence[Channel]) -> None:
        """Refuse workers that cannot reach each other, because one was named by its loopback address."""
        inside = [each.there.startswith("127.") or each.there == "::1" for each in channels]
        if any(inside) and not all(inside):
            raise UsageError(
                f"{self.name(1 + inside.index(True))} cannot be reached by the other workers",
                hint="name every worker by its address in the network",
            )

    def _refusal(self, item: Arrived) -> SpecchatError:
        """Return the error of a worker that refuses."""
        kind = next((each for each in _kinds(SpecchatError) if each.__name__ == item.message["error"]), SpecchatError)
        return kind(f"{self.name(item.rank)}: {item.message['message']}", item.message["hint"])

    def _take(self, rank: int, message: Message) -> bool:
        if message["type"] == "used":
            self._used[rank] = counters_of(message["totals"])
            return True
        if message["type"] != "entry":
            return False
        self._store.put(message["key"], message["value"])
        self._tell_entry(message["key"], message["value"])
        return True

    def _tell_entry(self, key: str, value: str) -> None:
        for connection in self._connections:
            connection.send({"type": "entry", "key": key, "value": value})

    def _listen(self) -> Rows:
        if self._lost is not None:
            raise self._lost
        item = next_item(self._mailbox, self._look)
        if isinstance(item, Rows):
            return item
        raise self._verdict(item)

    def _look(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            self.stop_pass()

    def _verdict(self, item: object) -> LostWorkerError:
        """Return the error that names the worker that was lost first, and end all others.

        A worker that waits for rows of another one hears of its end, too, and may say so first. So wait for the
        connection to the other one to tell.
        """
        if self._lost is not None:
            return self._lost
        until = time.monotonic() + PATIENCE_S + 1
        suspect, reason = 0, ""
        while not reason:
            match item:
                case Lost():
                    suspect, reason = item.rank, item.reason
                case Arrived() if item.message["type"] == "failed":
                    suspect, reason = item.rank, f"failed: {item.message['why']}"
                case Arrived() if item.message["type"] == "suspect":
                    suspect = item.message["rank"] or item.rank
                case Broken():
                    suspect = item.rank
            if not reason:
                try:
                    item = self._mailbox.get(timeout=max(until - time.monotonic(), 0))
                except Empty:
                    reason = "does not send its rows any more"
        self._lost = LostWorkerError(f"{self.name(suspect)} {reason}", hint=_RESTART)
        for connection in self._connections:
            connection.send({"type": "end", "why": self._lost.message})
        self._close_all()
        return self._lost


def _kinds(kind: type[SpecchatError]) -> Iterator[type[SpecchatError]]:
    """Yield a kind of errors and all that belong to it."""
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)
