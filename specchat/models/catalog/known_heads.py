"""Heads that are published for known targets (known_heads.toml). No network, and no torch."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from specchat.models.catalog.families import matches, patterns_of

_FILE = Path(__file__).with_name("known_heads.toml")
# Names of the kinds for users.
_KINDS = {
    "eagle3": "an EAGLE-3 head",
    "dflash": "a DFlash head",
    "dflash2": "a DFlash2 head",
    "assistant": "an assistant",
}


@dataclass(frozen=True)
class KnownHead:
    """One entry of the file.

    Attributes:
        id: hub id.
        kind: name of the kind for users, such as "an EAGLE-3 head".
        targets: patterns for the last part of a target's name.
    """

    id: str
    kind: str
    targets: tuple[re.Pattern[str], ...]


@cache
def known_heads() -> tuple[KnownHead, ...]:
    """Load all entries, in the order of the file."""
    table: dict[str, Any] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(KnownHead(each["id"], _KINDS[each["kind"]], patterns_of(each["targets"])) for each in table["head"])


def heads_for(names: Iterable[str]) -> list[KnownHead]:
    """Return the heads for a target.

    Args:
        names: names of the target and of the models that it was made from.
    """
    found = list(names)
    return [head for head in known_heads() if any(matches(head.targets, name) for name in found)]


def kind_of(name: str) -> str:
    """Return the kind of a head by its hub id, for users; "" for any other model."""
    return next((head.kind for head in known_heads() if head.id == name), "")
