"""Request to load models, and the interfaces to report and to ask."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from specchat.records.plan import PlanChoices


@dataclass(frozen=True)
class ModelRequest:
    """Request to load models with the user's choices.

    Attributes:
        model: MODEL argument of the target, or None.
        draft: MODEL argument of the draft, or auto, none, self, retrieval.
        choices: settings of the plan that the user has fixed.
        offline: whether network access is forbidden.
        aliases: names that the user gave to models, for hints.
        tokenizer: MODEL argument whose tokenizer the target uses, for GGUF files; None for the file's own.
    """

    model: str | None = None
    draft: str = "auto"
    choices: PlanChoices = field(default_factory=PlanChoices)
    offline: bool = False
    aliases: tuple[str, ...] = ()
    tokenizer: str | None = None


class Reporter(Protocol):
    """Receiver of progress and warnings while models are found and loaded."""

    def moving(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Report progress while bytes move.

        Args:
            what: description of the activity, such as "downloading org/name".

        Returns:
            Context manager with a function that receives bytes so far and total bytes.
        """

    def warn(self, text: str) -> None:
        """Report a one-line warning about a request that was not met."""


# Function that asks the user a yes-no question; False if nobody can answer.
Ask = Callable[[str], bool]
