"""Objects as single lines of JSON that are safe to print on a terminal."""

import json
import re
from typing import Any

# Characters that can move the cursor, reorder the text of a line, end the line, or that UTF-8 cannot encode. JSON
# itself only escapes the first 32.
_UNSAFE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def to_json(value: dict[str, Any]) -> str:
    """Return an object as one line of JSON; refuse infinities and NaN, which JSON lacks."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
