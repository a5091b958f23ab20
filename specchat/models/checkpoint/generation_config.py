"""The sampling defaults that a model's makers recommend in generation_config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.errors import ModelError
from specchat.models.checkpoint.json_file import read_json, shown

_FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of a model; None where the file has no value (transformers' own defaults are not applied).

    Attributes:
        do_sample: whether tokens are drawn at random.
        temperature, top_k, top_p, min_p, repetition_penalty: sampling values; see `records.generation.Sampling`.
        stop_ids: tokens that end an answer.
        ignored: one line for each value that was left out, and the reason.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] = frozenset()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Numbers:
    """The values that a setting may have.

    Attributes:
        words: description of the values, for messages.
        allows: function that tells whether a finite number is allowed.
        is_whole: whether only whole numbers are allowed.
    """

    words: str
    allows: Callable[[float], bool]
    is_whole: bool = False


# The limits of the same settings on the command line.
_NUMBERS: Mapping[str, _Numbers] = {
    "temperature": _Numbers("a number of at least 0", lambda value: value >= 0),
    "top_k": _Numbers("a whole number of at least 0", lambda value: value >= 0, is_whole=True),
    "top_p": _Numbers("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": _Numbers("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": _Numbers("a number above 0", lambda value: value > 0),
}
_TOKEN = _Numbers("a token id or a list of token ids", lambda value: value >= 0, is_whole=True)


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read sampling values and stop tokens from generation_config.json; config.json is the fallback for stop tokens.

    Values that are not allowed are left out, and so is a file that cannot be read.

    Raises:
        ModelError: config.json cannot be read.
    """
    ignored: list[str] = []
    values = _read(folder / _FILE, ignored)
    numbers: dict[str, Any] = {}
    for name, allowed in _NUMBERS.items():
        found = _number(values.get(name), allowed)
        numbers[name] = found
        if found is None and values.get(name) is not None:
            ignored.append(_line(_FILE, name, values[name], allowed.words))
    do_sample = values.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        ignored.append(_line(_FILE, "do_sample", do_sample, "true or false"))
        do_sample = None
    stop_ids = _stop_ids(_FILE, values, ignored)
    if stop_ids is None:
        config = read_json(folder / "config.json")
        text = config.get("text_config")  # of multimodal models
        stop_ids = _stop_ids("config.json", config, ignored)
        if stop_ids is None and isinstance(text, dict):
            stop_ids = _stop_ids("config.json", text, ignored)
    return GenerationDefaults(do_sample, **numbers, stop_ids=stop_ids or frozenset(), ignored=tuple(ignored))


def _read(path: Path, ignored: list[str]) -> Mapping[str, Any]:
    """Return the values of an optional file; empty if the file is missing or cannot be read."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ModelError as error:
        ignored.append(f"{error.message}: ignored")
        return {}


def _number(value: object, allowed: _Numbers) -> float | int | None:
    """Return a number if it is allowed, else None; whole numbers may be written as 50.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not (math.isfinite(number) and allowed.allows(number)):
        return None
    if allowed.is_whole:
        return int(value) if number.is_integer() else None
    return number


def _stop_ids(file: str, values: Mapping[str, Any], ignored: list[str]) -> frozenset[int] | None:
    """Return the stop tokens of a file; None if it names none that is valid."""
    eos = values.get("eos_token_id")
    if eos is None:
        return None
    ids = [_number(each, _TOKEN) for each in (eos if isinstance(eos, list) else [eos])]
    found = frozenset(int(each) for each in ids if each is not None)
    if len(found) < len(set(ids)):
        ignored.append(_line(file, "eos_token_id", eos, _TOKEN.words))
    return found or None


def _line(file: str, name: str, value: object, words: str) -> str:
    return f"{file}: {name} is {shown(value)}, not {words}: ignored"
