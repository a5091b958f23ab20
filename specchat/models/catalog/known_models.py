"""Models whose figures are shipped (known_models.toml), enough to plan for them. No network, and no torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("known_models.toml")


@dataclass(frozen=True)
class KnownModel:
    """One entry of the file.

    Attributes:
        id: hub id.
        config: size-related values of config.json under their own keys.
        billions: number of weights as published, in billions.
        like: id of the entry that this one's figures come from, or "".
        stored: quantization of the checkpoint's matrices: "awq", "bnb-4bit", "gguf" for the mix in the id, or "" for 16
            bits.
        gated: whether the licence must be accepted first.
        shape: name of the synthetic model of this shape, or "".
        file_bytes: size of an upload in GGUF as published, or 0 if it is not known.
        offered: whether it is suggested to users, not only known as a draft or a shape.
    """

    id: str
    config: Mapping[str, Any]
    billions: float
    like: str = ""
    stored: str = ""
    gated: bool = False
    shape: str = ""
    file_bytes: int = 0
    offered: bool = True


@cache
def known_models() -> Mapping[str, KnownModel]:
    """Load all entries by id, in the order of the file."""
    models: dict[str, KnownModel] = {}
    for entry in tomllib.loads(_FILE.read_text(encoding="utf-8"))["model"]:
        base = models[entry["like"]].config if "like" in entry else {}
        models[entry["id"]] = KnownModel(**{**entry, "config": {**base, **entry.get("config", {})}})
    return models


def known_model(name: str) -> KnownModel | None:
    """Return the entry of a model; a copy by another publisher has the same figures and uses the same entry."""
    last = _last(name)
    same = [model for model in known_models().values() if _last(model.id) == last]
    return next((model for model in same if model.id == name), same[0] if same else None)


def _last(name: str) -> str:
    return name.rpartition("/")[2].partition("@")[0].lower()
