"""The hardware report: with bars on a terminal, as plain text, and as Markdown for bug reports."""

from collections.abc import Sequence
from datetime import datetime
from typing import TextIO

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from specchat.hardware.probe import Report
from specchat.hardware.verdicts import Level, Verdict
from specchat.ui.console import Talk, neutral, report_console
from specchat.version import __version__

_STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "error": "bold red"}
_WIDTH_OFF_TERMINAL = 120
_NARROW = 60
_BAR_COLUMNS = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


class ProbeView:
    """The printer of a hardware report: styled on a terminal, plain text elsewhere.

    Args:
        stream: stdout.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = report_console(stream, _WIDTH_OFF_TERMINAL)

    def report(
        self,
        report: Report,
        verdicts: Sequence[Verdict],
        plan: str | None,
        recommendations: Sequence[RenderableType] = (),
    ) -> None:
        """Print a whole report.

        Args:
            report: hardware report of this machine.
            verdicts: verdicts of the report and of further checks.
            plan: full plan of a model, or None.
            recommendations: lines with the recommended models.
        """
        with self._console.capture() as captured:
            self._console.print(Text(neutral(headline(report)), "bold"))
            self._console.print()
            if self._console.width < _NARROW:
                self._stacked(verdicts)
            else:
                self._side_by_side(verdicts)
            self._console.print()
            measured = f"rates measured {_when(report.measured.measured_at)}; --refresh measures again"
            self._console.print(Text(measured, "dim"))
            if plan is not None:
                self._console.print()
                self._console.print(Text(neutral(plan)))
            if recommendations:
                self._console.print()
            for each in recommendations:
                self._console.print(each)
        for line in captured.get().splitlines():
            self._console.file.write(f"{line.rstrip()}\n")  # rich pads the lines of a grid with spaces

    def _side_by_side(self, verdicts: Sequence[Verdict]) -> None:
        grid = Table.grid(padding=(0, 1))
        for _ in range(2):
            grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for verdict in verdicts:
            grid.add_row(_level(verdict), Text(neutral(verdict.topic), "bold"), _body(verdict))
        self._console.print(grid)

    def _stacked(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self._console.print(Text.assemble(_level(verdict), " ", (neutral(verdict.topic), "bold")))
            self._console.print(Padding(_body(verdict), (0, 0, 0, 2)))


def _when(measured_at: str) -> str:
    """Return a time in ISO 8601 as people read it, in local time; another text, from a saved file, as it is."""
    try:
        return f"{datetime.fromisoformat(measured_at).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return measured_at


def headline(report: Report) -> str:
    """Return the versions and the system in one line."""
    hardware = report.hardware
    torch = "no torch" if hardware.torch is None else f"torch {hardware.torch.version}"
    release = hardware.platform.release.partition("-")[0]  # the distribution's suffix is in the JSON
    system = f"{hardware.platform.system} {release}" + (" (WSL)" if hardware.platform.wsl else "")
    return f"specchat {__version__} · {system} · Python {hardware.platform.python} · {torch}"


def markdown(report: Report, verdicts: Sequence[Verdict], plan: str | None, recommendations: Sequence[str] = ()) -> str:
    """Return the report as Markdown, to be pasted into a bug report."""
    rows = [
        f"| {verdict.level} | {_cell(verdict.topic)} | {_cell(verdict.text)} | {_cell(verdict.hint or '')} |"
        for verdict in verdicts
    ]
    lines = [f"**{headline(report)}**", "", "| | what | found | hint |", "|---|---|---|---|", *rows]
    lines += ["", f"Rates measured {report.measured.measured_at}."]
    if plan is not None:
        lines += ["", "```", plan, "```"]
    if recommendations:
        lines += ["", *recommendations]
    return "\n".join(lines)


def bar(share: float, columns: int = _BAR_COLUMNS) -> str:
    """Return a bar of fixed width, filled to `share` in steps of 1/8 column."""
    eighths = round(min(max(share, 0.0), 1.0) * columns * 8)
    drawn = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return drawn + "·" * (columns - len(drawn))


class ProbeLine:
    """The progress line of a measurement: redrawn in place on terminals, else one line at the start.

    Args:
        talk: stderr.
    """

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._has_reported = False

    def update(self, what: str, step: int, steps: int) -> None:
        """Show the current measurement."""
        if self._talk.console.is_terminal:
            self._talk.overwrite(f"probe: measuring {what} ({step} of {steps}) ...")
        elif not self._has_reported:
            self._talk.say("probe: measuring this machine for some seconds; later runs use the saved rates")
        self._has_reported = True

    def end(self) -> None:
        """Clear the line."""
        if self._has_reported:
            self._talk.overwrite("")


def _level(verdict: Verdict) -> Text:
    return Text(f"{verdict.level:<5}", _STYLES[verdict.level])


def _body(verdict: Verdict) -> Text:
    parts: list[str | tuple[str, str]] = []
    if verdict.share is not None:
        parts += [(bar(verdict.share), "cyan"), f" {verdict.share:.0%} in use; "]
    parts.append(neutral(verdict.text))
    if verdict.hint:
        parts.append((f"\n→ {neutral(verdict.hint)}", _STYLES[verdict.level]))
    return Text.assemble(*parts)


def _cell(text: str) -> str:
    return neutral(text).replace("|", "\\|").replace("\n", " ")
