"""Models that a model was made from, by its card: the file README.md, or the tags that the hub makes of it."""

import re
from collections.abc import Iterable
from pathlib import Path

from specchat.files import read_regular

CARD = "README.md"
_TAG = "base_model:"
# The YAML at the top of a card, and its entry: a name in the same line, or a list.
_HEAD = re.compile(r"---\r?\n.*?\n---", re.DOTALL)
_BASES = re.compile(r"^base_model:.*(?:\n[ \t]*-.*)*", re.MULTILINE)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def tagged_bases(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the base models that tags of the hub name, such as "base_model:finetune:org/name"."""
    names = (tag.rpartition(":")[2] for tag in tags if tag.startswith(_TAG))
    return tuple(dict.fromkeys(names))


def written_bases(folder: Path) -> tuple[str, ...]:
    """Return the base models that the card in a model's folder names; none without a readable card."""
    try:
        card = read_regular(folder / CARD).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ()
    head = _HEAD.match(card)
    found = None if head is None else _BASES.search(head[0])
    return () if found is None else tuple(_NAME.findall(found[0]))
