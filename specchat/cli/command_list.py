"""The list of commands in `specchat --help`."""

from typing import Any

from typer.core import TyperGroup


class CommandList(TyperGroup):
    """The commands of specchat; typer cuts their sentences on a narrow terminal, and this list wraps them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with what it does."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])
