"""The prompt where the user types. It needs a terminal, because prompt_toolkit writes to stdout."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import Completer
from prompt_toolkit.filters import Condition, is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.search import accept_search
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_QUOTES = '"""'
_POLL_S = 0.25
_STYLES = {"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold fg:ansicyan"}


class Waiting(Protocol):
    """A background task that runs while the user types."""

    def start(self) -> None:
        """Start the task, if it has not started yet."""

    @property
    def is_done(self) -> bool:
        """Whether the task has succeeded or failed."""

    @property
    def error(self) -> BaseException | None:
        """Error of a failed task, or None."""


class PromptLine:
    """The prompt: Enter sends, Alt-Enter and Ctrl-J insert a line break, Up and Down recall earlier messages.

    Args:
        styled: whether to use colours.
        history_file: file of the prompt history, readable by its owner only; None keeps the history in memory.
        completer: completer for Tab.
        vi: whether the keys are those of vi.
    """

    def __init__(
        self,
        *,
        styled: bool,
        history_file: Path | None = None,
        completer: Completer | None = None,
        vi: bool = False,
    ) -> None:
        self._history = _history(history_file)
        self._depth = None if styled else ColorDepth.DEPTH_1_BIT
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, _line, _wraps: " " * width,
            color_depth=self._depth,
            vi_mode=vi,
            style=Style.from_dict(_STYLES if styled else {"bottom-toolbar": "noreverse"}),
            history=self._history,
            completer=completer,
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would always reserve lines below the prompt
            tempfile_suffix=".md",
            enable_suspend=True,
        )
        # Without cursor position reports, prompt_toolkit only estimates the free lines below. Do not warn about that.
        self._session.app.renderer.cpr_not_supported_callback = None

    @property
    def trouble(self) -> str | None:
        """Reason why the prompt history cannot be saved, or None."""
        return self._history.trouble if isinstance(self._history, _PrivateHistory) else None

    def read(self, restored: str = "", waiting: Waiting | None = None, note: Callable[[], str] | None = None) -> str:
        """Read one message.

        Args:
            restored: initial text, such as a message that got no answer.
            waiting: background task, started once the prompt is on the screen; None for no task.
            note: function that returns the text below the prompt until `waiting` is done.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the text is dropped.
            EOFError: Ctrl-D was pressed on an empty line, or the terminal is gone.
            BaseException: `waiting` failed with this error while the user was typing.
        """
        watch = None if waiting is None or waiting.is_done else waiting
        self._session.bottom_toolbar = None if watch is None else note
        with self._exiting_cleanly():
            return self._session.prompt(
                [("class:prompt", "> ")],
                default=restored,
                pre_run=None if watch is None else lambda: self._begin_watching(watch),
            )

    def show_above(self, show: Callable[[], None]) -> None:
        """Print above the prompt while it is read by another thread; what was typed stays.

        Args:
            show: function that prints.
        """
        app = self._session.app
        if app.is_running and app.loop is not None:
            app.loop.call_soon_threadsafe(lambda: run_in_terminal(show))
        else:
            show()

    def confirms(self, question: str) -> bool:
        """Ask a yes-no question below the prompt; Enter and Ctrl-D mean yes, Ctrl-C means no."""
        try:
            answer = PromptSession[str](color_depth=self._depth, history=InMemoryHistory()).prompt(f"{question} [Y/n] ")
        except EOFError:
            return True
        except KeyboardInterrupt:
            return False
        return answer.strip().lower() in ("", "y", "yes")

    def _begin_watching(self, waiting: Waiting) -> None:
        get_app().create_background_task(self._watch(waiting))

    async def _watch(self, waiting: Waiting) -> None:
        """Refresh the note until the task is done, and end the prompt if the task fails."""
        app = self._session.app
        waiting.start()
        while not waiting.is_done:
            app.invalidate()
            await asyncio.sleep(_POLL_S)
        self._session.bottom_toolbar = None
        if waiting.error is None:
            app.invalidate()
            return
        typed = self._session.default_buffer.text
        if typed.strip():
            self._history.append_string(typed)  # Up recalls the text when the chat is started again
        app.exit(exception=waiting.error)

    @contextmanager
    def _exiting_cleanly(self) -> Iterator[None]:
        """On a signal that ends the program, end the prompt first, so that the terminal is restored."""

        def leave(signum: int, _frame: FrameType | None) -> None:
            app = self._session.app
            ending = SystemExit(128 + signum)
            if app.is_running and app.loop is not None:
                app.loop.call_soon_threadsafe(lambda: app.exit(exception=ending))
            else:
                raise ending

        before = {number: signal.signal(number, leave) for number in _ENDING_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def unquoted(text: str) -> str | None:
    """Return the text between triple quotes, or None if the text does not start with them."""
    stripped = text.strip()
    if not stripped.startswith(_QUOTES):
        return None
    return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def _is_open_block(buffer: Buffer) -> bool:
    text = buffer.text.strip()
    return text.startswith(_QUOTES) and (len(text) < 2 * len(_QUOTES) or not text.endswith(_QUOTES))


class _PrivateHistory(FileHistory):
    """The prompt history in a file that only its owner can read.

    Attributes:
        trouble: reason why the history cannot be saved, or None.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.trouble: str | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            path.chmod(0o600)
        except OSError as error:
            self._failed(error)

    def store_string(self, string: str) -> None:
        if self.trouble is None:
            try:
                super().store_string(string)
            except OSError as error:
                self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.trouble = f"cannot save the prompt history: {error.strerror}: {error.filename}"


def _history(path: Path | None) -> History:
    return InMemoryHistory() if path is None else _PrivateHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()
    in_block = Condition(lambda: _is_open_block(get_app().current_buffer))

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("enter", filter=is_searching)
    def _send_found(event: KeyPressEvent) -> None:
        accept_search()
        event.current_buffer.validate_and_handle()

    @keys.add("c-x", "c-e", filter=~is_searching)
    def _edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor(validate_and_handle=False)  # closing the editor does not send the message

    @keys.add("enter", filter=in_block & ~is_searching)
    @keys.add("escape", "enter", filter=~is_searching)
    @keys.add("c-j", filter=~is_searching)
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
