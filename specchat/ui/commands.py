"""The slash commands: names, arguments and help texts. `repl` implements them."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from specchat.chat.settings import OVERFLOWS, SETTABLE
from specchat.ui.completion import Words
from specchat.ui.rows import aligned


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        names: names without the slash; the first one is the main name.
        argument: argument as shown by /help; empty for none, in brackets if optional.
        help: one-line description.
        words: function that returns the completions of the argument; None completes file names.
    """

    names: tuple[str, ...]
    argument: str
    help: str
    words: Words = lambda: ()

    @property
    def usage(self) -> str:
        """Names and argument, as /help shows them."""
        return ", ".join(f"/{name}" for name in self.names) + (f" {self.argument}" if self.argument else "")


def _settings() -> Iterable[str]:
    closed = [f"overflow={word}" for word in OVERFLOWS] + [f"think={word}" for word in ("on", "off", "default")]
    return [*(f"{key}=" for key in SETTABLE), *closed, "seed=random", "max_tokens=none", "stop=none", "system=none"]


def _words(*words: str) -> Callable[[], Iterable[str]]:
    return lambda: words


def _models() -> Iterable[str]:
    from specchat.models.hub.cache import cached_models

    return ["demo", *cached_models()]


# Commands of similar tools, and what does the same here.
_ELSEWHERE = {
    **dict.fromkeys(("show", "config", "settings"), "/info and /set show what is in use"),
    **dict.fromkeys(
        ("list", "ls", "models"), "`specchat models` lists the models on this disk; /model NAME changes it"
    ),
    **dict.fromkeys(("new", "reset", "restart"), "/clear starts over"),
    **dict.fromkeys(("file", "attach", "add"), "/read FILE attaches a file"),
    **dict.fromkeys(("multi", "multiline"), '""" begins and ends a message of several lines'),
    **dict.fromkeys(("temperature", "temp", "seed", "parameter"), "/set KEY=VALUE changes a setting"),
    **dict.fromkeys(
        ("pull", "rm", "serve", "run"), "leave with Ctrl-D; specchat --help lists the commands of the shell"
    ),
}

COMMANDS = (
    Command(("help", "?"), "", "list commands and keys"),
    Command(("retry", "regen"), "", "answer the last message again, with a new seed"),
    Command(
        ("edit",), "[answer]", "edit the last message and answer it again, or edit the last answer", _words("answer")
    ),
    Command(("continue",), "", "continue the last answer"),
    Command(("undo",), "", "remove the last message and its answer"),
    Command(("drop",), "N", "remove the N oldest messages and their answers"),
    Command(("clear",), "", "clear the chat; keep the system prompt"),
    Command(("system",), "[TEXT]", "show or set the system prompt ('none' removes it)", _words("none")),
    Command(("set",), "[KEY=VALUE]", "show the settings or change one", _settings),
    Command(
        ("think",),
        "[on|off|show|hide]",
        "turn thinking on or off; show or hide it",
        _words("on", "off", "show", "hide"),
    ),
    Command(
        ("read",), "[FILE]", "attach a text file to the next message ('none' removes it), or list such files", None
    ),
    Command(("save",), "[FILE]", "show where the chat is saved, or write a copy (.md: Markdown, else JSON)", None),
    Command(("load",), "FILE|ID", "replace this chat with the one in FILE (.md or JSON) or with a saved chat", None),
    Command(("copy",), "[code]", "copy the last answer to the clipboard, or its last code block", _words("code")),
    Command(("history",), "", "show all messages of this chat"),
    Command(("sessions",), "[TEXT]", "list the saved chats, or those that contain TEXT"),
    Command(("model",), "NAME", "go on with another model", _models),
    Command(("stats",), "", "show the statistics of this chat"),
    Command(("info",), "", "show the plan, the context in use, and the source of each setting"),
    Command(("verbose",), "", "toggle the figures and the draft tree of each pass"),
    Command(("exit", "bye", "quit"), "", "exit; so does Ctrl-D on an empty line"),
)
BY_NAME = {name: command for command in COMMANDS for name in command.names}

_KEYS = (
    ("//...", "send a message that starts with a slash"),
    ("Enter", "send; Alt-Enter or Ctrl-J inserts a line break"),
    ('"""', "start and end a multi-line message, where Enter inserts a line break"),
    ("Up, Down, Ctrl-R", "recall earlier messages; Ctrl-R searches them"),
    ("Ctrl-X Ctrl-E", "edit the message in $EDITOR"),
    ("Ctrl-C", "stop the answer or clear the line; press twice to exit"),
)


def help_lines(width: int) -> list[str]:
    """Return the lines that /help prints, in two columns or, on a narrow terminal, below each other."""
    rows = [*((command.usage, command.help) for command in COMMANDS), *_KEYS]
    return aligned(rows, width)


def unknown(name: str) -> str:
    """Return the message for an unknown command."""
    if name in _ELSEWHERE:
        return f"there is no /{name}: {_ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, BY_NAME, n=1)
    suggestion = f"did you mean /{close[0]}?" if close else "type /help for a list"
    return f"unknown command /{name}: {suggestion} (start with // to send it as a message)"
