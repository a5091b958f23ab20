"""Workers on this machine for tests: processes forked from one that has imported everything and made no connections.

Connections of gloo have threads. A process that is forked beside them would wait for threads that it does not have.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
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
from specchat.engine.workers import connection, session
from specchat.engine.workers.models import PartModel
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
_ORDER_BYTES = 1 << 16


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

    def poll(self) -> int | None:
        """Its exit code, or None while it lives."""
        code: int | None = _ask(("poll", self.pid))
        return code

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        if self.poll() is None:
            self.kill()
            self.wait(10)


def start_worker(errors: Path, prepare: Callable[[], None] | None = None, model: str | None = None) -> Worker:
    """Fork a worker; `prepare`, a function of a module, runs in it first, and `model` has the files there."""
    listening = listening_socket(LOCAL, 0)
    pid = _ask(("start", prepare, errors, model), [listening.fileno()])
    address = LOCAL, listening.getsockname()[1]
    listening.close()
    return Worker(pid, address, errors)


@contextmanager
def crew(num_workers: int, folder: Path, prepare: Sequence[Callable[[], None] | None] = ()) -> Iterator[list[Worker]]:
    """Workers that live within the block."""
    steps = [*prepare, *[None] * (num_workers - len(prepare))]
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


# --- what a worker does first ------------------------------------------------------------------------------------


def watch_chunks(before: Callable[[], None]) -> None:
    """Call something in this process before a layer is computed."""
    run = PartModel._run_chunks

    def watched(self: PartModel, *arguments: Any) -> Any:
        before()
        return run(self, *arguments)

    PartModel._run_chunks = watched  # type: ignore[method-assign]


def compute_slowly() -> None:
    watch_chunks(lambda: time.sleep(0.02))


def fail_soon() -> None:
    left = iter(range(6))

    def count() -> None:
        if next(left, None) is None:
            raise MemoryError

    watch_chunks(count)


def take_a_second_and_be_impatient() -> None:
    connection.PATIENCE_S, connection.BEAT_S = 0.5, 0.05
    watch_chunks(lambda: time.sleep(1.0))


def be_another_version() -> None:
    session.versions = lambda: {"specchat": "0", "torch": "0", "transformers": "0"}  # type: ignore[assignment]


# --- the process that forks --------------------------------------------------------------------------------------


def _ask(order: tuple[Any, ...], files: Sequence[int] = ()) -> Any:
    socket.send_fds(_nursery(), [pickle.dumps(order)], files)
    return pickle.loads(_nursery().recv(_ORDER_BYTES))


@cache
def _nursery() -> socket.socket:
    """The socket to the process that forks; closed with this process, and that ends it."""
    random_model(make_config("llama"))  # imports what building a model imports, once for all workers
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        ours.close()
        try:
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()

    def end() -> None:
        ours.close()
        os.waitpid(pid, 0)

    atexit.register(end)
    return ours


def _serve(orders: socket.socket) -> None:
    ended: dict[int, int] = {}
    while True:
        data, files, _, _ = socket.recv_fds(orders, _ORDER_BYTES, 1)
        if not data:
            return
        name, *arguments = pickle.loads(data)
        if name == "start":
            answer: int | None = os.fork()
            if not answer:
                orders.close()
                _work(socket.socket(fileno=files[0]), *arguments)
            os.close(files[0])
        else:
            (pid,) = arguments
            found, status = (0, 0) if pid in ended else os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        orders.send(pickle.dumps(answer))


def _work(listening: socket.socket, prepare: Callable[[], None] | None, errors: Path, model: str | None) -> None:
    """Be a worker, and end this process."""
    try:
        out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        if prepare is not None:
            prepare()
        serve_sessions(listening, TOKEN, MachineHost(find_machine("cpu"), None, model, Quiet()), _tell, _tell)
    except SpecchatError as error:
        _tell(f"error: {error.message}")
    except BaseException as error:  # noqa: BLE001  the process must not go on as a test
        _tell(f"error: {type(error).__name__}: {error}")
    finally:
        os._exit(1)


def _tell(line: str) -> None:
    os.write(2, f"{line}\n".encode())
