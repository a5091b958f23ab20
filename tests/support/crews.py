"""Workers on this machine for tests: processes forked from this one, which has imported everything by then."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from specchat.engine.engine import Engine
from specchat.engine.workers.session import serve_sessions
from specchat.engine.workers.wire import listening_socket
from specchat.errors import SpecchatError
from specchat.hardware.probe import find_machine
from specchat.loading.engine import load_planned
from specchat.loading.request import WorkersChoice
from specchat.loading.worker import MachineHost
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from support.loading import Quiet
from support.tiny_models import make_config, random_model

TOKEN = b"a token of sixteen or more"
LOCAL = "127.0.0.1"


@dataclass
class Worker:
    """A forked worker.

    Attributes:
        pid: its process.
        address: where it listens.
        errors: file that its errors go to.
    """

    pid: int
    address: tuple[str, int]
    errors: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        if self.poll() is None:
            self.kill()
            self.wait(10)


def start_worker(errors: Path, prepare: Callable[[], None] = lambda: None, token: bytes = TOKEN) -> Worker:
    """Fork a worker; `prepare` runs in it first."""
    _import_all()
    listening = listening_socket(LOCAL, 0)
    address = LOCAL, listening.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        listening.close()
        return Worker(pid, address, errors)
    code = 1
    try:
        out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        prepare()
        host = MachineHost(find_machine("cpu"), None, None, Quiet())
        serve_sessions(listening, token, host, _tell, _tell)
    except SpecchatError as error:
        _tell(f"error: {error.message}")
    except BaseException as error:  # noqa: BLE001  the process must not go on as a test
        _tell(f"error: {type(error).__name__}: {error}")
    finally:
        os._exit(code)


@cache
def _import_all() -> None:
    """Import what building a model imports, once for all workers."""
    random_model(make_config("llama"))


def _tell(line: str) -> None:
    os.write(2, f"{line}\n".encode())


@contextmanager
def crew(num_workers: int, folder: Path, prepare: Sequence[Callable[[], None]] = ()) -> Iterator[list[Worker]]:
    """Workers that live within the block."""
    steps = [*prepare, *[lambda: None] * (num_workers - len(prepare))]
    found = [start_worker(folder / f"worker{number}.txt", steps[number]) for number in range(num_workers)]
    try:
        yield found
    finally:
        for worker in found:
            worker.end()


def with_owners(plan: Plan, owner: Sequence[int], **places: Any) -> Plan:
    """The plan with its layers on this machine, which is 0, and on workers."""
    devices = ("cpu", *(f"worker {rank}" for rank in range(1, max(owner) + 1)))
    return replace(plan, placement=replace(plan.placement, owner=tuple(owner), devices=devices, apart=True, **places))


def choice_of(workers: Sequence[Worker], token: bytes = TOKEN) -> WorkersChoice:
    return WorkersChoice(tuple(each.address for each in workers), token)


def load_with(workers: Sequence[Worker], plan: Plan, target: ModelSource, draft: ModelSource | None) -> Engine:
    """An engine whose layers are on these workers, too."""
    return load_planned(target, draft, plan, Quiet(), choice_of(workers))
