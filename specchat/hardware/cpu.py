"""The processor, as far as it decides how something is computed."""

import platform
from functools import cache
from pathlib import Path

_INTEL = "GenuineIntel"


@cache
def is_intel() -> bool:
    """Whether Intel made the processor; its mathematics library (MKL) is slow on the processors of others."""
    try:
        return _INTEL in Path("/proc/cpuinfo").read_text()
    except OSError:
        return _INTEL in platform.processor()
