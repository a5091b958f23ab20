"""The types of a session's records: a file that others have written or changed must not fail later, in mid-chat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from specchat.chat.state import ChatRecord, Opened
from specchat.records.chat import Overflow

# Facts of `Opened.setup` that resuming a chat reads.
_SETUP: Mapping[str, Any] = {
    "model": str,
    "revision": str | None,
    "draft": str | None,
    "quant": str | None,
    "dtype": str | None,
    "ctx": int | None,
    "stop": list[str],
    "overflow": Overflow,
    "base": bool,
}
_LARGEST = 1 << 63  # a seed is below this


def check_types(record: ChatRecord) -> None:
    """Check that every field of a record has its declared type.

    Raises:
        TypeError: a field has another type, or a fact of the setup is missing.
    """
    if not _fits(record, type(record)):
        raise TypeError(f"a field of {type(record).__name__} has another type")
    if isinstance(record, Opened):
        for name, hint in _SETUP.items():
            if name not in record.setup or not _fits(record.setup[name], hint):
                raise TypeError(f"the setup has no valid {name}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of an annotation."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in args)
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(each, args[0]) for each in value)
    if is_dataclass(hint):
        names = get_type_hints(hint)
        return type(value) is hint and all(_fits(getattr(value, name), each) for name, each in names.items())
    return _is_plain(value, NoneType if hint is None else origin or hint)


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and 0 <= value < _LARGEST
    if kind is int:
        return type(value) is int and 0 <= value < _LARGEST
    return isinstance(value, kind)
