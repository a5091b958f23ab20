"""Errors of the command line's parser, with hints for commands and words of other tools."""

from collections.abc import Sequence

import typer

from specchat.cli.other_tools import COMMANDS, hint_for_command
from specchat.errors import UsageError

# Base class of all errors of typer's parser. The class has no public name, but its direct subclass BadParameter has.
ParserError: type[Exception] = typer.BadParameter.__bases__[0]


def usage_error(error: Exception, arguments: Sequence[str]) -> UsageError:
    """Return the error for arguments that the parser rejects."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split()).rstrip(".")
    if message.startswith("No such command") and (hint := hint_for_command(arguments[0])):
        return UsageError(f"there is no command '{arguments[0]}'", hint=hint)
    command = f"specchat {arguments[0]}" if arguments and arguments[0] in COMMANDS else "specchat"
    return UsageError(message[:1].lower() + message[1:], hint=f"{command} --help lists what it takes")
