"""JSON and text for stdout: whole lines, at once."""

import json
import sys
from typing import Any


def to_json(value: dict[str, Any]) -> str:
    """One object on one line; infinities and NaN are no JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def print_line(line: str) -> None:
    """The line and its end, in UTF-8 whatever the locale."""
    sys.stdout.buffer.write(f"{line}\n".encode())
    sys.stdout.buffer.flush()
