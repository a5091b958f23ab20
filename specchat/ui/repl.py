"""The interactive chat: read a message, show the answer, and never lose either to a Ctrl-C."""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from specchat.chat.session import ChatSession
from specchat.errors import PromptTooLongError, SpecchatError
from specchat.ui.chat_view import ChatView
from specchat.ui.console import typing_ahead
from specchat.ui.interrupts import Interrupts
from specchat.ui.prompt import PromptLine


@dataclass(frozen=True)
class Command:
    """A slash command: its names, what /help says about it, and what it does (None: leave the chat)."""

    names: tuple[str, ...]
    help: str
    act: Callable[["Repl"], None] | None


class Repl:
    """A chat on a terminal.

    Args:
        session: holds the messages, and answers.
        view: shows the answers.
        line: reads the messages.
    """

    def __init__(self, session: ChatSession, view: ChatView, line: PromptLine) -> None:
        self._session = session
        self._view = view
        self._line = line
        self._restored = ""
        self._interrupts = Interrupts()

    def run(self) -> None:
        """Chats until the user leaves.

        Raises:
            KeyboardInterrupt: two Ctrl-C in quick succession.
        """
        self._view.talk.say("/help lists the commands, Ctrl-D leaves", "dim")
        with typing_ahead(sys.stdin):
            while self._take_turn():
                self._view.talk.say("")

    def _take_turn(self) -> bool:
        """Reads one message and does what it asks for; False when the chat is over."""
        try:
            text = self._line.read(self._take_restored())
        except EOFError:
            return False
        except KeyboardInterrupt:
            self._interrupts.note()
            return True
        return self._handle(text)

    def clear(self) -> None:
        """Starts the chat over."""
        self._session.clear()
        self._view.talk.tell("the chat is empty again")

    def help(self) -> None:
        """Lists commands and keys."""
        for line in help_lines():
            self._view.talk.tell(line)

    def _take_restored(self) -> str:
        restored, self._restored = self._restored, ""
        return restored

    def _handle(self, text: str) -> bool:
        """Answers or obeys; False when the chat is over."""
        text = text.strip()
        if not text:
            return True
        if text.startswith("//"):
            self._answer(text[1:], typed=text)
            return True
        if text.startswith("/"):
            return self._obey(text)
        self._answer(text, typed=text)
        return True

    def _obey(self, text: str) -> bool:
        name, _, rest = text[1:].partition(" ")
        command = _BY_NAME.get(name)
        if command is None:
            self._view.talk.tell(_unknown(name))
        elif rest.strip():
            self._view.talk.tell(f"/{name} takes no argument")
        elif command.act is None:
            return False
        else:
            command.act(self)
        return True

    def _answer(self, text: str, *, typed: str) -> None:
        """Sends `text`; what was typed comes back to the prompt if nothing comes of it."""
        cancel = Event()
        try:
            with self._interrupts.setting(cancel):
                turn = self._view.show(self._session.ask(text, cancel), self._view.write)
        except SpecchatError as error:
            self._view.out.end_line()
            too_long = isinstance(error, PromptTooLongError)
            self._view.talk.error(error.message, "/clear starts the chat over" if too_long else error.hint)
            self._restored = typed
            return
        self._view.end(turn, self._session.engine.plan)
        if not turn.token_ids:
            self._restored = typed


COMMANDS = (
    Command(("help",), "this list", Repl.help),
    Command(("clear",), "start over; the system prompt stays", Repl.clear),
    Command(("exit", "bye", "quit"), "leave; Ctrl-D on an empty line does, too", None),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}


def help_lines() -> list[str]:
    """What /help prints."""
    commands = [("/" + ", /".join(command.names), command.help) for command in COMMANDS]
    keys = [
        ("//...", "send a message that starts with a slash"),
        ("Enter", "send; Alt-Enter or Ctrl-J breaks the line"),
        ("Ctrl-C", "stop the answer, or clear the line; twice leaves"),
    ]
    return [f"{name:<18} {text}" for name, text in commands + keys]


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    suggestion = f"did you mean /{close[0]}?" if close else "/help lists the commands"
    return f"there is no command /{name}: {suggestion} (// sends a slash)"
