"""From errors to exit codes and the one to three lines that explain them; nothing else decides either."""

import atexit
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from specchat.errors import (
    DeviceUnusableError,
    DoesNotFitError,
    ModelError,
    SpecchatError,
    UsageError,
    is_lack_of_memory,
)

EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "failed while running",
    2: "asked wrongly",
    3: "the model cannot be had or read",
    4: "does not fit",
    5: "the requested device is unusable",
    129: "the terminal went away (SIGHUP)",
    130: "interrupted (Ctrl-C, SIGINT)",
    141: "nobody reads the output (closed pipe)",
    143: "terminated (SIGTERM)",
}

_CODE_OF: tuple[tuple[type[SpecchatError], int], ...] = (
    (UsageError, 2),
    (ModelError, 3),
    (DoesNotFitError, 4),
    (DeviceUnusableError, 5),
)


def code_of(error: SpecchatError) -> int:
    """The exit code for an error shown to a user."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def guarded(action: Callable[[], int]) -> int:
    """Runs the program and returns its exit code, whatever becomes of it."""
    _open_missing_streams()
    _leave_on_signals()
    try:
        code = action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = _unread()
    except SystemExit as ending:
        code = _ended(ending)
    except Exception as error:  # noqa: BLE001  the last resort: a line for the user instead of a traceback
        code = _explained(error)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process at once: everything of ours is closed by now, and Python would take apart torch's modules one by
    one, for more than a second in which the user waits for nothing.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _open_missing_streams() -> None:
    """Whoever started us with stdout or stderr closed does not want to read them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open until the program ends


def _leave_on_signals() -> None:
    """SIGTERM and SIGHUP unwind the program like an exception, so that everything open is closed."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants to be left alone
            signal.signal(number, leave)


def _explained(error: Exception) -> int:
    """Says what happened; the exit code for it."""
    from specchat.ui.console import talk

    if os.environ.get("SPECCHAT_DEBUG") == "1":
        traceback.print_exception(error)
    shown = _as_shown(error)
    try:
        talk().error(shown.message, shown.hint)
    except BrokenPipeError:
        return _unread()
    return code_of(shown)


def _as_shown(error: Exception) -> SpecchatError:
    if isinstance(error, SpecchatError):
        return error
    if is_lack_of_memory(error):
        return DoesNotFitError("this machine has run out of memory", "a smaller --vram or --ctx needs less")
    if isinstance(error, OSError) and error.strerror:
        return SpecchatError(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return SpecchatError(f"internal error: {what}", "SPECCHAT_DEBUG=1 shows where; please report it")


def _unread() -> int:
    """Points stdout and stderr away from the closed pipe, or Python would complain about it on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            os.dup2(nowhere, stream.fileno())
    return 128 + signal.SIGPIPE


def _ended(ending: SystemExit) -> int:
    return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
