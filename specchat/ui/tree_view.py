"""A compact drawing of a draft tree: the accepted path, and the rejected siblings beside it."""

from collections.abc import Callable

from rich.text import Text

from specchat.records.generation import DraftTree
from specchat.ui.console import neutral

_ROOT = -1
_MAX_LEVELS = 12
_MAX_TOKEN_CHARS = 12
_ACCEPTED, _REJECTED = "bold green", "dim"


def tree_lines(tree: DraftTree, drawn: tuple[int, ...], token_text: Callable[[int], str], width: int) -> list[Text]:
    """Return one line per level of the tree, down to the first token that the draft did not predict.

    Args:
        tree: draft tree of the step.
        drawn: tokens that the step emitted; the last one may be missing from the tree.
        token_text: function that returns the text of a token.
        width: width in columns.

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
        siblings = children.get(node, [])
        if siblings:
            lines.append(_level(depth + 1, siblings, taken, tree, token_text, width))
    if len(path) > _MAX_LEVELS:
        lines.append(Text(f"    … {len(path) - _MAX_LEVELS} more levels", _REJECTED))
    if len(drawn) > len(tree.accepted):
        lines.append(Text(f"  → {_shown(token_text(drawn[-1]))}", _ACCEPTED))
    return lines


def _level(
    depth: int, siblings: list[int], taken: int | None, tree: DraftTree, token_text: Callable[[int], str], width: int
) -> Text:
    """Return the line of a level: the accepted node, the other nodes that fit, and the number of the rest."""
    line = Text(f"{depth:>3}")
    others = [node for node in siblings if node != taken]
    num_left = len(others)
    if taken is not None:
        line.append(f" ● {_shown(token_text(tree.tokens[taken]))}", _ACCEPTED)
    for node in others:
        label = f"  ○ {_shown(token_text(tree.tokens[node]))}"
        if line.cell_len + len(label) + len(f"  +{num_left}") > width:
            break
        line.append(label, _REJECTED)
        num_left -= 1
    if num_left:
        line.append(f"  +{num_left}", _REJECTED)
    return line


def _shown(text: str) -> str:
    """Return a token's text in quotes, with visible line breaks, cut to a few characters."""
    short = text if len(text) <= _MAX_TOKEN_CHARS else f"{text[: _MAX_TOKEN_CHARS - 1]}…"
    return f'"{neutral(short.replace(chr(10), "⏎"))}"'
