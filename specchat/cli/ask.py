"""Questions on the terminal."""

import sys

from specchat.loading.request import Ask


def asker(*, yes: bool) -> Ask:
    """Return a function that asks a yes-no question on the terminal; without a terminal, the answer is no.

    Args:
        yes: whether to answer yes without asking.
    """
    return lambda question: yes or _is_confirmed(question)


def _is_confirmed(question: str) -> bool:
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
