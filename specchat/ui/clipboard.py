"""Text for other windows: through a program of the desktop, or asking the terminal."""

import base64
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import TextIO

from specchat.errors import NotAvailableError
from specchat.ui.live import can_redraw

_TIMEOUT_S = 5.0
# What xterm takes at most; others take more.
_MAX_OSC_52_BYTES = 74_994


def copy(text: str, terminal: TextIO) -> str:
    """Puts `text` on the clipboard; how that was done.

    Raises:
        NotAvailableError: there is no way to.
    """
    command = _program(os.environ)
    if command is not None and _gave_to(command, text):
        return f"with {command[0]}"
    encoded = base64.b64encode(text.encode())
    if can_redraw(terminal) and len(encoded) <= _MAX_OSC_52_BYTES:
        terminal.write(f"\x1b]52;c;{encoded.decode()}\x07")
        terminal.flush()
        return "by asking the terminal, which has to allow it"
    raise NotAvailableError(
        "there is no way to the clipboard from here", hint="install wl-copy, xclip or xsel, or /save FILE"
    )


def _program(environment: Mapping[str, str]) -> Sequence[str] | None:
    """What reaches the clipboard of the person who is typing; over ssh only the terminal does."""
    if "SSH_CONNECTION" in environment:
        return None
    candidates = [
        (True, ("pbcopy",)),
        ("WAYLAND_DISPLAY" in environment, ("wl-copy",)),
        ("DISPLAY" in environment, ("xclip", "-selection", "clipboard")),
        ("DISPLAY" in environment, ("xsel", "--clipboard", "--input")),
        ("WSL_DISTRO_NAME" in environment, ("clip.exe",)),
    ]
    return next((command for usable, command in candidates if usable and shutil.which(command[0])), None)


def _gave_to(command: Sequence[str], text: str) -> bool:
    """Whether the program took it. Its output is closed, or those that stay in the background would hold ours."""
    try:
        done = subprocess.run(
            command,
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
