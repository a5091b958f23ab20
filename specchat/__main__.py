"""The `specchat` command, and `python -m specchat`."""

import os
import signal
import sys
import threading
from types import FrameType

# Time in which the callback has ended whose exception was dropped.
_AGAIN_S = 0.01


def main() -> None:
    """Run the command line; Ctrl-C ends the program without a traceback, even while it starts."""
    if "_SPECCHAT_COMPLETE" in os.environ:  # the shell asks for completions: there is nobody to tell anything
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.unraisablehook = _keep_ends
    try:
        from specchat.cli.app import main as run

        run()
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def _keep_ends(dropped: "sys.UnraisableHookArgs") -> None:
    """Raise an exception that ends the program again, if it was raised where Python drops exceptions.

    The handler of a signal runs between any two instructions, also within the callback of a weak reference or within
    `__del__`. Every import runs such a callback.

    Source: CPython, importlib._bootstrap._get_module_lock.
    """
    error = dropped.exc_value
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not isinstance(error, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(dropped)
        return
    ending: BaseException = error

    def raise_again(_signum: int, _frame: FrameType | None) -> None:
        raise ending

    signal.signal(signal.SIGALRM, raise_again)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


if __name__ == "__main__":
    main()
