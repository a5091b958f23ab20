"""What is to be loaded, and who is told about it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from specchat.records.plan import PlanChoices


@dataclass(frozen=True)
class ModelRequest:
    """Which models to load, and what they may take.

    Attributes:
        model: MODEL argument of the target; None if it was left out.
        draft: MODEL argument of the draft, or auto, none, self, retrieval.
        choices: choices of the plan that are made already.
        offline: whether the network must not be touched.
        aliases: names that the user gave to models, for hints.
    """

    model: str | None = None
    draft: str = "auto"
    choices: PlanChoices = field(default_factory=PlanChoices)
    offline: bool = False
    aliases: tuple[str, ...] = ()


class Reporter(Protocol):
    """Receives what happens while models are found and loaded."""

    def moving(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Report progress while bytes move.

        Args:
            what: what is happening, such as "downloading org/name".

        Returns:
            A context whose function receives bytes so far and total bytes.
        """

    def warn(self, text: str) -> None:
        """Report one line about something that did not go as asked."""


# Asks a yes-no question; where nobody can answer, the answer is no.
Ask = Callable[[str], bool]
