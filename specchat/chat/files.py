"""Text files that go with a message."""

from pathlib import Path

from specchat.errors import UsageError
from specchat.files import read_given


def read_text(path: Path) -> str:
    """Return the text of a file, without line breaks at the end.

    Raises:
        UsageError: the file cannot be read, is empty, or is not text.
    """
    try:
        text = read_given(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise UsageError(f"{path} is empty")
    return text.rstrip("\n")
