"""Files that are cut short while others have them mapped."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_WAIT_S = 0.2


def cut_short(path: Path, length: int) -> None:
    """Cut a file short; if it has a lease, do so as soon as the lease is given up."""
    thread = threading.Thread(target=os.truncate, args=(path, length), daemon=True)
    thread.start()
    thread.join(_WAIT_S)
