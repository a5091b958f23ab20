"""Inputs of the planner: the request of the user, and the facts about machine, models and earlier chats."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from specchat.hardware.machine import Machine
from specchat.planner.acceptance import (
    BLOCK_ACCEPTANCE,
    COPY_GAIN,
    HEAD_ACCEPTANCE,
    INT4_GAIN,
    RETRIEVAL_ACCEPTANCE,
    TYPICAL_ACCEPTANCE,
    Acceptance,
)
from specchat.planner.experts import NOTHING_LEARNT, LearntExperts
from specchat.planner.rates import Rates
from specchat.planner.statistics import RETRIEVAL, Statistics
from specchat.records.model import ModelSource, ModelSpec, Quant
from specchat.records.plan import PlanChoices
from specchat.units import MIB

# Models up to this size run in full precision: the cost is not noticeable, and the text is exact to the token.
EXACT_BYTES = 64 * MIB


@dataclass(frozen=True)
class PlanRequest:
    """Request for a plan.

    Attributes:
        target, draft: local models; draft is None without a draft model.
        choices: settings that the user has fixed.
        draft_is_open: whether the plan may leave the draft out where plain decoding is faster.
        lowers_for_speed: whether "auto" may lower the precision of a target that fits, to gain speed.
        samples: whether answers are sampled rather than greedy; the accepted length depends on this.
        retrieval: whether draft nodes may come from the text itself, with a draft model or without.
        heads: heads of the target that may draft instead of `draft`.
        copy: the target's own low-bit copy that may draft instead of `draft`; None to leave it out.
        adapts: whether trees may be smaller than a tree budget that `choices` fix; without one they always may.
    """

    target: ModelSource
    draft: ModelSource | None
    choices: PlanChoices = field(default_factory=PlanChoices)
    draft_is_open: bool = False
    lowers_for_speed: bool = True
    samples: bool = False
    retrieval: bool = False
    heads: tuple[ModelSource, ...] = ()
    copy: ModelSource | None = None
    adapts: bool = False

    @property
    def is_adaptive(self) -> bool:
        """Whether trees may stay smaller where the last nodes would cost more time than they save."""
        return self.adapts or self.choices.tree_budget is None


@dataclass(frozen=True)
class Peer:
    """The way to another machine.

    Attributes:
        address: host and port, as users write them.
        hop_s: seconds of a message without content, one way.
        bytes_per_s: rate of rows.
    """

    address: str
    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class DeviceInputs:
    """Facts about a further device that layers may be dealt to.

    Attributes:
        machine: device and memory sizes, total and free.
        rates: speeds of the device.
        vram_bytes: memory budget of the user in bytes; None for the default.
        peer: way to another machine that has the device; None for this machine.
    """

    machine: Machine
    rates: Rates
    vram_bytes: int | None = None
    peer: Peer | None = None

    @property
    def name(self) -> str:
        """Name of the device in plans."""
        return self.machine.device if self.peer is None else f"{self.peer.address} {self.machine.device}"


@dataclass(frozen=True)
class PlanInputs:
    """Facts that a plan is based on besides the request.

    Attributes:
        machine: device and memory sizes, total and free.
        rates: speeds of this machine, measured where a report exists.
        typical: speeds of machines of this kind, without measurements.
        target: function from a precision to the sizes of the target; called only for precisions that matter.
        draft: sizes of the draft, or None.
        prior: typical acceptance of similar pairs.
        statistics: results of earlier chats.
        experts: uses of the target's experts in earlier chats.
        lower_drafts: sizes of the draft in lower precisions that the planner may choose.
        heads: sizes of the heads that may draft instead, in the precisions that the planner may choose.
        free_disk_bytes: free bytes on the disk of packs.
        others: devices besides the machine's that layers may be dealt to.
        rates_at_once: speeds of the machine's device while the links of all devices are in use; None for `rates`.
    """

    machine: Machine
    rates: Rates
    typical: Rates
    target: Callable[[Quant], ModelSpec]
    draft: ModelSpec | None = None
    prior: Acceptance = TYPICAL_ACCEPTANCE
    statistics: Statistics = field(default_factory=Statistics)
    experts: LearntExperts = NOTHING_LEARNT
    lower_drafts: tuple[ModelSpec, ...] = ()
    heads: tuple[ModelSpec, ...] = ()
    free_disk_bytes: int = 0
    others: tuple[DeviceInputs, ...] = ()
    rates_at_once: Rates | None = None

    def acceptance(self, target: ModelSpec, draft: ModelSpec | None, *, samples: bool) -> Acceptance:
        """Return the acceptance of a pair: measured in earlier chats if they had enough steps, else typical.

        Args:
            target: sizes of the target.
            draft: sizes of the draft; None for drafts without a model.
            samples: whether answers are sampled, as in `PlanRequest`.
        """
        if draft is None:
            return self.statistics.acceptance(target.name, RETRIEVAL, RETRIEVAL_ACCEPTANCE, samples=samples)
        of_copy = replace(self.prior, gain=COPY_GAIN * self.prior.gain)
        of_head = BLOCK_ACCEPTANCE if draft.is_block else HEAD_ACCEPTANCE
        prior = of_copy if draft.is_copy else of_head if draft.is_head else self.prior
        found = self.statistics.acceptance(target.name, draft.name, prior, samples=samples)
        # On a CPU, a draft is quantized for its memory: 4 bits may leave room for twice the context.
        is_coarse = draft.quant == "int4" and not draft.is_copy and self.machine.device != "cpu"
        return replace(found, gain=INT4_GAIN * found.gain) if is_coarse else found
