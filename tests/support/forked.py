"""Programs on a pty, forked from one that has imported everything by then: a start costs a tenth of a new Python.

Run with `-m` it is that one: it reads orders from the socket that is its stdin, one at a time.
"""

import atexit
import fcntl
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from functools import cache
from pathlib import Path

from pexpect import fdpexpect

from support.alone import wait_until_alone
from support.delays import python_path

TESTS = Path(__file__).parents[1]
_ORDER_BYTES = 1 << 20


class Forked(fdpexpect.fdspawn):
    """The program, as `pexpect.spawn` has it.

    Args:
        module: run as with -m.
        arguments: its command line.
        dimensions: rows and columns of the terminal.
        env: its whole environment.
    """

    def __init__(self, module, arguments, dimensions, env):
        ours, theirs = pty.openpty()
        super().__init__(ours)
        self.setwinsize(*dimensions)
        self._nursery = _nursery()
        order = {"module": module, "arguments": arguments, "env": env}
        self._pid = self._ask({"fork": order}, [theirs])
        os.close(theirs)
        self._has_ended = False

    def setwinsize(self, rows, columns):
        fcntl.ioctl(self.child_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def kill(self, number):
        os.kill(self._pid, number)

    def hang_up(self):
        """Closes the terminal, as its window does."""
        os.close(self.child_fd)
        self.child_fd = os.open(os.devnull, os.O_RDWR)

    def wait(self):
        if not self._has_ended:
            status = self._ask({"wait": self._pid})
            self.exitstatus = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
            self.signalstatus = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            self._has_ended = True

    def close(self, force=True):
        if not self._has_ended:
            self.kill(signal.SIGKILL)
            self.wait()
        super().close()

    def _ask(self, order, files=()):
        socket.send_fds(self._nursery, [json.dumps(order).encode()], files)
        return json.loads(self._nursery.recv(_ORDER_BYTES))


@cache
def _nursery():
    """The socket to the one who forks; closed with this process, and that ends it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = python_path(TESTS, TESTS.parent)
    process = subprocess.Popen([sys.executable, "-m", __name__], stdin=theirs, env=os.environ | {"PYTHONPATH": path})
    theirs.close()

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# --- the one who forks -------------------------------------------------------------------------------------------


def _serve(orders):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the tests' own terminal is for the tests
    wait_until_alone()
    while True:
        data, files, _, _ = socket.recv_fds(orders, _ORDER_BYTES, 1)
        if not data:
            return None
        order = json.loads(data)
        if "wait" in order:
            answer = os.waitpid(order["wait"], 0)[1]
        else:
            answer = os.fork()
            if not answer:
                orders.close()
                return _become(files[0], **order["fork"])
            os.close(files[0])
        orders.send(json.dumps(answer).encode())


def _become(terminal, module, arguments, env):
    """Makes this process what `python -m module` would be on that terminal; returns what runs it."""
    import runpy

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    os.close(terminal)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stdout, sys.stderr = (open(n, m, encoding="utf-8") for n, m in enumerate("rww"))  # noqa: SIM115, PTH123
    sys.argv = [module, *arguments]
    return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)


def _import_all():
    """What an interactive chat without a model imports; nothing that looks at the environment while it is imported."""
    from importlib import import_module

    names = ("cli.run", "loading.engine", "chat.session", "chat.transcript", "ui.repl", "ui.chat_view", "ui.prompt")
    for name in ("support.fake_engine", "pyte", *(f"specchat.{each}" for each in names)):
        import_module(name)
    with suppress(ModuleNotFoundError):  # what Typer imports when it parses, in its newer versions
        import_module("typer._adapters")


if __name__ == "__main__":
    _import_all()
    run = _serve(socket.socket(fileno=os.dup(0)))
    if run is not None:
        run()
