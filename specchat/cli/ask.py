"""Questions on the terminal."""

import sys

from specchat.loading.request import Ask


def asker(*, yes: bool) -> Ask:
    """Return what asks a yes-no question on the terminal; where nobody can answer, the answer is no.

    Args:
        yes: whether every answer is yes without a question.
    """
    return lambda question: yes or _is_confirmed(question)


def _is_confirmed(question: str) -> bool:
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
