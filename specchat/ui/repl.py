"""The interactive chat: reads messages, shows answers, runs slash commands. Ctrl-C loses neither message nor answer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from specchat.chat import transcript as transcripts
from specchat.chat.answer import Delta, Turn
from specchat.chat.session import ChatSession
from specchat.chat.state import Dropped
from specchat.chat.transcript import Transcript
from specchat.errors import PromptTooLongError, SessionError, SpecchatError, UsageError
from specchat.paths import user_path
from specchat.records.chat import Setting
from specchat.ui import clipboard
from specchat.ui.chat_view import ChatView, info_lines, plan_line, totals_lines
from specchat.ui.commands import BY_NAME, help_lines, unknown
from specchat.ui.completion import CommandCompleter
from specchat.ui.console import typing_ahead, wants_styles
from specchat.ui.interrupts import Interrupts
from specchat.ui.loading import BackgroundLoad
from specchat.ui.prompt import PromptLine, unquoted

Records = Iterator[Delta | Dropped | Turn]

_FULL_HINT = "free space with /clear or /drop N, or restart with a larger --ctx"


@dataclass(frozen=True)
class Chat:
    """The parts of an interactive chat, except the screen.

    Attributes:
        load: background load of the session.
        transcript: writer of the saved session.
        settings: function that returns all settings and their sources.
        notes: warnings to show at the start.
    """

    load: BackgroundLoad[ChatSession]
    transcript: Transcript
    settings: Callable[[ChatSession], Sequence[Setting]]
    notes: Sequence[str] = ()


def open_chat(chat: Chat, view: ChatView, history_file: Path | None) -> None:
    """Run a chat on this terminal until the user exits.

    Args:
        chat: session and transcript.
        view: view of the answers.
        history_file: file of the prompt history; None keeps the history in memory.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice within two seconds.
        SpecchatError: the model could not be loaded.
    """
    completer = CommandCompleter({name: command.words for name, command in BY_NAME.items()})
    line = PromptLine(styled=wants_styles(sys.stdout), history_file=history_file, completer=completer)
    Repl(chat, view, line).run()


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
        self._restored = ""
        self._attached: list[str] = []
        self._is_editing = False
        self._warned_of_context = False
        self._turns: list[Turn] = []
        self._interrupts = Interrupts()

    def run(self) -> None:
        """Run the chat until the user exits.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed twice within two seconds.
            SpecchatError: the model could not be loaded.
        """
        for note in (*self._chat.notes, self._line.trouble):
            if note:
                self._talk.warn(note)
        self._talk.say("type /help for commands, Ctrl-D to exit", "dim")
        # Between answer and prompt a single Ctrl-C has nothing to stop, and must not end the chat.
        with typing_ahead(sys.stdin), self._interrupts.setting(Event()):
            while self._take_turn():
                self._talk.say("")

    # --- reading -------------------------------------------------------------------------------------------------

    def _take_turn(self) -> bool:
        """Read and handle one message; return False when the chat is over."""
        load = self._chat.load
        restored, self._restored = self._restored, ""
        if load.is_done:
            load.result()  # raises if loading failed while a command ran
        try:
            text = self._line.read(restored, waiting=load, note=load.reporter.line)
        except EOFError:
            return False
        except KeyboardInterrupt:
            self._is_editing = False
            self._interrupts.note()
            return True
        self._show_load_warnings()
        return self._handle(text)

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
        else:
            self._send(text, typed)
        return True

    def _handle_command(self, text: str) -> bool:
        name, argument = (*text[1:].split(maxsplit=1), "", "")[:2]
        command = BY_NAME.get(name)
        self._is_editing &= name == "read"
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
        return True

    def _run_command(self, name: str, argument: str) -> None:
        try:
            _ACTIONS[name](self, *([argument] if BY_NAME[name].argument else []))
        except SpecchatError as error:
            self._talk.error(error.message, error.hint)

    # --- answering -----------------------------------------------------------------------------------------------

    def _send(self, text: str, typed: str) -> None:
        """Send a message with its attached files; put it back at the prompt if there is no answer."""
        is_edit, self._is_editing = self._is_editing, False
        attached, self._attached = self._attached, []
        message = "\n\n".join([*attached, text])

        def ask(session: ChatSession, cancel: Event) -> Records:
            return session.edit(message, cancel) if is_edit else session.ask(message, cancel)

        if not self._answer(ask):
            self._restored, self._attached, self._is_editing = typed, attached, is_edit

    def _answer(self, ask: Callable[[ChatSession, Event], Records]) -> bool:
        """Show an answer and its statistics; return False if no token was generated."""
        cancel = Event()
        try:
            with self._interrupts.setting(cancel):
                session = self._loaded(cancel)
                if session is None:
                    self._talk.say("^C stopped before the model was loaded", "dim")
                    return False
                turn = self._view.follow(session, ask(session, cancel), cancel)
        except SessionError as error:  # the answer itself is complete and part of the chat
            self._talk.error(error.message, error.hint)
            return True
        except SpecchatError as error:
            if self._chat.load.error is error:
                raise
            self._view.out.end_line()
            self._talk.error(error.message, _FULL_HINT if isinstance(error, PromptTooLongError) else error.hint)
            return False
        self._view.end(turn, session.engine.plan)
        if turn.token_ids:
            self._turns.append(turn)
        self._warn_of_context(session, turn)
        return bool(turn.token_ids)

    def _loaded(self, cancel: Event) -> ChatSession | None:
        """Wait for the session and return it, or None if the user cancelled the wait."""
        self._view.wait_for(self._chat.load, cancel)
        self._show_load_warnings()
        return self._chat.load.result() if self._chat.load.is_done else None

    def _session(self) -> ChatSession:
        """Wait for the session and return it.

        Raises:
            UsageError: the user cancelled the wait.
        """
        cancel = Event()
        with self._interrupts.setting(cancel):
            session = self._loaded(cancel)
        if session is None:
            raise UsageError("the model is not loaded yet")
        return session

    def _show_load_warnings(self) -> None:
        for warning in self._chat.load.reporter.take_warnings():
            self._talk.warn(warning)

    def _warn_of_context(self, session: ChatSession, turn: Turn) -> None:
        """Warn once when the context is nearly full."""
        is_low = session.context_is_low
        if is_low and not self._warned_of_context and turn.finish_reason != "context":
            self._talk.warn(f"context nearly full: {session.context_used:,} of {session.ctx:,} tokens; {_FULL_HINT}")
        self._warned_of_context = is_low

    # --- commands: answers ---------------------------------------------------------------------------------------

    def retry(self) -> None:
        """Answer the last message again."""
        session = self._session()
        if session.sampling.greedy and session.history:
            self._talk.say(
                "greedy decoding repeats the same answer; for other answers, use /set temperature=0.7", "dim"
            )
        self._answer(lambda session, cancel: session.retry(cancel))

    def edit(self) -> None:
        """Put the last message back at the prompt; its answer stays until a new one begins."""
        exchanges = self._session().state.exchanges
        if not exchanges:
            raise UsageError("no message to edit")
        self._restored, self._is_editing = exchanges[-1].question, True

    def continue_last(self) -> None:
        """Continue the last answer."""
        self._answer(lambda session, cancel: session.continue_last(cancel))

    def undo(self) -> None:
        """Remove the last message and its answer, and put the message back at the prompt."""
        self._restored = self._session().undo()
        self._talk.tell("removed the last message and its answer")

    def drop(self, number: str) -> None:
        """Drop the oldest turns."""
        if not number.isdecimal():
            raise UsageError(f"/drop takes a number of turns, not '{number}'")
        session = self._session()
        dropped = session.drop(int(number))
        turns = "turn" if dropped.num_exchanges == 1 else "turns"
        self._talk.tell(
            f"dropped {dropped.num_exchanges} {turns}; {session.context_used:,} of {session.ctx:,} tokens in use"
        )

    def clear(self) -> None:
        """Clear the chat."""
        self._session().clear()
        self._attached = []
        self._talk.tell("chat cleared")

    # --- commands: settings --------------------------------------------------------------------------------------

    def system(self, text: str) -> None:
        """Show or change the system prompt."""
        session = self._session()
        if text:
            session.set_system(None if text == "none" else unquoted(text) or text)
        self._talk.tell(f"system prompt: {session.system or 'none'}")

    def set(self, assignment: str) -> None:
        """Show the settings of answers, or change one."""
        session = self._session()
        if not assignment:
            self._tell_settings(session.settings())
            return
        key, sign, value = assignment.partition("=")
        if not sign:
            key, _, value = assignment.partition(" ")
        if not value.strip():
            raise UsageError("/set takes KEY=VALUE", hint="list the keys with /set")
        parsed = session.set_sampling(key.strip(), value.strip())
        self._talk.tell(f"{key.strip()} = {'none' if parsed is None else parsed}")

    def think(self, word: str) -> None:
        """Switch thinking on or off, or show or fold the thinking."""
        session = self._session()
        match word:
            case "on" | "off":
                session.set_thinking(word == "on")
                self._talk.tell(f"thinking is {word}, starting with the next answer")
            case "show":
                self._view.shows_thinking = True
                self._show_last_thinking(session)
            case "hide":
                self._view.shows_thinking = False
                self._talk.tell("finished thinking will be hidden")
            case "":
                switch = {True: "on", False: "off", None: "model default"}[session.thinking]
                self._talk.tell(f"thinking: {switch}, {'shown' if self._view.shows_thinking else 'hidden'}")
            case _:
                raise UsageError(f"/think takes on, off, show or hide, not '{word}'")

    def _show_last_thinking(self, session: ChatSession) -> None:
        reasoning = session.state.exchanges[-1].answer.reasoning if session.state.exchanges else None
        self._talk.say(reasoning.strip() if reasoning else "thinking will be shown", "dim")

    # --- commands: files -----------------------------------------------------------------------------------------

    def read(self, file: str) -> None:
        """Attach a file's text to the next message."""
        path = user_path(file)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if not text.strip():
            raise UsageError(f"{path} is empty")
        self._attached.append(text.rstrip("\n"))
        self._talk.tell(f"attached {path.name} ({len(text):,} characters) to the next message")

    def save(self, file: str) -> None:
        """Write a copy of the chat, or show where the chat is saved."""
        if file:
            self._session()
            path = user_path(file)
            transcripts.export(self._chat.transcript.records, path)
            self._talk.tell(f"saved to {path}")
        elif self._chat.transcript.path is None:
            raise UsageError("this chat is not saved (--no-save)", hint="write a copy with /save FILE")
        else:
            self._talk.tell(
                f"chat saved in {self._chat.transcript.path}; "
                f"resume it with: specchat run MODEL --session {self._chat.transcript.session_id}"
            )

    def load(self, file: str) -> None:
        """Replace the chat with the one in a file."""
        session, path = self._session(), user_path(file)
        saved = transcripts.read(path)
        session.load(saved.records, str(path))
        if saved.repair:
            self._talk.warn(saved.repair)
        turns = len(session.state.exchanges)
        self._talk.tell(f"loaded {turns} turn{'' if turns == 1 else 's'} from {path}")

    def copy(self) -> None:
        """Copy the last answer to the clipboard."""
        exchanges = self._session().state.exchanges
        if not exchanges:
            raise UsageError("no answer to copy")
        text = exchanges[-1].answer.content
        how = clipboard.copy(text, self._view.out.stream)
        self._talk.tell(f"copied {len(text):,} characters {how}")

    # --- commands: information -----------------------------------------------------------------------------------

    def help(self) -> None:
        """List commands and keys."""
        for line in help_lines():
            self._talk.tell(line)

    def stats(self) -> None:
        """Show the statistics of this chat's answers."""
        if not self._turns:
            raise UsageError("no answers yet")
        for line in totals_lines(self._turns, self._session().engine.plan):
            self._talk.tell(line)

    def info(self) -> None:
        """Show the plan, the context in use, and the settings with their sources."""
        session = self._session()
        self._talk.tell(plan_line(session.engine.plan))
        self._talk.tell(f"context: {session.context_used:,} of {session.ctx:,} tokens in use")
        self._tell_settings(self._chat.settings(session))

    def verbose(self) -> None:
        """Toggle the display of each pass."""
        self._view.verbose = not self._view.verbose
        self._talk.tell("verbose on: each pass is shown" if self._view.verbose else "verbose off")

    def _tell_settings(self, settings: Sequence[Setting]) -> None:
        for line in info_lines(settings):
            self._talk.tell(line)


# Methods by the main name of their command; a method takes the argument if the command has one. `_handle_command`
# handles /exit.
_ACTIONS: dict[str, Callable[..., None]] = {
    "help": Repl.help,
    "retry": Repl.retry,
    "edit": Repl.edit,
    "continue": Repl.continue_last,
    "undo": Repl.undo,
    "drop": Repl.drop,
    "clear": Repl.clear,
    "system": Repl.system,
    "set": Repl.set,
    "think": Repl.think,
    "read": Repl.read,
    "save": Repl.save,
    "load": Repl.load,
    "copy": Repl.copy,
    "stats": Repl.stats,
    "info": Repl.info,
    "verbose": Repl.verbose,
}
