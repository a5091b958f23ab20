"""A tree of guesses drawn small: along the path that was accepted, what else was tried beside it."""

from collections.abc import Callable

from rich.text import Text

from specchat.records.generation import DraftTree
from specchat.ui.console import neutral

_ROOT = -1
_MAX_LEVELS = 12
_MAX_TOKEN_CHARS = 12
_ACCEPTED, _REFUSED = "bold green", "dim"


def tree_lines(tree: DraftTree, drawn: tuple[int, ...], token_text: Callable[[int], str], width: int) -> list[Text]:
    """One line for each level down to where the target took another way.

    Args:
        tree: what was offered.
        drawn: the tokens that the step emitted; the last one need not be in the tree.
        token_text: what a token looks like.
        width: columns.

    Returns:
        Lines such as `1 ● " the" ○ " a" ○ " his" +5`.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    lines = []
    path = [_ROOT, *tree.accepted]
    for depth, node in enumerate(path[:_MAX_LEVELS]):
        taken = path[depth + 1] if depth + 1 < len(path) else None
        guesses = children.get(node, [])
        if guesses:
            lines.append(_level(depth + 1, guesses, taken, tree, token_text, width))
    if len(path) > _MAX_LEVELS:
        lines.append(Text(f"    … {len(path) - _MAX_LEVELS} more levels", _REFUSED))
    if len(drawn) > len(tree.accepted):
        lines.append(Text(f"  → {_shown(token_text(drawn[-1]))}", _ACCEPTED))
    return lines


def _level(
    depth: int, guesses: list[int], taken: int | None, tree: DraftTree, token_text: Callable[[int], str], width: int
) -> Text:
    """The accepted guess first, then the others in order, for as long as they fit; then how many there are beside."""
    line = Text(f"{depth:>3}")
    others = [node for node in guesses if node != taken]
    num_left = len(others)
    if taken is not None:
        line.append(f" ● {_shown(token_text(tree.tokens[taken]))}", _ACCEPTED)
    for node in others:
        guess = f"  ○ {_shown(token_text(tree.tokens[node]))}"
        if line.cell_len + len(guess) + len(f"  +{num_left}") > width:
            break
        line.append(guess, _REFUSED)
        num_left -= 1
    if num_left:
        line.append(f"  +{num_left}", _REFUSED)
    return line


def _shown(text: str) -> str:
    """A token's text with its spaces visible, cut to a few characters."""
    short = text if len(text) <= _MAX_TOKEN_CHARS else f"{text[: _MAX_TOKEN_CHARS - 1]}…"
    return f'"{neutral(short.replace(chr(10), "⏎"))}"'
