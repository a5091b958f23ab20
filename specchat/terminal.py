"""The end of a terminal that was closed while the program used it."""

import errno
import os
import termios

_STANDARD_STREAMS = (0, 1, 2)


def terminal_is_lost() -> bool:
    """Return whether a standard stream is a terminal that was closed."""
    return any(map(_is_lost, _STANDARD_STREAMS))


def leave_lost_terminal() -> None:
    """Redirect the standard streams of a closed terminal to the null device; other streams stay.

    What is closed afterwards may then still write a last line.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in filter(_is_lost, _STANDARD_STREAMS):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _is_lost(stream: int) -> bool:
    """Return whether a descriptor is a terminal whose other end was closed."""
    try:
        termios.tcgetattr(stream)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False
