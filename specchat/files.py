"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import tempfile
from pathlib import Path


def atomic_write_text(file: Path, text: str, *, durably: bool = False) -> None:
    """Puts a text in the place of a file, whole or not at all; its folder is made.

    Args:
        file: what becomes of it.
        text: written as UTF-8.
        durably: whether it is on the disk on return, even if the machine then stops.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{file.stem}-", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durably:
                stream.flush()
                os.fsync(stream.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
