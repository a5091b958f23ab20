"""Streaming Markdown: complete blocks are laid out once and become final, the rest is laid out again as it grows.

Paragraphs, headings, tables and quotes are complete when they end. Lists become final item by item, code line by line,
so little text is ever unfinished. Rich's Markdown drops HTML and pads every line. Here every character that is not
markup is visible, and code has no decoration around it, so it can be copied cleanly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Protocol

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from rich import box
from rich.cells import chop_cells
from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specchat.ui.console import neutral
from specchat.ui.live import Row

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType

_Line = list[Segment]

# A longer unfinished block would take too long to lay out on each change, so only its end is shown, as plain text.
_MAX_LIVE_CHARS = 4000
# Preceding lines that give the syntax highlighter its context.
_CODE_CONTEXT_LINES = 60
_TAB = 4
_MIN_WIDTH = 10  # columns, for blocks that are nested too deeply for the screen

_STYLES = {
    "strong": Style(bold=True),
    "em": Style(italic=True),
    "s": Style(strike=True),
    "code_inline": Style(color="cyan"),
    "link": Style(underline=True),
    "heading": Style(bold=True, color="magenta"),
    "mark": Style(dim=True),  # bullets, numbers, fences, bars, addresses
}


class TextStream(Protocol):
    """A converter from pieces of text to rows."""

    def feed(self, text: str) -> None:
        """Add the next piece."""

    def finished(self, width: int, *, last: bool = False) -> list[Row]:
        """Return the rows that became final since the last call; with `last`, all remaining rows."""

    def unfinished(self, width: int) -> list[Row]:
        """Return the remaining rows as they would look if the text ended here."""


class PlainStream:
    """A stream of plain text, line by line.

    Args:
        style: style of the whole text.

    Attributes:
        pending: text that `finished` has not returned yet.
    """

    def __init__(self, style: str = "") -> None:
        self._style = style
        self.pending = ""

    def feed(self, text: str) -> None:
        """Add the next piece."""
        self.pending += text

    def finished(self, width: int, *, last: bool = False) -> list[Row]:
        """Return the complete lines; with `last`, also the incomplete one."""
        *lines, self.pending = self.pending.split("\n")
        if last and self.pending:
            lines, self.pending = [*lines, self.pending], ""
        return [styled_row(line, self._style) for line in lines]

    def unfinished(self, width: int) -> list[Row]:
        """Return the incomplete line, wrapped like a terminal does."""
        return tail_rows(self.pending, width, None, self._style) if self.pending else []


def tail_rows(text: str, width: int, num_rows: int | None, style: str = "") -> list[Row]:
    """Return the last `num_rows` rows of a text (None: all), wrapped like a terminal does."""
    lines = neutral(text[-_MAX_LIVE_CHARS:]).expandtabs(_TAB).split("\n")
    parts = [part for line in lines for part in chop_cells(line, width) or [""]]
    return [styled_row(part, style) for part in (parts if num_rows is None else parts[-num_rows:])]


def styled_row(text: str, style: str = "") -> Row:
    """Return a row in one style."""
    return _row([Segment(text, Style.parse(style) if style else None)])


@dataclass
class _OpenFence:
    """A code block that has begun and not ended.

    Attributes:
        language: text behind the opening fence.
        closing: pattern of the closing fence.
        indent: leading spaces of the fence, which are removed from the code lines.
        lines: preceding code lines, as context for the syntax highlighter.
    """

    language: str
    closing: re.Pattern[str]
    indent: int
    lines: list[str] = field(default_factory=list)


class MarkdownStream:
    """A stream of Markdown, laid out block by block."""

    def __init__(self) -> None:
        self._layout = _Layout()
        self._pending = ""
        self._fence: _OpenFence | None = None
        self._next_number: int | None = None  # number of the next item, if `_pending` begins within a list
        self._needs_gap = False
        self._num_lines_read = 0

    def feed(self, text: str) -> None:
        """Add the next piece."""
        self._pending += neutral(text)

    def finished(self, width: int, *, last: bool = False) -> list[Row]:
        """Return the rows that further text cannot change; with `last`, all remaining rows."""
        if last and self._pending and not self._pending.endswith("\n"):
            self._pending += "\n"
        rows: list[Row] = []
        while (lines := self._take(width, last)) is not None:
            rows += [_row(line) for line in lines]
        return rows

    def unfinished(self, width: int) -> list[Row]:
        """Return the rows of the incomplete block."""
        if not self._pending.strip():
            return []
        if self._fence is not None or len(self._pending) > _MAX_LIVE_CHARS:
            return tail_rows(self._pending, width, None)
        gap: list[_Line] = [[]] if self._needs_gap and self._next_number is None else []
        return [_row(line) for line in gap + self._layout.blocks(_parse(self._pending), width, self._next_number)]

    def _take(self, width: int, last: bool) -> list[_Line] | None:
        """Return the next final lines, or None if no block is complete."""
        num_whole_lines = self._pending.count("\n")
        if num_whole_lines == self._num_lines_read and not last:
            return None
        lines = self._take_code(last) if self._fence is not None else self._take_blocks(width, last)
        if lines is None:
            self._num_lines_read = self._pending.count("\n")
        else:
            self._num_lines_read = 0
        return lines

    def _take_code(self, last: bool) -> list[_Line] | None:
        assert self._fence is not None
        *whole, rest = self._pending.split("\n")
        closing = next((i for i, line in enumerate(whole) if self._fence.closing.fullmatch(line)), None)
        code = [_unindented(line, self._fence.indent) for line in whole[:closing]]
        shown = self._layout.code(code, self._fence.language, above=self._fence.lines)
        self._fence.lines = [*self._fence.lines, *code][-_CODE_CONTEXT_LINES:]
        if closing is None:
            self._pending = rest
            if last:
                self._fence = None
            return shown or None
        self._pending = "\n".join([*whole[closing + 1 :], rest])
        self._fence = None
        return [*shown, _mark("```")]

    def _take_blocks(self, width: int, last: bool) -> list[_Line] | None:
        """Lay out the first block if it is complete; open a fence, or take the complete items of a list."""
        *whole, rest = self._pending.split("\n")
        nodes = _parse("\n".join([*whole, ""]))
        if not nodes:
            self._pending = rest
            return None
        node, is_last_node = nodes[0], len(nodes) == 1
        begin, end = node.map or (0, len(whole))
        if node.type == "fence":
            self._pending = "\n".join([*whole[begin + 1 :], rest])
            self._fence = _open_fence(node, whole[begin])
            return [*self._gap(), _mark(f"```{self._fence.language}")]
        if is_last_node and not last and not _has_ended(node, end, len(whole)):
            return self._take_items(node, whole, rest, width)
        self._pending = "\n".join([*whole[end:], rest])
        lines = [*self._gap(), *self._layout.blocks([node], width, self._next_number)]
        self._next_number = None
        return lines

    def _take_items(self, node: SyntaxTreeNode, whole: list[str], rest: str, width: int) -> list[_Line] | None:
        """Take all items of a list except the last one, which may still grow."""
        items = node.children
        if node.type not in ("bullet_list", "ordered_list") or len(items) < 2:
            return None
        assert items[-1].map is not None
        number = _first_number(node) if self._next_number is None else self._next_number
        lines = [*self._gap(), *self._layout.items(node, items[:-1], width, number)]
        self._next_number = number + len(items) - 1
        self._pending = "\n".join([*whole[items[-1].map[0] :], rest])
        return lines

    def _gap(self) -> list[_Line]:
        """Return an empty line, if one is needed before the next block."""
        needed = self._needs_gap and self._next_number is None
        self._needs_gap = True
        return [[]] if needed else []


def _parser() -> MarkdownIt:
    """Return a parser for CommonMark, tables and strike-through.

    HTML and link reference definitions would be invisible, so they are parsed as text.
    """
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


_PARSER = _parser()


def _parse(text: str) -> list[SyntaxTreeNode]:
    return SyntaxTreeNode(_with_whole_tables(_PARSER.parse(text), text.split("\n"))).children


def _with_whole_tables(tokens: list[Token], lines: Sequence[str]) -> list[Token]:
    """Replace a table by its source where the layout would lose text: rows with more cells than the header."""
    kept: list[Token] = []
    for token in tokens:
        kept.append(token)
        if token.type != "table_close":
            continue
        begin = max(i for i, each in enumerate(kept) if each.type == "table_open")
        first, end = kept[begin].map or (0, 0)
        source = "\n".join(lines[first:end])
        cells = "".join(each.content for each in kept[begin:])
        if sum(map(str.isalnum, source)) != sum(map(str.isalnum, cells)):
            kept[begin:] = [Token("code_block", "code", 0, content=source, map=[first, end], block=True)]
    return kept


def _has_ended(node: SyntaxTreeNode, end: int, num_lines: int) -> bool:
    """Return whether the last block of the complete lines cannot grow any more."""
    if node.type in ("heading", "hr"):
        return True
    return node.type in ("paragraph", "table", "blockquote") and end < num_lines


def _open_fence(node: SyntaxTreeNode, line: str) -> _OpenFence:
    closing = re.compile(rf" {{0,3}}{re.escape(node.markup[0])}{{{len(node.markup)},}}[ \t]*")
    return _OpenFence(node.info.strip(), closing, len(line) - len(line.lstrip(" ")))


def _unindented(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip(" "))) :]


def _first_number(node: SyntaxTreeNode) -> int:
    return int(node.attrs.get("start", 1))


def _mark(text: str) -> _Line:
    return [Segment(text, _STYLES["mark"])]


@cache
def _colors() -> ColorSystem | None:
    """Return the colour system of the terminal; only called where styles are used."""
    names = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}
    return names.get(Console(force_terminal=True).color_system or "")


def _row(line: Sequence[Segment]) -> Row:
    """Return a row that is safe to write.

    The layout may have decoded entities and URLs into control characters, so the text is neutralized once more.
    """
    shown, num_cells = "", 0
    for segment in line:
        text = neutral(segment.text).replace("\n", " ").expandtabs(_TAB)
        shown += segment.style.render(text, color_system=_colors()) if segment.style else text
        num_cells += Segment(text).cell_length
    return Row(shown, num_cells)


class _Layout:
    """The layout of parsed blocks to lines of a given width."""

    def __init__(self) -> None:
        self._console = Console(color_system=None, force_terminal=False, highlight=False, markup=False, emoji=False)

    def blocks(self, nodes: Sequence[SyntaxTreeNode], width: int, first_number: int | None = None) -> list[_Line]:
        """Lay out blocks, separated by empty lines.

        Args:
            nodes: sibling blocks.
            width: width in columns.
            first_number: number of the first item, if the first block continues an earlier list; None otherwise.
        """
        lines: list[_Line] = []
        for i, node in enumerate(nodes):
            if i and not (node.type.endswith("_list") and nodes[i - 1].type == "paragraph" and _is_tight(node)):
                lines.append([])
            if node.type.endswith("_list"):
                number = _first_number(node) if i or first_number is None else first_number
                lines += self.items(node, node.children, width, number)
            else:
                lines += self._block(node, width)
        return lines

    def items(self, node: SyntaxTreeNode, items: Sequence[SyntaxTreeNode], width: int, number: int) -> list[_Line]:
        """Lay out list items; the first one has the number `number`."""
        lines: list[_Line] = []
        for i, item in enumerate(items):
            sign = f"{number + i}. " if node.type == "ordered_list" else "• "
            lines += self._prefixed(item.children, width, sign, " " * len(sign)) or [_mark(sign.rstrip())]
        return lines

    def code(self, lines: Sequence[str], language: str, above: Sequence[str] = ()) -> list[_Line]:
        """Highlight lines of code; each input line gives one output line.

        Args:
            lines: code lines, without line ends.
            language: text behind the opening fence.
            above: preceding code lines, as context for the highlighter.
        """
        from rich.syntax import Syntax

        if not lines:
            return []
        source = "\n".join([*above, *lines])
        name = language.split(maxsplit=1)[0] if language else "text"
        text = Syntax(source, name, theme="ansi_dark", background_color="default").highlight(source)
        text.rstrip()
        shown = [list(line.render(self._console)) for line in text.split("\n", allow_blank=True)]
        shown += [[] for _ in range(len(above) + len(lines) - len(shown))]
        return shown[len(above) : len(above) + len(lines)]

    def _block(self, node: SyntaxTreeNode, width: int) -> list[_Line]:
        match node.type:
            case "heading":
                return self._wrapped(_inline(node, _STYLES["heading"]), width)
            case "fence" | "code_block":
                language = node.info.strip()
                lines = self.code(node.content.removesuffix("\n").split("\n"), language)
                return [_mark(f"```{language}"), *lines, _mark("```")]
            case "hr":
                return [_mark("─" * min(width, 20))]
            case "blockquote":
                return self._prefixed(node.children, width, "│ ", "│ ")
            case "table":
                return self._rendered(_table(node), width)
            case _:
                return self._wrapped(_inline(node, Style.null()), width)

    def _prefixed(self, nodes: Sequence[SyntaxTreeNode], width: int, first: str, others: str) -> list[_Line]:
        lines = self.blocks(nodes, max(width - len(first), _MIN_WIDTH))
        signs = [others if i else first for i in range(len(lines))]
        return [_mark(sign) + line if line else _mark(sign.rstrip()) for sign, line in zip(signs, lines, strict=True)]

    def _wrapped(self, text: Text, width: int) -> list[_Line]:
        lines = text.wrap(self._console, width, justify="left", overflow="fold", tab_size=_TAB)
        for line in lines:
            line.rstrip()
        return [[segment for segment in line.render(self._console) if segment.text] for line in lines]

    def _rendered(self, content: RenderableType, width: int) -> list[_Line]:
        options = self._console.options.update(width=width)
        lines = self._console.render_lines(content, options, pad=False)
        return [line for line in lines if any(segment.text.strip() for segment in line)]


def _is_tight(node: SyntaxTreeNode) -> bool:
    """Return whether the items of a list are not separated by empty lines."""
    return all(child.hidden for item in node.children for child in item.children if child.type == "paragraph")


def _table(node: SyntaxTreeNode) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    rows = [row.children for part in node.children for row in part.children]
    for cell in rows[0]:
        style = str(cell.attrs.get("style", ""))
        justify: JustifyMethod = "right" if "right" in style else "left"
        table.add_column(_inline(cell, _STYLES["strong"]), justify=justify, overflow="fold")
    for row in rows[1:]:
        table.add_row(*(_inline(cell, Style.null()) for cell in row))
    return table


def _inline(node: SyntaxTreeNode, style: Style) -> Text:
    """Return the styled text of a block."""
    text = Text()
    for part, part_style in _pieces(node, style):
        text.append(part, part_style)
    return text


def _pieces(node: SyntaxTreeNode, style: Style) -> Iterator[tuple[str, Style]]:
    style = style + _STYLES.get(node.type, Style.null())
    match node.type:
        case "text" | "code_inline" | "html_inline":
            yield node.content, style
        case "softbreak" | "hardbreak":  # models break lines on purpose, as in verse and addresses
            yield "\n", style
        case "image":
            yield f"[{node.content}]", style
            yield f" ({node.attrs.get('src', '')})", _STYLES["mark"]
        case _:
            for child in node.children:
                yield from _pieces(child, style)
            if node.type == "link" and node.attrs.get("href") != _plain(node):
                yield f" ({node.attrs.get('href', '')})", _STYLES["mark"]


def _plain(node: SyntaxTreeNode) -> str:
    return "".join(text for child in node.children for text, _ in _pieces(child, Style.null()))
