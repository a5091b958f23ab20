"""Makes the pictures in the README from real runs: the program on a pty, what it writes on a screen, the screen as SVG.

    PYTHONPATH=.:tests python -m support.screenshots [chat|chat-40|chat-120|bench|probe|probe-40|plan-40 ...]

writes docs/images/NAME.svg. Nothing in them is staged but the keys that are pressed.
"""

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from specchat.models.catalog.ref import DEMO_PROMPTS
from support.terminal import Terminal

FOLDER = Path(__file__).parents[2] / "docs" / "images"
_BRIGHT = re.compile("^bright")
_PYTE_NAMES = {"brown": "yellow", "brightbrown": "bright_yellow"}  # as the first terminals had it


class Dimming(Terminal):
    """A terminal that knows dim text, which pyte does not, as grey."""

    def feed(self, data):
        super().feed(data.replace(b"\x1b[2m", b"\x1b[90m"))


@dataclass(frozen=True)
class Picture:
    """One command and what to do with it.

    Attributes:
        title: the command line, for the window's title.
        arguments: of `python -m specchat`.
        drive: presses keys and waits, until the screen is worth a picture.
        columns, rows: size of the terminal.
        leave: keys that end the program once the picture is taken; none for one that ends by itself.
    """

    title: str
    arguments: tuple[str, ...]
    drive: Callable[[Terminal], None]
    columns: int = 110
    rows: int = 36
    leave: str = ""


def _chat(terminal: Terminal) -> None:
    _ask(terminal, DEMO_PROMPTS[1], r"\+\s+0\s+cached\s+tok")
    _ask(terminal, "A comedy, please.", r"\+\s+[1-9]\d*\s+cached\s+tok")


def _long_chat(terminal: Terminal) -> None:
    _ask(terminal, "Tell me a story about a fox.", r"\+ 0\s+cached\s+tok")
    _ask(terminal, "/verbose", "verbose on")
    _ask(terminal, "What happened next?", r"\+\s+[1-9]\d*\s+cached\s+tok")


def _ask(terminal: Terminal, message: str, shows: str) -> None:
    """Send a message, and wait for what it shows and for the next prompt."""
    terminal.wait_for_prompt()
    terminal.send(message + "\r")
    terminal.wait_for(lambda t: re.search(shows, t.scrollback))
    terminal.wait_for_prompt()


def _short_chat(terminal: Terminal) -> None:
    _ask(terminal, DEMO_PROMPTS[1], r"\+\s+0\s+cached\s+tok")
    _ask(terminal, "/set", "overflow")


def _until_the_offer(terminal: Terminal) -> None:
    terminal.wait_for("[y/N]", timeout_s=280)


def _until_the_end(terminal: Terminal) -> None:
    assert terminal.exit_code(timeout_s=280) == 0, terminal.screen


_TWO = ("run", "demo", "--seed", "7", "--no-save")
PICTURES = {
    "chat": Picture("specchat run demo", _TWO, _chat, columns=80, rows=20, leave="\x04"),
    "chat-40": Picture("specchat", _TWO, _short_chat, columns=40, rows=44, leave="\x04"),
    "chat-120": Picture(
        "specchat run demo", (*_TWO, "--max-tokens", "18"), _long_chat, columns=120, rows=60, leave="\x04"
    ),
    "bench": Picture(
        "specchat bench demo --limit 2",
        ("bench", "demo", "--limit", "2", "-r", "1"),
        _until_the_end,
        columns=120,
        rows=84,
    ),
    "probe": Picture("specchat probe", ("probe",), _until_the_offer, columns=110, rows=64, leave="\r"),
    "probe-40": Picture("specchat probe", ("probe",), _until_the_offer, columns=40, rows=130, leave="\r"),
    "plan-40": Picture("specchat", ("run", "demo", "--plan"), _until_the_end, columns=40, rows=70),
}


def as_svg(terminal: Terminal, title: str) -> str:
    """The screen as it is, colours included; fonts are the viewer's own."""
    console = Console(record=True, width=terminal.columns, file=io.StringIO(), color_system="truecolor")
    rows = [_row(terminal.cells(y)) for y in range(len(terminal.screen.split("\n")))]
    console.print(Text("\n").join(rows), soft_wrap=True)
    svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def _row(cells: list) -> Text:
    row = Text()
    for cell in cells:
        row.append(
            cell.data, Style(color=_colour(cell.fg), bold=cell.bold, italic=cell.italics, underline=cell.underscore)
        )
    row.rstrip()
    return row


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    if name in _PYTE_NAMES:
        return _PYTE_NAMES[name]
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else _BRIGHT.sub("bright_", name)


def main(names: list[str]) -> None:
    """Makes the pictures of these names, or all."""
    for name in names or PICTURES:
        picture = PICTURES[name]
        size = {"columns": picture.columns, "rows": picture.rows}
        with Dimming("specchat", *picture.arguments, **size, environment={"HF_HUB_OFFLINE": "0"}) as terminal:
            picture.drive(terminal)
            (FOLDER / f"{name}.svg").write_text(as_svg(terminal, picture.title))
            if picture.leave:
                terminal.send(picture.leave)
                terminal.exit_code()
        print(f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
