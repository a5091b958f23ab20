"""The fields of a JSON object from outside, read with their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specchat.serve.errors import missing, wrong_type, wrong_value


class Fields:
    """The fields of an object; null counts as missing.

    Args:
        values: the object.
        path: name of the object in error messages; empty for a whole body.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def path(self, name: str) -> str:
        """Return the name of a field in error messages."""
        return f"{self._path}.{name}" if self._path else name

    def get(self, name: str) -> Any:
        """Return a value of any type."""
        return self._values.get(name)

    def required(self, name: str) -> Any:
        """Return a value of any type that must be there."""
        if (value := self.get(name)) is None:
            raise missing(self.path(name))
        return value

    def flag(self, name: str) -> bool | None:
        """Return true, false or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(self.path(name), "true or false")
        return value

    def text(self, name: str) -> str | None:
        """Return a string that UTF-8 can encode, or None."""
        return None if self.get(name) is None else checked_text(self.path(name), self.get(name))

    def number(self, name: str) -> float | int | None:
        """Return a number, or None; a whole number is an int, however it is written."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(self.path(name), "a number")
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def whole(self, name: str) -> int | None:
        """Return a whole number, or None."""
        value = self.number(name)
        if value is not None and not isinstance(value, int):
            raise wrong_type(self.path(name), "a whole number")
        return value

    def inner(self, name: str) -> Fields:
        """Return the fields of an object, which is empty if it is missing."""
        return fields_of(self.path(name), {} if self.get(name) is None else self.get(name))


def fields_of(path: str, value: Any) -> Fields:
    """Return the fields of a value that must be an object."""
    if not isinstance(value, dict):
        raise wrong_type(path or "the body", "an object")
    return Fields(value, path)


def checked_text(path: str, value: Any) -> str:
    """Return a value that must be a string; JSON can name halves of characters, which no text has."""
    if not isinstance(value, str):
        raise wrong_type(path, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise wrong_value(path, f"{path} is not valid text: it has half of a surrogate pair") from error
    return value
