"""The line where the user types. Only ever built on a terminal: prompt_toolkit writes to stdout."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class PromptLine:
    """Reads one message after the other: Enter sends, Alt-Enter and Ctrl-J break the line, Up and Down recall.

    Args:
        styled: whether colours may be used.
    """

    def __init__(self, *, styled: bool) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, _line, _wraps: "·".ljust(width),
            color_depth=None if styled else ColorDepth.DEPTH_1_BIT,
            enable_open_in_editor=False,
        )
        # A terminal that does not tell where its cursor is only costs a better guess of the free lines below.
        self._session.app.renderer.cpr_not_supported_callback = None

    def read(self, restored: str = "") -> str:
        """One message.

        Args:
            restored: text to start with: what was asked and not answered.

        Raises:
            KeyboardInterrupt: Ctrl-C; the line is dropped.
            EOFError: Ctrl-D on an empty line, or the terminal is gone.
        """
        with self._leaving_in_order():
            return self._session.prompt("> ", default=restored)

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


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
