"""The line where the user types. Only ever built on a terminal: prompt_toolkit writes to stdout."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
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


class Waiting(Protocol):
    """Something that goes on while the user types."""

    def start(self) -> None:
        """Begins, if it has not yet."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""

    @property
    def error(self) -> BaseException | None:
        """What it failed with, if it has."""


class PromptLine:
    """Reads one message after the other: Enter sends, Alt-Enter and Ctrl-J break the line, Up and Down recall.

    Args:
        styled: whether colours may be used.
        history_file: where typed lines are kept, readable by nobody else; None keeps them in memory.
        completer: what Tab offers.
    """

    def __init__(self, *, styled: bool, history_file: Path | None = None, completer: Completer | None = None) -> None:
        self._history = _history(history_file)
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, _line, _wraps: "·".ljust(width),
            color_depth=None if styled else ColorDepth.DEPTH_1_BIT,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            history=self._history,
            completer=completer,
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # a menu would keep lines free below the prompt at all times
            tempfile_suffix=".md",
            enable_suspend=True,
        )
        # A terminal that does not tell where its cursor is only costs a better guess of the free lines below.
        self._session.app.renderer.cpr_not_supported_callback = None

    @property
    def trouble(self) -> str | None:
        """Why what is typed is not kept, if it should be and is not."""
        return self._history.trouble if isinstance(self._history, _PrivateHistory) else None

    def read(self, restored: str = "", waiting: Waiting | None = None, note: Callable[[], str] | None = None) -> str:
        """One message.

        Args:
            restored: text to start with: what was asked and not answered.
            waiting: begins once the line is on the screen; if it fails while the user types, that is raised here.
            note: what to show below the line until `waiting` is done.

        Raises:
            KeyboardInterrupt: Ctrl-C; the line is dropped.
            EOFError: Ctrl-D on an empty line, or the terminal is gone.
            BaseException: whatever `waiting` failed with.
        """
        watch = None if waiting is None or waiting.is_done else waiting
        self._session.bottom_toolbar = None if watch is None else note
        with self._leaving_in_order():
            return self._session.prompt(
                "> ", default=restored, pre_run=None if watch is None else lambda: self._begin_watching(watch)
            )

    def _begin_watching(self, waiting: Waiting) -> None:
        get_app().create_background_task(self._watch(waiting))

    async def _watch(self, waiting: Waiting) -> None:
        """Keeps the note up to date; costs nothing any more once there is nothing to wait for."""
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
            self._history.append_string(typed)  # Up brings it back when the chat is started again
        app.exit(exception=waiting.error)

    @contextmanager
    def _leaving_in_order(self) -> Iterator[None]:
        """Lets signals that end the program end the prompt first, so that the terminal is set back."""

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
    """What stands between triple quotes, in which Enter breaks the line; None if there are none around the text."""
    stripped = text.strip()
    if not stripped.startswith(_QUOTES):
        return None
    return stripped.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")


def _is_open_block(buffer: Buffer) -> bool:
    text = buffer.text.strip()
    return text.startswith(_QUOTES) and (len(text) < 2 * len(_QUOTES) or not text.endswith(_QUOTES))


class _PrivateHistory(FileHistory):
    """Lines typed before, in a file that only its owner can read.

    Attributes:
        trouble: why they could not be kept.
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
        self.trouble = f"what you type is not kept: {error.strerror}: {error.filename}"


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
        event.current_buffer.open_in_editor(
            validate_and_handle=False
        )  # who leaves the editor has not sent anything yet

    @keys.add("enter", filter=in_block & ~is_searching)
    @keys.add("escape", "enter", filter=~is_searching)
    @keys.add("c-j", filter=~is_searching)
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
