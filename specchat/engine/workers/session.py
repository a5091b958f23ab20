"""A worker's side: requests of rank 0, and passes over the layers that it was given."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any, NoReturn, Protocol

from specchat.engine.workers.connection import PATIENCE_S, Arrived, Connection, Lost, Mailbox
from specchat.engine.workers.crew import versions
from specchat.engine.workers.messages import counter_values, follow, layout_of
from specchat.engine.workers.models import PartModel
from specchat.engine.workers.route import Route
from specchat.engine.workers.rows import Broken, RowExchange, Rows, SharedStore, connect_group, next_item
from specchat.engine.workers.wire import Channel, ConnectionEndedError, Message, accept
from specchat.errors import LostWorkerError, SpecchatError, WrongTokenError, is_lack_of_memory


class Host(Protocol):
    """What a worker's machine provides; see `loading.worker`."""

    def figures(self, values: Message) -> Mapping[str, Any]:
        """Return the memory and the speeds of this machine."""

    def open(self, values: Message) -> Mapping[str, Any]:
        """Open a model, and return the digest of its weights."""

    def load(self, values: Message, route: Route) -> PartModel:
        """Load the layers of this rank of the model that was opened."""

    def release(self) -> None:
        """Free everything that was opened or loaded."""


class Session:
    """The requests of one connection.

    Args:
        channel: connection to rank 0.
        host: provides models and figures.

    Attributes:
        has_loaded: whether layers were loaded, so that the other ranks need this one.
    """

    def __init__(self, channel: Channel, host: Host) -> None:
        self._host = host
        self._mailbox: Mailbox = Mailbox()
        self._store = SharedStore(self._tell_entry)
        self._stopped = 0
        self._passing: tuple[int, threading.Event] = 0, threading.Event()
        self._lock = threading.Lock()
        self._exchange: RowExchange | None = None
        self._model: PartModel | None = None
        self.has_loaded = False
        self._there = channel.there
        self._connection = Connection(channel, 0, self._mailbox, self._take)

    def run(self) -> None:
        """Do what is asked until the other end says goodbye.

        Raises:
            LostWorkerError: another rank was lost.
            Exception: the error of this rank, of which the others have been told.
        """
        try:
            while (message := self._next())["type"] != "bye":
                self._do(message)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connections and free the layers."""
        self._store.end()
        if self._model is not None:
            self._model.close()
            self._model = None
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        self._connection.close()
        self._host.release()

    def _do(self, message: Message) -> None:
        if message["type"] == "pass":
            self._pass(message)
            return
        try:
            match message["type"]:
                case "hello":
                    answer: Mapping[str, Any] = {"versions": versions()}
                case "echo":
                    answer = {}
                case "figures":
                    answer = self._host.figures(message)
                case "open":
                    answer = self._host.open(message)
                case _:
                    answer = self._load(message)
        except SpecchatError as error:
            if isinstance(error, LostWorkerError):
                raise
            kind = type(error).__name__
            self._connection.send({"type": "refused", "error": kind, "message": error.message, "hint": error.hint})
        except Exception as error:
            self._connection.send({"type": "failed", "why": words_of(error)})
            raise
        else:
            self._connection.send({"type": "done", **answer})

    def _load(self, message: Message) -> Mapping[str, Any]:
        rank, size, owner = message["rank"], message["size"], message["owner"]
        group = connect_group(self._store, rank, size, self._connection.channel.here, self._mailbox, self._verdict)
        self.has_loaded = True
        self._exchange = RowExchange(group, self._mailbox, self._listen)
        self._model = self._host.load(message, Route(owner, rank, self._exchange))
        return {"num_bytes": self._model.nbytes}

    def _pass(self, message: Message) -> None:
        assert self._model is not None, "a model is loaded before passes"
        with self._lock:
            self._passing = message["number"], threading.Event()
            if message["number"] <= self._stopped:
                self._passing[1].set()
        try:
            follow(self._model.cache, message["changes"])
            self._model.take_part(layout_of(message["layout"]), message["microbatches"], self._passing[1])
            self._connection.send({"type": "used", "totals": counter_values(self._model.own_counters())})
        except LostWorkerError:
            raise
        except Exception as error:
            self._connection.send({"type": "failed", "why": words_of(error)})
            raise

    def _next(self) -> Message:
        item = self._mailbox.get()
        if isinstance(item, Arrived) and item.message["type"] != "end":
            return item.message
        raise self._verdict(item)

    def _listen(self) -> Rows:
        item = next_item(self._mailbox, lambda: None)
        if isinstance(item, Rows):
            return item
        raise self._verdict(item)

    def _verdict(self, item: object) -> LostWorkerError:
        """Return the error that says who was lost; rank 0 knows it if rows of another worker broke off."""
        if isinstance(item, Broken):
            self._connection.send({"type": "suspect", "rank": item.rank})
            reason = f"rank {item.rank} does not send its rows any more"
            while isinstance(item, Broken | Rows):
                try:
                    item = self._mailbox.get(timeout=2 * PATIENCE_S)
                except Empty:
                    break
        if isinstance(item, Lost):
            return LostWorkerError(f"the machine {self._there} {item.reason}")
        if isinstance(item, Arrived) and item.message["type"] == "end":
            return LostWorkerError(item.message["why"])
        if isinstance(item, Arrived) and item.message["type"] == "bye":
            return LostWorkerError(f"the machine {self._there} has ended the work")
        return LostWorkerError(reason)

    def _take(self, message: Message) -> bool:
        if message["type"] == "entry":
            self._store.put(message["key"], message["value"])
        elif message["type"] == "stop":
            with self._lock:
                self._stopped = message["number"]
                if self._passing[0] <= self._stopped:
                    self._passing[1].set()
        else:
            return False
        return True

    def _tell_entry(self, key: str, value: str) -> None:
        self._connection.send({"type": "entry", "key": key, "value": value})


def serve_sessions(
    listening: socket.socket, token: bytes, host: Host, tell: Callable[[str], None], warn: Callable[[str], None]
) -> NoReturn:
    """Serve one machine after the other, until a rank is lost whose layers were loaded.

    Args:
        listening: socket that listens.
        token: token that the other machine must know.
        host: provides models and figures.
        tell: receives one line about each machine that has come or gone.
        warn: receives one line about each machine that was refused.

    Raises:
        LostWorkerError: another rank was lost.
        Exception: the error of this rank.
    """
    while True:
        connected, (there, *_) = listening.accept()
        try:
            channel = accept(connected, token)
        except WrongTokenError:
            connected.close()
            warn(f"refused {there}: it has another token")
            continue
        except (OSError, ConnectionEndedError):
            connected.close()
            continue
        session = Session(channel, host)
        try:
            session.run()
        except LostWorkerError:
            if session.has_loaded:
                raise
        if session.has_loaded:
            tell(f"the work for {there} has ended")


def words_of(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, SpecchatError):
        return error.message
    if is_lack_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
