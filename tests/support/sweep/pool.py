"""Trials in processes of their own, a few at a time: a model may crash, hang or ask for all memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from support.sweep.trial import Outcome, try_type

_LONGEST_S = 300.0
_MOST_BYTES = 8 << 30  # private memory of one trial
_FORK = multiprocessing.get_context("fork")


class _Child:
    """A trial in a forked process."""

    def __init__(self, kind: str, home: Path) -> None:
        self.kind = kind
        self.results, sender = _FORK.Pipe(duplex=False)
        self.begin = time.monotonic()
        self._process = _FORK.Process(target=_report, args=(kind, home / kind, sender))
        self._process.start()
        sender.close()

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.begin > _LONGEST_S

    def end(self) -> Outcome:
        """The outcome of a trial that has reported, has died, or is late."""
        outcome = None
        if self.results.poll():
            with suppress(EOFError):
                outcome = self.results.recv()
        if outcome is None and self.is_late:
            self._process.kill()
            outcome = Outcome(self.kind, "broken", f"takes longer than {_LONGEST_S:.0f} s")
        self._process.join()
        return outcome or Outcome(self.kind, "broken", f"the process ended with {self._process.exitcode}")


def run(kinds: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """Try types, `jobs` at a time; yields the outcomes in the order in which they come."""
    waiting = list(kinds)[::-1]
    children: dict[Connection, _Child] = {}
    with tempfile.TemporaryDirectory(prefix="specchat-sweep-") as home:
        os.environ["SPECCHAT_CACHE_DIR"] = f"{home}/cache"
        while waiting or children:
            while waiting and len(children) < jobs:
                child = _Child(waiting.pop(), Path(home))
                children[child.results] = child
            ready = wait(list(children), timeout=1)
            for results in [key for key, child in children.items() if key in ready or child.is_late]:
                yield children.pop(results).end()


def _report(kind: str, folder: Path, sender: Connection) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # transformers warns about tiny and default values
        os.dup2(nothing, output)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sender.send(try_type(kind, folder))
