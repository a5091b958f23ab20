"""The interactive chat: reads messages, shows answers, runs slash commands. Ctrl-C loses neither message nor answer."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Literal

from specchat.chat.answer import Delta, Turn
from specchat.chat.session import ChatSession
from specchat.chat.state import Dropped, state_of
from specchat.errors import LostWorkerError, PromptTooLongError, SessionError, SpecchatError, UsageError
from specchat.ui import file_commands, info_commands
from specchat.ui.chat_view import ChatView
from specchat.ui.commands import BY_NAME, unknown
from specchat.ui.completion import CommandCompleter
from specchat.ui.console import typing_ahead, wants_styles
from specchat.ui.desk import Chat, Desk
from specchat.ui.idle import watching
from specchat.ui.prompt import PromptLine, unquoted

Records = Iterator[Delta | Dropped | Turn]

# Words that end other programs; here they may be a message.
_LEAVING = ("exit", "quit", "bye", ":q")
_ASKING_FOR_HELP = ("help", "?", ":h", "-h", "--help")
# An answer that takes longer rings the bell, if the user wants that.
_SLOW_S = 10.0
_FULL_HINT = "free space with /clear or /drop N, or restart with a larger --ctx"


def open_chat(chat: Chat, view: ChatView, history_file: Path | None, *, vi: bool = False) -> str | None:
    """Run a chat on this terminal until the user exits; return the model to go on with, or None.

    Args:
        chat: session and transcript.
        view: view of the answers.
        history_file: file of the prompt history; None keeps the history in memory.
        vi: whether the keys are those of vi.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice within two seconds.
        SpecchatError: the model could not be loaded.
    """
    completer = CommandCompleter({name: command.words for name, command in BY_NAME.items()})
    line = PromptLine(styled=wants_styles(sys.stdout), history_file=history_file, completer=completer, vi=vi)
    return Repl(chat, view, line).run()


class Repl:
    """The loop of a chat on a terminal, and its slash commands.

    Args:
        chat: session and transcript.
        view: view of the answers.
        line: prompt that reads messages.
    """

    def __init__(self, chat: Chat, view: ChatView, line: PromptLine) -> None:
        self._chat = chat
        self._view = view
        self._line = line
        self._talk = view.talk
        self._desk = Desk(chat, view)
        self._restored = ""
        self._editing: Literal["question", "answer"] | None = None
        self._warned_of_context = False
        self._next_model: str | None = None
        self._lost = False

    def run(self) -> str | None:
        """Run the chat until the user exits; return the model to go on with, or None.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed twice within two seconds.
            SpecchatError: the model could not be loaded.
        """
        for note in (*self._chat.notes, self._line.trouble):
            if note:
                self._talk.warn(note)
        self._talk.say("type /help for commands, Ctrl-D to exit", "dim")
        self._talk.say("")
        for name in file_commands.attach_unread(self._desk):
            self._talk.say(f"{name} goes with the next message", "dim")
        if exchanges := state_of(self._chat.transcript.records).exchanges:
            self._view.recall(exchanges[-1])
            self._talk.say("")
        # Between answer and prompt a single Ctrl-C has nothing to stop, and must not end the chat.
        with typing_ahead(sys.stdin), self._desk.interrupts.setting(Event()):
            while self._take_turn():
                self._talk.say("")
        return self._next_model

    # --- reading -------------------------------------------------------------------------------------------------

    def _take_turn(self) -> bool:
        """Read and handle one message; return False when the chat is over."""
        load = self._chat.load
        restored, self._restored = self._restored, ""
        if load.is_done:
            load.result()  # raises if loading failed while a command ran
        try:
            with watching(load.result().engine if load.is_done else None, self._tell_loss):
                text = self._line.read(restored, waiting=load, note=load.reporter.line)
        except EOFError:
            return False
        except KeyboardInterrupt:
            self._editing = None
            self._desk.interrupts.note()
            return True
        self._desk.interrupts.forget()
        self._desk.show_load_warnings()
        return self._handle(text)

    def _tell_loss(self, error: LostWorkerError) -> None:
        """Say above the prompt that no further question can be answered; commands that save the chat still can."""
        if not self._lost:
            self._lost = True
            self._line.show_above(lambda: self._talk.error(error.message, error.hint))

    def _handle(self, typed: str) -> bool:
        """Answer a message or run a command; return False when the chat is over."""
        text, block = typed.strip(), unquoted(typed)
        if not (text if block is None else block.strip()):
            return True
        if block is not None:
            self._send(block, typed)
        elif text.startswith("//"):
            self._send(text[1:], typed)
        elif text.startswith("/"):
            return self._handle_command(text)
        elif text.lower() in _LEAVING and self._line.confirms(f"leave the chat? (no sends '{text}' to the model)"):
            return False
        elif text.lower() in _ASKING_FOR_HELP and self._line.confirms(
            f"list the commands? (no sends '{text}' to the model)"
        ):
            self._run_command("help", "")
        else:
            self._send(text, typed)
        return True

    def _handle_command(self, text: str) -> bool:
        name, argument = (*text[1:].split(maxsplit=1), "", "")[:2]
        command = BY_NAME.get(name)
        if name != "read":
            self._editing = None
        if command is None:
            self._talk.tell(unknown(name))
        elif command.names[0] == "exit" and not argument:
            return False
        elif argument and not command.argument:
            self._talk.tell(f"/{name} takes no argument")
        elif not argument and command.argument and not command.argument.startswith("["):
            self._talk.tell(f"usage: /{name} {command.argument}")
        else:
            self._run_command(command.names[0], argument)
        return self._next_model is None

    def _run_command(self, name: str, argument: str) -> None:
        arguments = [argument] if BY_NAME[name].argument else []
        try:
            if name in _ACTIONS:
                _ACTIONS[name](self, *arguments)
            else:
                _DESK_ACTIONS[name](self._desk, *arguments)
        except SpecchatError as error:
            self._talk.error(error.message, error.hint)

    # --- answering -----------------------------------------------------------------------------------------------

    def _send(self, text: str, typed: str) -> None:
        """Send a message with its attached files; put it back at the prompt if there is no answer."""
        editing, self._editing = self._editing, None
        if editing == "answer":
            self._rewrite(text)
            return
        attached, self._desk.attached = self._desk.attached, []
        message = "\n\n".join([*(each.text for each in attached), text])

        def ask(session: ChatSession, cancel: Event) -> Records:
            return session.edit(message, cancel) if editing else session.ask(message, cancel)

        if not self._answer(ask):
            self._restored, self._desk.attached, self._editing = typed, attached, editing

    def _rewrite(self, text: str) -> None:
        """Put the user's words in the place of the last answer."""
        try:
            self._desk.session().rewrite(text)
        except SpecchatError as error:
            self._talk.error(error.message, error.hint)
        else:
            self._talk.tell("changed the last answer; the next answers build on it")

    def _answer(self, ask: Callable[[ChatSession, Event], Records]) -> bool:
        """Show an answer and its statistics; return False if no token was generated."""
        cancel = Event()
        self._view.out.write("\n")
        try:
            with self._desk.interrupts.setting(cancel):
                session = self._desk.loaded(cancel)
                if session is None:
                    self._talk.say("^C stopped before the model was loaded", "dim")
                    return False
                turn = self._view.follow(session, ask(session, cancel), cancel)
        except SessionError as error:  # the answer itself is complete and part of the chat
            self._talk.error(error.message, error.hint)
            return True
        except SpecchatError as error:
            if self._chat.load.error is error or isinstance(error, LostWorkerError):
                raise
            self._view.out.end_line()
            self._talk.error(error.message, _FULL_HINT if isinstance(error, PromptTooLongError) else error.hint)
            return False
        self._view.end(turn, session.engine.plan)
        if self._chat.rings and turn.timings.ttft_s + turn.timings.decode_s >= _SLOW_S:
            self._talk.ring()
        if turn.token_ids:
            self._desk.turns.append(turn)
        self._warn_of_context(session, turn)
        return bool(turn.token_ids)

    def _warn_of_context(self, session: ChatSession, turn: Turn) -> None:
        """Warn once when the context is nearly full."""
        is_low = session.context_is_low
        if is_low and not self._warned_of_context and turn.finish_reason != "context":
            self._talk.warn(f"context nearly full: {session.context_used:,} of {session.ctx:,} tokens; {_FULL_HINT}")
        self._warned_of_context = is_low

    # --- commands: answers ---------------------------------------------------------------------------------------

    def retry(self) -> None:
        """Answer the last message again."""
        session = self._desk.session()
        if session.sampling.greedy and session.history:
            self._talk.say(
                "greedy decoding repeats the same answer; for other answers, use /set temperature=0.7", "dim"
            )
        self._answer(lambda session, cancel: session.retry(cancel))

    def edit(self, what: str) -> None:
        """Put the last message or answer back at the prompt; the old one stays until the new one is sent."""
        if what not in ("", "answer"):
            raise UsageError(f"/edit takes answer or nothing, not '{what}'")
        exchanges = self._desk.session().state.exchanges
        if not exchanges:
            raise UsageError(f"no {what or 'message'} to edit")
        last = exchanges[-1]
        self._restored = last.answer.content if what else last.question
        self._editing = "answer" if what else "question"

    def model(self, name: str) -> None:
        """Leave this model for another one, which goes on with the chat."""
        self._chat.check_model(name)
        self._desk.session()  # a load that has begun cannot be given up
        self._next_model = name

    def continue_last(self) -> None:
        """Continue the last answer."""
        before = [each.answer for each in self._desk.session().state.exchanges[-1:]]
        is_answered = self._answer(lambda session, cancel: session.continue_last(cancel))
        if is_answered and [each.answer for each in self._desk.session().state.exchanges[-1:]] == before:
            self._talk.tell("the model adds nothing: it ends its answer here")

    def undo(self) -> None:
        """Remove the last message and its answer, and put the message back at the prompt."""
        self._restored = self._desk.session().undo()
        self._talk.tell("removed the last message and its answer")

    def drop(self, number: str) -> None:
        """Drop the oldest turns."""
        if not number.isdecimal():
            raise UsageError(f"/drop takes a number of turns, not '{number}'")
        session = self._desk.session()
        dropped = session.drop(int(number))
        turns = "turn" if dropped.num_exchanges == 1 else "turns"
        self._talk.tell(
            f"dropped {dropped.num_exchanges} {turns}; {session.context_used:,} of {session.ctx:,} tokens in use"
        )

    def clear(self) -> None:
        """Clear the chat."""
        self._desk.session().clear()
        self._desk.attached = []
        self._talk.tell("chat cleared")


# Functions by the main name of their command; each takes the argument if the command has one. `_handle_command`
# handles /exit.
_ACTIONS: dict[str, Callable[..., None]] = {
    "retry": Repl.retry,
    "edit": Repl.edit,
    "continue": Repl.continue_last,
    "undo": Repl.undo,
    "drop": Repl.drop,
    "clear": Repl.clear,
    "model": Repl.model,
}
_DESK_ACTIONS: dict[str, Callable[..., None]] = {
    "help": info_commands.help_,
    "system": info_commands.system,
    "set": info_commands.set_value,
    "think": info_commands.think,
    "history": info_commands.history,
    "stats": info_commands.stats,
    "info": info_commands.info,
    "verbose": info_commands.verbose,
    "read": file_commands.read,
    "save": file_commands.save,
    "load": file_commands.load,
    "sessions": file_commands.sessions,
    "copy": file_commands.copy,
}
