"""Families of models that share a vocabulary, recognized by name before any download."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("families.toml")


@dataclass(frozen=True)
class Family:
    """Targets, and the drafts that share their vocabulary.

    Attributes:
        name: name for users.
        targets: patterns for the last part of a model's name.
        drafts: hub ids, preferred first.
    """

    name: str
    targets: tuple[re.Pattern[str], ...]
    drafts: tuple[str, ...]


@dataclass(frozen=True)
class Unsupported:
    """Models that are known not to run.

    Attributes:
        models: patterns for the last part of a model's name.
        why: reason, the text after "NAME is not supported: ".
    """

    models: tuple[re.Pattern[str], ...]
    why: str


@dataclass(frozen=True)
class Families:
    """Contents of families.toml."""

    families: tuple[Family, ...]
    unsupported: tuple[Unsupported, ...]

    def family_of(self, model: str) -> Family | None:
        """Return the family of a target by its name: org/name, a folder, or the name alone."""
        return next((family for family in self.families if matches(family.targets, model)), None)

    def why_unsupported(self, model: str) -> str | None:
        """Return the reason why a model cannot run; None if none is known."""
        return next((each.why for each in self.unsupported if matches(each.models, model)), None)


@cache
def known_families() -> Families:
    """Load the families that are shipped with specchat."""
    table: dict[str, Any] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return Families(
        tuple(Family(each["name"], patterns_of(each["targets"]), tuple(each["drafts"])) for each in table["family"]),
        tuple(Unsupported(patterns_of(each["models"]), each["why"]) for each in table["unsupported"]),
    )


def patterns_of(texts: list[str]) -> tuple[re.Pattern[str], ...]:
    """Compile patterns that ignore case."""
    return tuple(re.compile(text, re.IGNORECASE) for text in texts)


def matches(patterns: tuple[re.Pattern[str], ...], model: str) -> bool:
    """Return whether a pattern matches the last part of a model's name: org/name, a folder, or the name alone."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0]
    return any(pattern.fullmatch(name) for pattern in patterns)
