"""Rows of names and texts that stay readable on a narrow terminal."""

import textwrap
from collections.abc import Sequence

_NARROW = 60
_GAP = 2
SEPARATOR = " · "


def aligned(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Return the rows in two columns; on a narrow terminal, each text stands below its name.

    Args:
        rows: names and texts.
        width: width of the terminal in columns.
    """
    width = max(width - 1, 20)
    column = max((len(name) for name, _ in rows), default=0) + _GAP
    lines: list[str] = []
    for name, text in rows:
        if width < max(_NARROW, 2 * column):
            lines += [*wrapped(name, width), *wrapped(text, width, indent="    ")]
        else:
            first, *rest = textwrap.wrap(text, width - column) or [""]
            lines += [f"{name:<{column}}{first}".rstrip(), *(" " * column + line for line in rest)]
    return lines


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Return the text in lines of at most `width` columns, each indented."""
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def hanging(text: str, width: int) -> list[str]:
    """Return the text in lines of at most `width` columns; all but the first are indented."""
    return textwrap.wrap(text, width, subsequent_indent="    ")


def figures(text: str, width: int | None) -> list[str]:
    """Return figures that are joined by " · " in lines that break only between figures.

    Args:
        text: the figures in one line.
        width: width of the terminal in columns; None for one line.
    """
    if width is None:
        return [text]
    lines: list[str] = []
    for part in text.split(SEPARATOR):
        if lines and len(lines[-1]) + len(SEPARATOR) + len(part) + len(SEPARATOR.rstrip()) < width:
            lines[-1] += SEPARATOR + part
        else:
            lines.append(part)
    return [*(line + SEPARATOR.rstrip() for line in lines[:-1]), *lines[-1:]]
