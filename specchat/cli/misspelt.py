"""Errors of the command line's parser, with hints for commands and words of other tools."""

import shlex
from collections.abc import Sequence

import typer

from specchat.errors import UsageError
from specchat.models.catalog.suggest import looks_like_prompt

# Base class of all errors of typer's parser. The class has no public name, but its direct subclass BadParameter has.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]

_COMMANDS = ("run", "bench", "probe", "serve", "models", "sessions")

# Commands of similar tools, and what does the same here.
_ELSEWHERE = {
    **dict.fromkeys(("list", "ls", "ps"), "`specchat models` lists the models on this disk"),
    **dict.fromkeys(("pull", "download", "get"), "`specchat run MODEL` downloads a missing model after asking"),
    **dict.fromkeys(("rm", "remove", "delete"), "`specchat models rm NAME` removes a model"),
    **dict.fromkeys(("logs", "history", "chats"), "`specchat sessions` lists the saved chats"),
    **dict.fromkeys(("show", "info"), "`specchat probe MODEL` shows the plan and the speed of a model"),
    **dict.fromkeys(("chat", "generate", "start"), "`specchat run MODEL` starts a chat"),
    **dict.fromkeys(("server", "api", "listen"), "`specchat serve MODEL` is a server that speaks OpenAI's API"),
    "help": "`specchat --help` lists the commands",
    "version": "`specchat --version` prints the version",
}


def usage_error(error: Exception, arguments: Sequence[str]) -> UsageError:
    """Return the error for arguments that the parser rejects."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split()).rstrip(".")
    if message.startswith("No such command") and (hint := _command_hint(arguments)):
        return UsageError(f"there is no command '{arguments[0]}'", hint=hint)
    command = f"specchat {arguments[0]}" if arguments and arguments[0] in _COMMANDS else "specchat"
    return UsageError(message[:1].lower() + message[1:], hint=f"{command} --help lists what it takes")


def _command_hint(arguments: Sequence[str]) -> str | None:
    """Return the hint for a model, a prompt or another tool's command in a command's place; None for other words."""
    word = arguments[0]
    if word == "demo" or "/" in word:
        return f"did you mean specchat run {shlex.quote(word)}?"
    return "usage: specchat run MODEL [PROMPT]" if looks_like_prompt(word) else _ELSEWHERE.get(word)
