"""Whole lines of JSON or text, written to stdout and flushed."""

import json
import sys
from typing import Any


def to_json(value: dict[str, Any]) -> str:
    """Return an object as one line of JSON; refuse infinities and NaN, which JSON lacks."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def print_line(line: str) -> None:
    """Print a line with its line break, in UTF-8 for every locale."""
    sys.stdout.buffer.write(f"{line}\n".encode())
    sys.stdout.buffer.flush()
