"""Parsing and formatting of sizes and rates: GiB = 2^30 bytes for memory, GB/s = 1e9 bytes per second for links."""

import re

from specchat.errors import InvalidSizeError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}
_FACTORS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)}
_MOST_BYTES = 1 << 63  # what the system can count
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes of a SIZE such as 900MiB, 8GiB or 8GB.

    Raises:
        InvalidSizeError: the number or the unit is missing, the unit is unknown, or the size rounds to zero bytes
            or exceeds 63 bits.
    """
    match = _SIZE.fullmatch(text)
    number = float(match[1]) * _FACTORS[match[2].upper()] if match else 0.0
    num_bytes = int(number) if number < _MOST_BYTES else 0
    if num_bytes <= 0:
        raise InvalidSizeError(f"'{text}' is not a size", hint="write a number and a unit, such as 900MiB, 8GiB or 8GB")
    return num_bytes


def size_text(num_bytes: int) -> str:
    """Return the shortest text that `parse_size` reads as exactly `num_bytes`."""
    units = ((GIB, "GiB"), (10**9, "GB"), (MIB, "MiB"), (10**6, "MB"))
    factor, unit = next((pair for pair in units if num_bytes % pair[0] == 0), (1, "B"))
    return f"{num_bytes // factor}{unit}"


def format_bytes(num_bytes: int) -> str:
    """Return a memory size for people to read, such as `9.8 GiB`, `37 MiB` or `512 B`."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{num_bytes} B"


def format_rate(bytes_per_s: float) -> str:
    """Return a link or disk rate for people to read, in GB/s (1e9 bytes per second) or MB/s."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"
