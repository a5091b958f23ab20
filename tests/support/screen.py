"""A terminal in this process: a stream to write to, and the screen that it would show."""

import io

import pyte


class ScreenStream(io.TextIOBase):
    """What is written is shown on `screen`, as a terminal behind a pty shows it.

    Args:
        columns, rows: size; the environment's COLUMNS and LINES must say the same.
    """

    encoding = "utf-8"

    def __init__(self, columns=40, rows=12):
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.Stream(self.screen)
        self.written = ""

    def isatty(self):
        return True

    def fileno(self):
        raise OSError("no file")

    def write(self, text):
        self.written += text
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    @property
    def lines(self):
        """Everything ever shown, from the first line to the last that is not empty."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in "\n".join([*above, *self.screen.display]).rstrip().split("\n")]
