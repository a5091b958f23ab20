"""What a plan is asked for, and what it is made from: everything that a choice depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from specchat.hardware.machine import Machine
from specchat.planner.cost import TYPICAL_ACCEPTANCE, Acceptance
from specchat.planner.rates import Rates
from specchat.planner.statistics import Statistics
from specchat.records.model import ModelSource, ModelSpec, Quant
from specchat.records.plan import PlanChoices
from specchat.units import MIB

# Up to this size full precision costs nothing that a user would notice, and is exact to the token.
EXACT_BYTES = 64 * MIB


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for.

    Attributes:
        target, draft: local models; draft None is plain decoding.
        choices: what the user has decided.
        draft_is_open: whether to plan without the draft where that is faster.
        lowers_for_speed: whether "auto" may lower the precision of a target that would fit, only slower.
        samples: whether answers are drawn rather than greedy; the accepted length of a tree depends on it.
    """

    target: ModelSource
    draft: ModelSource | None
    choices: PlanChoices = field(default_factory=PlanChoices)
    draft_is_open: bool = False
    lowers_for_speed: bool = True
    samples: bool = False


@dataclass(frozen=True)
class PlanInputs:
    """What a choice is based on besides the request.

    Attributes:
        machine: memory, used or not.
        rates: as well as they are known.
        typical: of such machines, whatever has been measured on this one.
        target: its sizes by the precision asked for; looked into only where the choice turns on it.
        draft: its sizes, or None.
        prior: tokens per step of pairs like this one.
        statistics: what earlier chats have shown.
        lower_drafts: the same draft in fewer bytes, as far as that is open.
    """

    machine: Machine
    rates: Rates
    typical: Rates
    target: Callable[[Quant], ModelSpec]
    draft: ModelSpec | None = None
    prior: Acceptance = TYPICAL_ACCEPTANCE
    statistics: Statistics = field(default_factory=Statistics)
    lower_drafts: tuple[ModelSpec, ...] = ()

    def acceptance(self, target: ModelSpec, draft: ModelSpec | None, *, samples: bool) -> Acceptance:
        """Of a pair, as well as it is known of such answers.

        Args:
            target: of the pair.
            draft: likewise; None for plain decoding.
            samples: whether answers are drawn, as in `PlanRequest`.
        """
        if draft is None:
            return self.prior
        return self.statistics.acceptance(target.name, draft.name, self.prior, samples=samples)
