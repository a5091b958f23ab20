"""Interactive chats on a pty with real keys and a screen; a fake engine replaces the model."""

import re

from support.terminal import Terminal

CTRL_C, CTRL_D, CTRL_E, CTRL_L, CTRL_R, CTRL_X = "\x03", "\x04", "\x05", "\x0c", "\x12", "\x18"
ENTER, TAB, UP = "\r", "\t", "\x1b[A"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"


def chat(*arguments, ready=True, **settings):
    terminal = Terminal("support.fake_cli", "run", "demo", *arguments, **settings)
    if ready:
        terminal.wait_for_prompt()
    return terminal


def say(terminal, text, shows):
    """Send a message or a command, and wait for the expected screen and the next prompt."""
    terminal.send(text + ENTER)
    terminal.wait_for(shows if callable(shows) else lambda t: re.search(shows, t.screen))
    terminal.wait_for_prompt()
