"""Standard input: the whole text of a pipe or a file, with a note while a pipe stays silent."""

import io
import os
import select
import sys
from typing import TYPE_CHECKING

from specchat.errors import UsageError

if TYPE_CHECKING:
    from specchat.ui.console import Talk

_SILENT_S = 2.0
_CHUNK_BYTES = 1 << 16


def read_stdin(say: "Talk") -> str:
    """Return all text of stdin; tell the user once if nothing comes for two seconds.

    Args:
        say: stderr.

    Raises:
        UsageError: stdin is not UTF-8 text.
    """
    if sys.stdin is None:
        return ""
    try:
        data = _read_all(sys.stdin.fileno(), say)
    except io.UnsupportedOperation:  # not a file of the system
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError("stdin is not UTF-8 text") from error


def _read_all(descriptor: int, say: "Talk") -> bytes:
    chunks: list[bytes] = []
    told = False
    while True:
        if not told and not select.select([descriptor], [], [], _SILENT_S)[0]:
            told = True
            say.say("waiting for the end of standard input; if nothing is to be piped in, add < /dev/null", "dim")
        chunk = os.read(descriptor, _CHUNK_BYTES)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
