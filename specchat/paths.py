"""Folders of specchat on this machine, and paths that users type."""

import os
from pathlib import Path

from specchat.errors import UsageError

_LONGEST_NAME = 255  # bytes, on all common file systems
_LONGEST_PATH = 4000


def cache_folder() -> Path:
    """Return the folder of packs and measured rates; the folder need not exist yet.

    SPECCHAT_CACHE_DIR overrides the platform's cache folder.
    """
    if chosen := os.environ.get("SPECCHAT_CACHE_DIR"):
        return user_path(chosen)
    import platformdirs

    return user_path(platformdirs.user_cache_dir("specchat", appauthor=False))


def state_folder() -> Path:
    """Return the folder of saved chats, prompt history and statistics.

    SPECCHAT_STATE_DIR overrides the platform's state folder.
    """
    if chosen := os.environ.get("SPECCHAT_STATE_DIR"):
        return user_path(chosen)
    import platformdirs

    return user_path(platformdirs.user_state_dir("specchat", appauthor=False))


def user_path(text: str) -> Path:
    """Return the path that a user typed, with `~` expanded.

    Raises:
        UsageError: the text cannot be a path: it names an unknown home folder, contains NUL or half of a character, or
            is too long.
    """
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError as error:  # from a file of JSON; arguments of a command line always have bytes
        raise UsageError("a path cannot contain half of a character", hint="check the name of the file") from error
    if any(len(name) > _LONGEST_NAME for name in names) or len(text) > _LONGEST_PATH:
        raise UsageError(
            f"a path cannot be as long as {text[:20]}...", hint=f"names have at most {_LONGEST_NAME} bytes"
        )
    if "\0" in text:
        raise UsageError("a path cannot contain NUL", hint="check the name of the file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"'{text}' is not a home folder on this machine", hint="write the full path: /home/..."
        ) from error


def from_home(path: Path) -> str:
    """Shorten a path with ~, so that pasted reports do not show a user's name."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder
        return str(path)
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)
