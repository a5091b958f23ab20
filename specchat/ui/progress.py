"""One line that follows a download."""

import time
from types import TracebackType
from typing import Self

from specchat.ui.console import Talk
from specchat.units import format_bytes

_REDRAW_S = 0.2


class DownloadLine:
    """Shows how far a download is, in place, on terminals that can; says nothing elsewhere.

    Args:
        talk: where to.
        name: what is downloaded.
    """

    def __init__(self, talk: Talk, name: str) -> None:
        self._talk = talk
        self._name = name
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def update(self, done: int, total: int) -> None:
        """Bytes so far, and bytes altogether."""
        now = time.monotonic()
        if now - self._drawn_at < _REDRAW_S and done < total:
            return
        self._drawn_at = now
        self._talk.overwrite(f"downloading {self._name}: {format_bytes(done)} of {format_bytes(total)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn_at > float("-inf"):
            self._talk.overwrite("")
