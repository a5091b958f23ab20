"""A process that has imported everything and forks for each run of the command line, which then takes no seconds.

Run with `-m`, it reads orders from the socket that is its stdin, one at a time. Limits of memory and file size, file
systems that are full or read-only, and signals apply to the forked process only.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.alone import wait_until_alone

TESTS = Path(__file__).parents[2]
_ORDER_BYTES = 1 << 20
_NEW_NAMESPACE, _READ_ONLY, _PRIVATE, _RECURSIVE = 0x20000, 1, 1 << 18, 1 << 14
# What runs import that are refused before a model is looked at.
_LIGHT = ("specchat.cli.run", "specchat.cli.sessions_command", "specchat.cli.models_command", "specchat.ui.console")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMITS = {"file bytes": resource.RLIMIT_FSIZE, "address bytes": resource.RLIMIT_AS, "files": resource.RLIMIT_NOFILE}


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, minus the signal that killed it, or None if it did not end in time."""

    code: int | None
    out: bytes
    err: bytes
    seconds: float


class Server:
    """The forking process, as long as it lasts.

    Args:
        cache: folder of what is found out about models.
        answers: whether it answers once before it forks, because the libraries import much on demand.
    """

    def __init__(self, cache: Path, *, answers: bool) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "SPECCHAT_CACHE_DIR": str(cache)}
        # A forked process has one thread, and would wait for ever for those of a pool.
        environment = os.environ | paths | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", __name__, *(["answers"] if answers else [])]
        self._process = subprocess.Popen(command, stdin=theirs, env=environment)
        theirs.close()

    def run(self, folder: Path, arguments: Sequence[str], **order: Any) -> Ended:
        """Run `specchat` in a folder that is empty or holds what the run needs.

        Args:
            folder: receives what the run writes on stdout and stderr.
            arguments: command line; lone surrogates stand for bytes that are not UTF-8.
            order: fields of `_Order`.
        """
        self._socket.send(json.dumps({"folder": str(folder), "arguments": list(arguments), **order}).encode())
        answer = json.loads(self._socket.recv(_ORDER_BYTES) or '{"code": "the server has ended", "seconds": 0}')
        out, err = (file.read_bytes() if (file := folder / name).exists() else b"" for name in ("stdout", "stderr"))
        return Ended(answer["code"], out, err, answer["seconds"])

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


# --- the process that forks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """What to run.

    Attributes:
        folder: working directory, home of the streams.
        arguments: command line.
        env: variables that are set; None removes one.
        stdin: file that becomes stdin, or None.
        closed: descriptors that are closed.
        limits: limits by name.
        mounts: file systems in memory by path, with their options; "ro" mounts read-only what is there.
        signals: signals to send, each with its moment in seconds after the start.
        constants: values of modules by full name, which are changed.
        timeout_s: time after which the run is killed.
        uid: user to become, or None.
        clock_step_s: seconds by which the wall clock jumps each time that it is read.
    """

    folder: str
    arguments: Sequence[str]
    env: Mapping[str, str | None] = ()  # type: ignore[assignment]
    stdin: str | None = None
    closed: Sequence[int] = ()
    limits: Mapping[str, int] = ()  # type: ignore[assignment]
    mounts: Mapping[str, str] = ()  # type: ignore[assignment]
    signals: Sequence[tuple[float, int]] = ()
    constants: Mapping[str, Any] = ()  # type: ignore[assignment]
    timeout_s: float = 30.0
    uid: int | None = None
    clock_step_s: float = 0.0


def serve(orders: socket.socket) -> None:
    """Answer orders until the other end closes; return in the forked process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait_until_alone()
    while data := orders.recv(_ORDER_BYTES):
        order = _Order(**json.loads(data))
        begin = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the forked process is what it shall be
        child = os.fork()
        if not child:
            orders.close()
            _become(order)
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = _wait(child, order, begin)
        orders.send(json.dumps({"code": code, "seconds": time.monotonic() - begin}).encode())
    os._exit(0)


def _wait(child: int, order: _Order, begin: float) -> int | None:
    signals = sorted(order.signals)
    pause_s = 0.0005 if signals else 0.002
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic() - begin
        while signals and signals[0][0] <= now:
            os.kill(child, signals.pop(0)[1])
        if now > order.timeout_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause_s)


def _become(order: _Order) -> None:
    """Make this process what the shell would have started."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    os.chdir(order.folder)
    for path, options in dict(order.mounts).items():
        _mount(path, options)
    for number, name in ((0, order.stdin or os.devnull), (1, "stdout"), (2, "stderr")):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    for number in order.closed:
        os.close(number)
    opened: list[Any] = [None if n in order.closed else os.fdopen(n, m, encoding="utf-8") for n, m in enumerate("rww")]
    sys.stdin, sys.stdout, sys.stderr = opened
    for name, value in dict(order.env).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for name, number in dict(order.constants).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, number)
    random.seed()
    _point_to_hub()
    if order.clock_step_s:
        _let_clock_jump(order.clock_step_s)
    for name, most in dict(order.limits).items():
        resource.setrlimit(LIMITS[name], (most, most))
    if order.uid is not None:
        os.setgroups([])
        os.setgid(order.uid)
        os.setuid(order.uid)
    sys.argv = ["specchat", *order.arguments]


def _let_clock_jump(step_s: float) -> None:
    """Let Python's wall clock jump each time that it is read; the system's own clock belongs to everybody."""
    clock, reads = time.time, itertools.count(1)
    time.time = lambda: clock() + step_s * next(reads)
    time.time_ns = lambda: int(time.time() * 1e9)


def _point_to_hub() -> None:
    """Give huggingface_hub the environment that it read when it was imported."""
    from huggingface_hub import constants

    url = os.environ.get("HF_ENDPOINT")
    if url is not None:
        constants.ENDPOINT = url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]
        constants.HF_TOKEN_PATH = os.environ["HF_HUB_CACHE"] + "/token"
        constants.HF_HUB_OFFLINE = False


def _mount(path: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACE) or libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    Path(path).mkdir(exist_ok=True)
    flags = _READ_ONLY if options == "ro" else 0
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, b"" if options == "ro" else options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


def may_mount() -> bool:
    """Return whether this system lets a process mount file systems of its own."""
    child = os.fork()
    if not child:
        ended = 1
        try:
            _mount(os.environ.get("TMPDIR", "/tmp"), "size=64k")
            ended = 0
        finally:
            os._exit(ended)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    from specchat.__main__ import main as run
    from specchat.cli.app import run_command_line

    for name in _LIGHT:
        importlib.import_module(name)
    orders = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    if "answers" in sys.argv:
        arguments = ("--device", "cpu", "--vram", "1GiB", "--draft", "none", "--max-tokens", "2", "--no-save", "-q")
        os.dup2(0, 1)
        assert run_command_line(["run", "demo", "Tell me", *arguments]) == 0
    serve(orders)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
