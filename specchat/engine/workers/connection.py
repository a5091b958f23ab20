"""A connection with signs of life: threads send and receive them, however long a pass takes.

A closed connection is noticed at once, and a process that was stopped after the time of `PATIENCE_S`. A pass that
reads slowly from a disk is no reason: the threads of this file go on beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from specchat.engine.workers.wire import Channel, ConnectionEndedError, Message
from specchat.threads import Thread

# Seconds between signs of life, and without one until an end counts as lost.
BEAT_S = 0.5
PATIENCE_S = 4.0


@dataclass(frozen=True)
class Arrived:
    """A message of another rank."""

    rank: int
    message: Message

    @property
    def is_answer(self) -> bool:
        """Whether this answers a request."""
        return self.message["type"] in ("done", "refused")


@dataclass(frozen=True)
class Lost:
    """The end of a connection to another rank, in words."""

    rank: int
    reason: str


# What the main thread of a process waits for: messages, ends of connections, and rows (rows.py).
Mailbox = SimpleQueue[Any]


class Connection:
    """A channel whose messages arrive in a mailbox.

    Args:
        channel: connection after the handshake.
        rank: rank of the other end.
        mailbox: receives `Arrived` and `Lost`.
        take: handles a message at once, in the receiving thread; returns False to leave it to the mailbox.
    """

    def __init__(
        self, channel: Channel, rank: int, mailbox: Mailbox, take: Callable[[Message], bool] = lambda _: False
    ) -> None:
        self.channel = channel
        self.rank = rank
        self._mailbox = mailbox
        self._take = take
        self._closing = threading.Event()
        self.lost: Lost | None = None
        channel.set_patience(PATIENCE_S)
        self._threads = [Thread(self._receive), Thread(self._beat)]
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        """Send a message; one that cannot be sent is reported by the receiving thread."""
        try:
            self.channel.send(message)
        except OSError:
            self.channel.close()

    def close(self) -> None:
        """Close the connection, and end its threads."""
        self._closing.set()
        self.channel.close()
        for thread in self._threads:
            thread.join()

    def _receive(self) -> None:
        while True:
            try:
                message = self.channel.receive()
            except TimeoutError:
                self._lose(f"has not answered for {PATIENCE_S:.0f} s")
                return
            except (OSError, ConnectionEndedError):
                self._lose("is gone: the connection was closed")
                return
            if message.get("type") != "beat" and not self._take(message):
                self._mailbox.put(Arrived(self.rank, message))

    def _lose(self, reason: str) -> None:
        if not self._closing.is_set():
            self.lost = Lost(self.rank, reason)
            self._mailbox.put(self.lost)

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_S):
            try:
                self.channel.send({"type": "beat"})
            except OSError:  # the receiving thread says so
                return
