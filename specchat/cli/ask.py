"""Questions on the terminal."""

import sys

from specchat.loading.request import Ask


def asker(*, yes: bool) -> Ask:
    """Return a function that asks a yes-no question on the terminal; without a terminal, the answer is no.

    Args:
        yes: whether to answer yes without asking.
    """
    return lambda question: yes or _is_confirmed(question)


def can_ask() -> bool:
    """Return whether somebody can answer questions on the terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _is_confirmed(question: str) -> bool:
    if not can_ask():
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
