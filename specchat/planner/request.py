"""What a plan is asked for, and what it is made from: everything that a choice depends on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from specchat.hardware.machine import Machine
from specchat.planner.cost import TYPICAL_ACCEPTANCE, Acceptance
from specchat.planner.rates import Rates
from specchat.planner.statistics import Statistics
from specchat.records.model import ModelSource, ModelSpec, Quant
from specchat.units import MIB

# Up to this size full precision costs nothing that a user would notice, and is exact to the token.
EXACT_BYTES = 64 * MIB


@dataclass(frozen=True)
class PlanRequest:
    """What the user asked for; None and "auto" leave the choice open.

    Attributes:
        target, draft: local models; draft None is plain decoding.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" or a Dtype.
        vram_bytes: device memory budget (RAM on the CPU).
        ctx: committed tokens that the caches hold.
        tree_budget: draft nodes per tree.
        ram_bytes: cap on host memory.
        slots: staging buffers for streamed layers.
        quant: "auto" or a Quant: what the target's matrices are stored in.
        draft_quant: likewise for the draft; it changes nothing of the text, so "auto" asks for speed alone.
        draft_is_open: whether to plan without the draft where that is faster.
        lowers_for_speed: whether "auto" may lower the precision of what would fit, only slower.
        samples: whether answers are drawn, as against greedy: how much of a tree is accepted depends on it.
    """

    target: ModelSource
    draft: ModelSource | None
    device: str = "auto"
    dtype: str = "auto"
    vram_bytes: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    ram_bytes: int | None = None
    slots: int | None = None
    quant: Literal["auto"] | Quant = "auto"
    draft_quant: Literal["auto"] | Quant = "auto"
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
