"""Copying to the clipboard, through a desktop program or an OSC 52 sequence of the terminal."""

import base64
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import TextIO

from specchat.errors import NotAvailableError
from specchat.ui.live import can_redraw

_TIMEOUT_S = 5.0
# Limit of xterm in base64 bytes; other terminals accept more.
_MAX_OSC_52_BYTES = 74_994


def copy(text: str, terminal: TextIO) -> str:
    """Copy `text` to the clipboard, and return how it was copied, as a phrase.

    Raises:
        NotAvailableError: neither a program nor the terminal can copy the text.
    """
    command = _program(os.environ)
    if command is not None and _copied_with(command, text):
        return f"with {command[0]}"
    encoded = base64.b64encode(text.encode())
    if can_redraw(terminal) and len(encoded) <= _MAX_OSC_52_BYTES:
        terminal.write(f"\x1b]52;c;{encoded.decode()}\x07")
        terminal.flush()
        return "through the terminal, if its settings allow it"
    raise NotAvailableError(
        "cannot reach the clipboard", hint="install wl-copy, xclip or xsel, or save the chat with /save FILE"
    )


def _program(environment: Mapping[str, str]) -> Sequence[str] | None:
    """Return the program for the user's clipboard, or None; over ssh only the terminal reaches that clipboard."""
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


def _copied_with(command: Sequence[str], text: str) -> bool:
    """Pass the text to a program, and return whether it succeeded.

    The program's output is discarded. Programs that stay in the background would otherwise keep our streams open.
    """
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
