"""The progress and the report of a benchmark."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from specchat.bench.runner import Progress
from specchat.bench.tables import Table, headline, notes, number, report_tables, share_lines
from specchat.ui.console import Talk, neutral, report_console

_LOG_EVERY_S = 30.0
_WIDTH_OFF_TERMINAL = 200
_CHART_COLUMNS = 50


class BenchLine:
    """The progress line of a benchmark: redrawn in place on terminals, else a new line every 30 seconds.

    Args:
        talk: stderr.

    Attributes:
        part: value of the sweep that is being measured; empty without a sweep.
    """

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._begin = time.monotonic()
        self._logged_at = float("-inf")
        self.part = ""

    def __enter__(self) -> Self:
        return self

    def update(self, progress: Progress) -> None:
        """Show new progress."""
        line = progress_line(progress, time.monotonic() - self._begin, self.part)
        if self._talk.console.is_terminal:
            self._talk.overwrite(line)
        elif time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = time.monotonic()
            self._talk.say(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._talk.overwrite("")


def progress_line(progress: Progress, spent_s: float, part: str = "") -> str:
    """Return the progress line: part done, current work, elapsed time, remaining time."""
    parts = [*([part] if part else []), progress.what, _minutes(spent_s)]
    if progress.total:
        parts.insert(0, f"{progress.done}/{progress.total}")
    if progress.left_s is not None:
        parts.append(f"about {_minutes(progress.left_s)} left")
    return "bench: " + " · ".join(parts)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class ReportView:
    """The printer of benchmark tables: styled on a terminal, plain text elsewhere.

    Args:
        stream: stdout.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = report_console(stream, _WIDTH_OFF_TERMINAL)

    def report(self, report: Mapping[str, Any]) -> None:
        """Print a whole report."""
        self._console.print(Text(neutral(headline(report)), "bold"))
        for note in notes(report):
            self._console.print(Text(neutral(note), "yellow"))
        for table in report_tables(report):
            self.table(table)
        if report["sweep"]:
            self.chart(report["sweep"])
        self._console.print(Text("share this", "bold"))
        for name, value in share_lines(report):
            self._console.print(Text.assemble((f"  {name:<9}", "dim"), neutral(value)), soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print one table."""
        drawn = RichTable(box=box.SIMPLE_HEAD, title=Text(neutral(table.title), "bold"), title_justify="left")
        for i, name in enumerate(table.header):
            drawn.add_column(Text(neutral(name)), justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(neutral(cell)) for cell in row))
        self._console.print(drawn)
        if table.note:
            self._console.print(Text(neutral(table.note), "dim"))
        self._console.print()

    def chart(self, sweep: Mapping[str, Any]) -> None:
        """Print the speed for each value of the swept option as a bar chart."""
        for line in chart_lines(sweep):
            self._console.print(Text(neutral(line)))
        self._console.print()


def chart_lines(sweep: Mapping[str, Any]) -> list[str]:
    """Return bars of mean tokens per second, in steps of 1/8 column."""
    speeds = [point["summary"]["tok_per_s"]["mean"] or 0.0 for point in sweep["points"]]
    longest = max(speeds, default=0.0) or 1.0
    width = max(len(point["value"]) for point in sweep["points"])
    lines = [f"tok/s by {sweep['option']}"]
    for point, speed in zip(sweep["points"], speeds, strict=True):
        eighths = round(speed / longest * _CHART_COLUMNS * 8)
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        lines.append(f"  {point['value']:>{width}} {bar} {number(speed)}")
    return lines
