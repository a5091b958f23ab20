"""The only place that turns errors into exit codes and into messages of one to three lines."""

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
from specchat.masking import masked
from specchat.terminal import leave_lost_terminal, terminal_is_lost

EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "failed while running",
    2: "invalid usage",
    3: "the model is missing or unreadable",
    4: "does not fit",
    5: "the requested device is unusable",
    129: "the terminal was closed (SIGHUP)",
    130: "interrupted (Ctrl-C, SIGINT)",
    141: "the reader closed the pipe (SIGPIPE)",
    143: "terminated (SIGTERM)",
}

_CODE_OF: tuple[tuple[type[SpecchatError], int], ...] = (
    (UsageError, 2),
    (ModelError, 3),
    (DoesNotFitError, 4),
    (DeviceUnusableError, 5),
)


def code_of(error: SpecchatError) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def guarded(action: Callable[[], int]) -> int:
    """Run the program, report any error, and return the exit code."""
    _open_missing_streams()
    _leave_on_signals()
    try:
        code = action()
        sys.stdout.flush()
        if code == 0 and terminal_is_lost():  # a closed terminal may be read as its end before the signal arrives
            code = 128 + signal.SIGHUP
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        code = _unread()
    except SystemExit as ending:
        code = _ended(ending)
    except Exception as error:  # noqa: BLE001  the last resort: a message instead of a traceback
        code = 128 + signal.SIGHUP if terminal_is_lost() else _explained(error)
    leave_lost_terminal()
    return code


def leave(code: int) -> NoReturn:
    """End the process at once.

    All resources of specchat are closed by now. A normal exit takes over a second to tear down torch's modules. Signals
    that come while libraries tidy up change nothing about the result.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _signum, _frame: os._exit(code))
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _open_missing_streams() -> None:
    """Open the null device in place of a closed stdout or stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open until the program ends


def _leave_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into SystemExit, so that all resources are closed."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        leave_lost_terminal()
        raise SystemExit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: keep that
            signal.signal(number, leave)


def _explained(error: Exception) -> int:
    """Print the error and return its exit code."""
    from specchat.ui.console import talk

    if os.environ.get("SPECCHAT_DEBUG") == "1":
        sys.stderr.write(masked("".join(traceback.format_exception(error))))
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
        return DoesNotFitError("out of memory", "use a smaller --vram or --ctx")
    if isinstance(error, OSError) and error.strerror:
        return SpecchatError(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return SpecchatError(f"internal error: {what}", "set SPECCHAT_DEBUG=1 for the traceback, and please report this")


def _unread() -> int:
    """Redirect a closed stdout or stderr to the null device, because Python would report the broken pipe at exit."""
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
