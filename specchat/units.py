"""Sizes and rates: GiB = 2^30 for memory, GB/s = 1e9 for links; parsing what users type, printing what they read."""

import re

from specchat.errors import InvalidSizeError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
_FACTORS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by a SIZE such as 900MiB, 8GiB or 8GB.

    Raises:
        InvalidSizeError: no number, no unit, an unknown unit, or nothing left after rounding.
    """
    match = _SIZE.fullmatch(text)
    num_bytes = int(float(match[1]) * _FACTORS[match[2].upper()]) if match else 0
    if num_bytes <= 0:
        raise InvalidSizeError(f"'{text}' is not a size", hint="write a number and a unit, such as 900MiB, 8GiB or 8GB")
    return num_bytes


def size_text(num_bytes: int) -> str:
    """What `parse_size` reads as just so many bytes, as short as can be."""
    factor, unit = next((pair for pair in ((GIB, "GiB"), (MIB, "MiB")) if num_bytes % pair[0] == 0), (1, "B"))
    return f"{num_bytes // factor}{unit}"


def format_bytes(num_bytes: int) -> str:
    """A memory size for people: `9.8 GiB`, `37 MiB`, `512 B`."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes} B"


def format_rate(bytes_per_s: float) -> str:
    """A link or disk rate for people, in GB/s (1e9)."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"
