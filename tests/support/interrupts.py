"""Events that cancel a pass at a chosen layer."""

from __future__ import annotations

import threading


class CancelAt(threading.Event):
    """An event that is set from the n-th check on, and counts the checks."""

    def __init__(self, n: float = float("inf")) -> None:
        super().__init__()
        self.n = n
        self.looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks >= self.n
