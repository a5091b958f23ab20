"""Atomic file writes: a file is complete or unchanged, even if writing is interrupted."""

import os
import tempfile
from pathlib import Path


def atomic_write_text(file: Path, text: str, *, durably: bool = False) -> None:
    """Replace a file's content with a text atomically, and create the file's folder.

    Args:
        file: path of the file.
        text: new content, written as UTF-8.
        durably: whether to sync the content to the disk before returning, so that it survives a power cut.

    Raises:
        OSError: the file cannot be written.
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
