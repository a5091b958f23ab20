"""Request to load models, and the interfaces to report and to ask."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from specchat.records.plan import PlanChoices

# Word of `--draft` for drafts without a model: repeats of the text, and the target's own earlier scores.
RETRIEVAL = "retrieval"
# Word of `--draft` for the layer among the target's files that guesses further tokens.
MTP = "mtp"
# Word of `--draft` for the target's own low-bit copy.
SELF = "self"


@dataclass(frozen=True)
class WorkersChoice:
    """Machines that compute layers of the target beside this one.

    Attributes:
        addresses: host and port of each.
        token: token that all machines know.
    """

    addresses: tuple[tuple[str, int], ...]
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class ModelRequest:
    """Request to load models with the user's choices.

    Attributes:
        model: MODEL argument of the target, or None.
        draft: MODEL argument of the draft, mtp, self, auto, none or retrieval; with +retrieval for both.
        choices: settings of the plan that the user has fixed.
        offline: whether network access is forbidden.
        aliases: names that the user gave to models, for hints.
        tokenizer: MODEL argument whose tokenizer the target uses, for GGUF files; None for the file's own.
        workers: other machines that compute layers; None for this one alone.
    """

    model: str | None = None
    draft: str = "auto"
    choices: PlanChoices = field(default_factory=PlanChoices)
    offline: bool = False
    aliases: tuple[str, ...] = ()
    tokenizer: str | None = None
    workers: WorkersChoice | None = None

    @property
    def draft_model(self) -> str:
        """MODEL argument of the draft, or "mtp", "self", "auto" or "none"."""
        models = [part for part in self._draft_parts if part != RETRIEVAL]
        return "+".join(models) or "none"

    @property
    def retrieval(self) -> bool:
        """Whether drafts may come from the text itself; "auto" includes such drafts where they cost nothing."""
        return self.draft == "auto" or RETRIEVAL in self._draft_parts

    @property
    def _draft_parts(self) -> list[str]:
        return self.draft.split("+") if RETRIEVAL in self.draft.split("+") else [self.draft]


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
