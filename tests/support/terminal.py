"""A real terminal around a program: a pty, and a screen that understands what is written to it."""

import os
import sys
import time

import pexpect
import pyte

from support.delays import python_path
from support.forked import TESTS, Forked

_ABOUT_OTHER_TERMINALS = {"NO_COLOR", "PROMPT_TOOLKIT_NO_CPR", "COLUMNS", "LINES"}
_SETTLED_S = 0.03
_PATIENCE_S = 60  # what is waited for comes much sooner, unless the machine is busy with other things


class Terminal:
    """Runs a Python module; `screen` is what a person would see.

    Args:
        module: run with -m; what is not the program itself is forked, which is quicker.
        arguments: its command line.
        columns, rows: size.
        environment: added to this process's own.
    """

    def __init__(self, module, *arguments, columns=100, rows=30, environment=None):
        environment = {
            **{k: v for k, v in os.environ.items() if k not in _ABOUT_OTHER_TERMINALS},
            "TERM": "xterm-256color",
            "PYTHONPATH": python_path(TESTS, TESTS.parent),
            **(environment or {}),
        }
        if module == "specchat":
            command = ["-m", module, *arguments]
            self._process = pexpect.spawn(sys.executable, command, dimensions=(rows, columns), env=environment)
        else:
            self._process = Forked(module, arguments, (rows, columns), environment)
        self._process.delaybeforesend = None
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._screen.write_process_input = self._process.send  # answers to the program's questions
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.close(force=True)

    @property
    def lines(self):
        return [line.rstrip() for line in self._screen.display]

    @property
    def screen(self):
        return "\n".join(self.lines).rstrip()

    @property
    def cursor_line(self):
        return self.lines[self._screen.cursor.y]

    @property
    def scrollback(self):
        """Everything that was ever on the screen and is final, from the first line on."""
        above = [
            "".join(line[x].data for x in range(self._screen.columns)).rstrip() for line in self._screen.history.top
        ]
        return "\n".join([*above, self.screen])

    @property
    def columns(self):
        return self._screen.columns

    def cells(self, row):
        """The characters of a row of the screen, with their colours."""
        return [self._screen.buffer[row][column] for column in range(self._screen.columns)]

    def resize(self, columns, rows):
        self._screen.resize(rows, columns)
        self._process.setwinsize(rows, columns)

    def send(self, keys):
        self._process.send(keys)

    def kill(self, signal):
        self._process.kill(signal)

    def wait_for(self, condition, timeout_s=_PATIENCE_S):
        """Until `condition`, a text or a function of this terminal, is on the screen."""
        holds = condition if callable(condition) else lambda terminal: condition in terminal.screen
        end = time.monotonic() + timeout_s
        runs = True
        while not holds(self):
            assert runs and time.monotonic() < end, f"waited in vain for {condition!r} on:\n{self.screen}"
            runs = self._read()

    def wait_for_prompt(self):
        """Until the cursor stands behind an empty prompt, and nothing more comes."""
        self.wait_for(lambda terminal: terminal.cursor_line == ">")
        self._read(_SETTLED_S)

    def hang_up(self):
        """Closes the terminal under the program; returns how the program ends."""
        self._process.hang_up()
        self._process.wait()
        return self._process.exitstatus if self._process.signalstatus is None else -self._process.signalstatus

    def exit_code(self, timeout_s=_PATIENCE_S):
        end = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < end, f"does not end:\n{self.screen}"
        self._process.wait()
        return self._process.exitstatus if self._process.signalstatus is None else -self._process.signalstatus

    def _read(self, timeout_s=0.1):
        """Takes what there is; False once there will be nothing more."""
        try:
            data = self._process.read_nonblocking(65536, timeout=timeout_s)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self.feed(data)
        return True

    def feed(self, data):
        """Shows what the program wrote."""
        self._stream.feed(data)
