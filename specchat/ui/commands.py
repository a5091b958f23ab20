"""The slash commands: their names, what they take, and what /help says of them. What they do is in `repl`."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.chat.settings import KINDS
from specchat.ui.completion import Words


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        names: without the slash.
        argument: what may follow, as /help writes it; empty if nothing may, in brackets if it need not be there.
        help: what it does.
        words: what Tab offers behind it; None for files.
    """

    names: tuple[str, ...]
    argument: str
    help: str
    words: Words = lambda: ()

    @property
    def usage(self) -> str:
        """As /help shows it."""
        return ", ".join(f"/{name}" for name in self.names) + (f" {self.argument}" if self.argument else "")


def _settings() -> Iterable[str]:
    return [f"{key}=" for key in KINDS]


def _words(*words: str) -> Callable[[], Iterable[str]]:
    return lambda: words


COMMANDS = (
    Command(("help",), "", "this list"),
    Command(("retry",), "", "answer the last message again, differently if answers are sampled"),
    Command(("edit",), "", "change the last message, and have it answered again"),
    Command(("continue",), "", "let the last answer go on"),
    Command(("undo",), "", "take back the last message and its answer"),
    Command(("drop",), "N", "forget the N oldest messages and their answers"),
    Command(("clear",), "", "start over; the system prompt stays"),
    Command(("system",), "[TEXT]", "show or change the system prompt; none takes it away", _words("none")),
    Command(("set",), "[KEY=VALUE]", "show or change how answers are drawn", _settings),
    Command(
        ("think",), "[on|off|show|hide]", "let the model think; show its thinking", _words("on", "off", "show", "hide")
    ),
    Command(("read",), "FILE", "send a file's text along with the next message", None),
    Command(("save",), "[FILE]", "where this chat is kept; or write a copy (.md to be read, else .jsonl)", None),
    Command(("load",), "FILE", "take over the chat in a file", None),
    Command(("copy",), "", "put the last answer on the clipboard"),
    Command(("stats",), "", "what the answers of this chat took"),
    Command(("info",), "", "model, plan, and where each setting comes from"),
    Command(("verbose",), "", "show, or no longer, each pass with its tree of guesses"),
    Command(("exit", "bye", "quit"), "", "leave; Ctrl-D on an empty line does, too"),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}

_KEYS = (
    ("//...", "a message that starts with a slash"),
    ("Enter", "send; Alt-Enter or Ctrl-J breaks the line"),
    ('"""', "begins and ends a message in which Enter breaks the line"),
    ("Up, Down, Ctrl-R", "earlier messages; Ctrl-R searches them"),
    ("Ctrl-X Ctrl-E", "write the message in $EDITOR"),
    ("Ctrl-C", "stop the answer, or clear the line; twice leaves"),
)


def help_lines() -> list[str]:
    """What /help prints."""
    rows = [*((command.usage, command.help) for command in COMMANDS), *_KEYS]
    width = max(len(usage) for usage, _ in rows)
    return [f"{usage:<{width}}  {text}" for usage, text in rows]


def unknown(name: str) -> str:
    """What to say to a command that does not exist."""
    close = difflib.get_close_matches(name, BY_NAME, n=1)
    suggestion = f"did you mean /{close[0]}?" if close else "/help lists the commands"
    return f"there is no command /{name}: {suggestion} (// sends a slash)"
