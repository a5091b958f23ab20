"""The lists of saved chats and of models on the disk: a table, or short paragraphs on a narrow terminal."""

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from specchat.chat.saved_chats import SavedChat
from specchat.files import local_time
from specchat.models.packs.installed import Installed
from specchat.ui.console import neutral, report_console
from specchat.units import format_bytes

_WIDTH_OFF_TERMINAL = 160
_NARROW = 70


def print_sessions(chats: Sequence[SavedChat]) -> None:
    """Print saved chats to stdout, the first words of each on top of its facts if the terminal is narrow."""
    rows = [
        (chat.title, chat.session_id, f"{chat.changed:%Y-%m-%d %H:%M}", f"{chat.turns:,}", chat.model or "")
        for chat in chats
    ]
    _print(("first words", "ID", "changed", "turns", "model"), rows)


def print_models(found: Sequence[Installed]) -> None:
    """Print what models take on this disk, and the sum."""
    rows = [
        (each.name, each.kind, each.origin, format_bytes(each.nbytes), _day(each.used_at), each.note) for each in found
    ]
    _print(("name", "kind", "from", "size", "last used", "note"), rows)
    total = sum({each.path: each.nbytes for each in found}.values())  # models may share a file
    sys.stdout.write(f"{format_bytes(total)} in total\n")


def _day(seconds: float | None) -> str:
    return "" if seconds is None else f"{local_time(seconds):%Y-%m-%d}"


def _print(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = report_console(sys.stdout, _WIDTH_OFF_TERMINAL)
    if console.width < _NARROW:
        for name, *facts in rows:
            console.print(Text(neutral(name), "bold"))
            console.print(Text(neutral("  " + " · ".join(filter(None, facts))), "dim"))
        return
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i in kept:
        table.add_column(header[i], overflow="fold", justify="right" if header[i] in ("size", "turns") else "left")
    for row in rows:
        table.add_row(*(Text(neutral(row[i])) for i in kept))
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")
