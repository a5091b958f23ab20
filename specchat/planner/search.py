"""Choosing a plan: the one that is predicted to be the fastest, of all that fit.

What is open: the precision of the target, whether to draft, the size of trees, slots, which layers stay, and the
context where nothing larger fits. Everything that the user has settled stays as it is. The precision is the one choice
that changes the text, so it depends on nothing that changes from one run to the next: on what the machine has, never on
what is free, on what is typical of such machines, never on what was measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from typing import Literal

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec, Plan, Quant, cache_folder, state_folder
from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.hardware.probe import find_hardware, find_machine, remembered
from specchat.models.geometry import describe, layer_bytes, weight_bytes
from specchat.planner.cost import DEMO_ACCEPTANCE, TYPICAL_ACCEPTANCE, Acceptance, CostModel, Placement, Prediction
from specchat.planner.explain import Alternative, Choice, Chosen
from specchat.planner.memory import Workload, build_host_ledger, build_ledger
from specchat.planner.rates import UNKNOWN_RATES, Rates, rates_of
from specchat.planner.statistics import Statistics, load
from specchat.units import GIB, MIB, format_bytes

_LOWER: tuple[Quant, ...] = ("int8", "int4")
# int8 loses nothing that could be measured (perplexity +0.00%), but it is not the original: it has to be worth it.
LOWERED_IF_FASTER_BY = 1.3
DEFAULT_CTX = 8192
# The most nodes of a tree whose size follows what its nodes pay (engine/growth.py), the usual one first. A GPU computes
# hundreds of rows while a layer is on its way; on two CPU cores 128 rows take longer than the disk.
TREE_BUDGETS = {"cpu": (128, 64, 32, 16), "cuda": (256, 512, 128, 64, 32)}
CHUNK_ROWS = 512
# Up to this size full precision costs nothing that a user would notice, and is exact to the token.
EXACT_BYTES = 64 * MIB
NUM_SLOTS = 2
# A third slot takes a resident layer's place. While one layer is computed and the next one waits, its fill goes on, so
# that a pass whose reading and computing take about as long stays as fast as its reads alone.
SLOTS = (NUM_SLOTS, 3)
_LEAST_CTX = 512
# What cuBLAS keeps for itself and what the allocator of CUDA memory rounds up; not measured on a GPU yet.
CUDA_RESERVE_BYTES = 96 * MIB
# An expanded node may drop out of the tree again, so the draft may spend more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


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


@dataclass(frozen=True)
class Known:
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

    def acceptance(self, target: ModelSpec) -> Acceptance:
        """Of the pair, as well as it is known."""
        return (
            self.prior if self.draft is None else self.statistics.acceptance(target.name, self.draft.name, self.prior)
        )


def make_plan(request: PlanRequest) -> Plan:
    """As `choose_plan`, without the reasons."""
    return choose_plan(request).plan


def choose_plan(request: PlanRequest, warn: Callable[[str], None] = lambda _: None) -> Chosen:
    """The fastest plan for this machine and these models; nothing but configurations is read, nothing is measured.

    Args:
        request: what was asked for.
        warn: told in one line of statistics that cannot be read.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UsageError: a context the model has no positions for.
        DeviceUnusableError: the device asked for by name cannot be used.
    """
    machine = find_machine(request.device)
    folder = cache_folder()
    hardware = find_hardware(folder)
    measured = remembered(folder, hardware, machine, request.device)
    draft, *lower_drafts = _described_drafts(request)
    known = Known(
        machine=machine,
        rates=rates_of(hardware, machine, measured),
        typical=rates_of(hardware, machine),
        target=_describing(request.target),
        draft=draft,
        lower_drafts=tuple(each for each in lower_drafts if each is not None),
        prior=DEMO_ACCEPTANCE if request.target.is_toy else TYPICAL_ACCEPTANCE,
        statistics=load(state_folder(), warn),
    )
    return choose_for(request, known)


def _describing(source: ModelSource) -> Callable[[Quant], ModelSpec]:
    """Describes each precision once."""
    return lru_cache(maxsize=None)(lambda quant: describe(source, quant))


def _described_drafts(request: PlanRequest) -> list[ModelSpec | None]:
    """The draft, and what else it may be stored as; [None] without one."""
    if request.draft is None:
        return [None]
    if request.draft_quant != "auto":
        return [describe(request.draft, request.draft_quant)]
    draft = describe(request.draft)
    return [draft, *(describe(request.draft, quant) for quant in lower_quants(draft))]


def lower_quants(draft: ModelSpec) -> tuple[Quant, ...]:
    """What a draft may be quantized to: of small ones nothing is gained, and some come quantized."""
    is_small = draft.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES
    return () if is_small or draft.quant != "none" else _LOWER


def choose_for(request: PlanRequest, known: Known) -> Chosen:
    """`choose_plan` once everything is known; a pure function.

    Raises:
        DoesNotFitError, UsageError: as `choose_plan`.
    """
    quant = choose_quant(request, known)
    candidates = _candidates(request, known, quant.spec)
    best = max(candidates, key=_preference)
    plan = best.plan(request, known.machine)
    prediction = known.statistics.corrected(plan, best.prediction)
    return Chosen(plan, prediction, _choices(request, known, quant, best, candidates))


def plan_for(request: PlanRequest, machine: Machine, target: ModelSpec, draft: ModelSpec | None) -> Plan:
    """The plan for a target in this very precision, on a machine of which nothing else is known; a pure function."""
    known = Known(machine, UNKNOWN_RATES, UNKNOWN_RATES, lambda _: target, draft)
    return max(_candidates(request, known, target), key=_preference).plan(request, machine)


# --- precision ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Precision:
    """The target in the precision that was chosen, and why that one."""

    spec: ModelSpec
    why: str
    other: ModelSpec | None = None


def choose_quant(request: PlanRequest, known: Known) -> _Precision:
    """The target in the precision asked for, or with "auto" in the best that this machine can do with reasonably fast.

    The same command must give the same text on the same machine, whatever else runs there.
    """
    if request.quant != "auto":
        return _Precision(known.target(request.quant), "asked for")
    full = known.target("none")
    if full.quant != "none":
        return _Precision(full, "as it comes")
    dtype, total_bytes = _dtype(request, known.machine, full), known.machine.total_bytes
    if weight_bytes(full, dtype) <= total_bytes:
        return _full_or_int8(request, known, full) if request.lowers_for_speed else _Precision(full, "the original")
    int8 = known.target("int8")
    if weight_bytes(int8, dtype) <= total_bytes:
        return _Precision(int8, "the original exceeds all memory of this machine", full)
    return _Precision(known.target("int4"), "int8 exceeds all memory of this machine", int8)


def _full_or_int8(request: PlanRequest, known: Known, full: ModelSpec) -> _Precision:
    """The original where it fits the device, or where int8 would not be much faster."""
    idle = replace(known, machine=_idle(known.machine), rates=known.typical, statistics=Statistics())
    plain = _fastest(request, idle, full)
    if plain is not None and not plain.num_streamed:
        return _Precision(full, "the original fits")
    int8 = known.target("int8")
    lower = _fastest(request, idle, int8)
    if lower is None or (plain is not None and not _is_worth_it(lower.prediction, plain.prediction)):
        return _Precision(full, "the original, as int8 would hardly be faster", int8)
    return _Precision(int8, "as good as the original, and faster" if plain else "the original does not fit", full)


def _is_worth_it(lower: Prediction, full: Prediction) -> bool:
    return lower.tok_per_s >= LOWERED_IF_FASTER_BY * full.tok_per_s


def _idle(machine: Machine) -> Machine:
    """The machine with all its memory free."""
    on_cpu = machine.device == "cpu"
    ram = machine.total_bytes if on_cpu else machine.total_bytes - machine.device_total_bytes
    return replace(machine, device_free_bytes=machine.device_total_bytes, ram_available_bytes=max(ram, 0))


def _fastest(request: PlanRequest, known: Known, target: ModelSpec) -> "_Candidate | None":
    try:
        return max(_candidates(request, known, target), key=_preference)
    except DoesNotFitError:
        return None


_Otherwise = Callable[[Callable[["_Candidate"], bool], Callable[["_Candidate"], str]], Alternative | None]

# --- reasons -----------------------------------------------------------------------------------------------------


def _choices(
    request: PlanRequest, known: Known, quant: _Precision, best: "_Candidate", candidates: Sequence["_Candidate"]
) -> tuple[Choice, ...]:
    """Every choice with its reason, and what the best plan without it would do."""

    def otherwise(differs: Callable[["_Candidate"], bool], value: Callable[["_Candidate"], str]) -> Alternative | None:
        other = max((each for each in candidates if differs(each)), key=_preference, default=None)
        return None if other is None else Alternative(value(other), other.prediction.tok_per_s)

    work, device = best.work, known.machine.device
    choices = [
        Choice("device", device, _why_device(request, device), request.device != "auto"),
        Choice("dtype", work.dtype, _why_dtype(request, best), request.dtype != "auto"),
        Choice("quant", best.target.quant, quant.why, request.quant != "auto", _other_quant(request, known, quant)),
        _draft_choice(request, known, best, otherwise(lambda c: (c.draft is None) != (best.draft is None), _draft_of)),
        Choice("ctx", f"{work.ctx:,}", _why_ctx(request, best), request.ctx is not None),
    ]
    if best.draft is not None:
        choices += _draft_quant_choice(request, known, best.draft, otherwise)
        trees = otherwise(
            lambda c: c.draft is not None and c.work.tree_budget != work.tree_budget, lambda c: str(c.work.tree_budget)
        )
        nodes = best.prediction.tree_nodes
        why = "asked for" if request.tree_budget is not None else f"the most; about {nodes} nodes pay for their time"
        choices.append(Choice("tree-budget", str(work.tree_budget), why, request.tree_budget is not None, trees))
    choices.append(Choice("vram", format_bytes(best.budget_bytes), _why_budget(request, device), _is_set(request)))
    if best.num_streamed:
        slots = otherwise(lambda c: c.work.slots != work.slots, lambda c: str(c.work.slots))
        why = "asked for" if request.slots is not None else "layers on their way while one is computed"
        choices.append(Choice("slots", str(work.slots), why, request.slots is not None, slots))
    return tuple(choices)


def _is_set(request: PlanRequest) -> bool:
    return request.vram_bytes is not None


def _why_device(request: PlanRequest, device: str) -> str:
    if request.device != "auto":
        return "asked for"
    return "no CUDA device can be used" if device == "cpu" else "the first CUDA device"


def _why_dtype(request: PlanRequest, best: "_Candidate") -> str:
    if request.dtype != "auto":
        return "asked for"
    if best.work.dtype == best.target.dtype:
        return "the model's own"
    if best.target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "small enough to be exact"
    return f"{best.target.dtype} is slow here" if best.work.dtype == "fp32" else "fast enough, half the bytes"


def _why_ctx(request: PlanRequest, best: "_Candidate") -> str:
    if request.ctx is not None:
        return "asked for"
    if best.work.ctx == _ctx(request, best.target):
        return "all that the model has" if best.work.ctx == best.target.max_positions else "the usual"
    return "halved until everything fitted"


def _why_budget(request: PlanRequest, device: str) -> str:
    if request.vram_bytes is not None:
        return "asked for"
    return "free memory less a reserve for the system" if device == "cpu" else "free memory less 1 GiB"


def _draft_of(candidate: "_Candidate") -> str:
    return "none" if candidate.draft is None else candidate.draft.name


def _draft_choice(request: PlanRequest, known: Known, best: "_Candidate", other: Alternative | None) -> Choice:
    if known.draft is None:
        return Choice("draft", "none", "none known or asked for")
    if not request.draft_is_open:
        return Choice("draft", known.draft.name, "asked for", pinned=True, alternative=other)
    why = "plain decoding is faster here" if best.draft is None else _what_a_tree_brings(best.prediction)
    return Choice("draft", _draft_of(best), why, alternative=other)


def _draft_quant_choice(request: PlanRequest, known: Known, draft: ModelSpec, otherwise: "_Otherwise") -> list[Choice]:
    """Nothing where there was nothing to choose."""
    if request.draft_quant != "auto":
        return [Choice("draft-quant", draft.quant, "asked for", pinned=True)]
    if not known.lower_drafts:
        return []
    why = "the text stays the same, and more layers stay" if draft.quant in _LOWER else "as it comes"
    other = otherwise(
        lambda c: c.draft is not None and c.draft.quant != draft.quant, lambda c: c.draft.quant if c.draft else ""
    )
    return [Choice("draft-quant", draft.quant, why, alternative=other)]


def _what_a_tree_brings(prediction: Prediction) -> str:
    return f"{prediction.tokens_per_step:.1f} tokens a pass instead of 1"


def _other_quant(request: PlanRequest, known: Known, quant: _Precision) -> Alternative | None:
    """What the precision that was not chosen would do under the same conditions."""
    if quant.other is None:
        return None
    other = _fastest(request, known, quant.other)
    return Alternative(quant.other.quant, None if other is None else other.prediction.tok_per_s)


# --- the search --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A plan that fits, before it is written out."""

    target: ModelSpec
    draft: ModelSpec | None
    work: Workload
    resident: tuple[int, ...]
    in_ram: tuple[int, ...]
    budget_bytes: int
    prediction: Prediction

    @property
    def num_streamed(self) -> int:
        """Layers that are streamed."""
        return self.target.num_layers - len(self.resident)

    def plan(self, request: PlanRequest, machine: Machine) -> Plan:
        """The plan itself."""
        target, draft, work = self.target, self.draft, self.work
        kept = set(self.resident)
        sizes = {i: layer_bytes(target, i, work.dtype) for i in range(target.num_layers) if i not in kept}
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            device=machine.device,
            dtype=work.dtype,
            ctx=work.ctx,
            tree_budget=work.tree_budget,
            draft_rows=work.draft_rows,
            slots=work.slots,
            resident=self.resident,
            num_layers=target.num_layers,
            chunk_rows=work.chunk_rows,
            ledger=build_ledger(target, draft, work, self.resident),
            device_budget_bytes=self.budget_bytes,
            adaptive=request.tree_budget is None,
            draft_quant="none" if draft is None else draft.quant,
            lowered_from=target.dtype if request.quant == "auto" and target.quant in _LOWER else None,
            host_bytes=0 if machine.device == "cpu" else _host_bytes(sizes, self.in_ram, work.slots),
            streamed_bytes_per_step=sum(sizes.values()),
            in_ram=self.in_ram,
            host_ledger=build_host_ledger(sizes, self.in_ram, work.slots, machine.device),
        )


def _preference(candidate: _Candidate) -> tuple[float, ...]:
    """Larger is better: speed, then a draft as it is, the usual size of trees, and what takes least memory."""
    budgets = TREE_BUDGETS["cpu" if candidate.work.device == "cpu" else "cuda"]
    budget = candidate.work.tree_budget
    rank = budgets.index(budget) if budget in budgets else 0
    is_lower = candidate.draft is not None and candidate.draft.quant in _LOWER
    return candidate.prediction.tok_per_s, -is_lower, -rank, -candidate.work.slots


def _candidates(request: PlanRequest, known: Known, target: ModelSpec) -> list[_Candidate]:
    """Everything that fits, with a draft and without, each at the longest context at which any of it does.

    Raises:
        DoesNotFitError: nothing does.
        UsageError: a context the model has no positions for.
    """
    budget = request.vram_bytes if request.vram_bytes is not None else _default_budget(known.machine)
    shelves = _Shelves(target, _dtype(request, known.machine, target), request.slots)
    found = [
        candidate
        for draft in _drafts(request, known)
        for candidate in _with_draft(request, replace(known, draft=draft), target, shelves, budget)
    ]
    if found:
        return found
    raise _does_not_fit(request, known, target, shelves, budget)


def _with_draft(
    request: PlanRequest, known: Known, target: ModelSpec, shelves: "_Shelves", budget: int
) -> list[_Candidate]:
    """All that fits at the longest context; a default context is halved before giving up."""
    draft = known.draft
    model = CostModel(target, draft, shelves.dtype, known.machine.device, known.rates, known.acceptance(target))
    for ctx in _contexts(request, target):
        works = _workloads(request, known, shelves.dtype, ctx)
        placed = [each for work in works for each in shelves.fill(draft, work, budget)]
        if placed:
            tiered = [(each, *_predicted(request, known, model, shelves, each)) for each in placed]
            return [
                _Candidate(target, draft, each.work, each.resident, in_ram, budget, prediction)
                for each, in_ram, prediction in tiered
            ]
    return []


def _drafts(request: PlanRequest, known: Known) -> list[ModelSpec | None]:
    if known.draft is None:
        return [None]
    return [known.draft, *known.lower_drafts, *((None,) if request.draft_is_open else ())]


def _contexts(request: PlanRequest, target: ModelSpec) -> Iterator[int]:
    """Lengths to try, the longest first."""
    ctx = _ctx(request, target)
    yield ctx
    while request.ctx is None and ctx > _LEAST_CTX:
        ctx = max(ctx // 2, _LEAST_CTX)
        yield ctx


def _ctx(request: PlanRequest, target: ModelSpec) -> int:
    if request.ctx is None:
        return min(target.max_positions, DEFAULT_CTX)
    if request.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.ctx:,} is beyond the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    return request.ctx


def _workloads(request: PlanRequest, known: Known, dtype: Dtype, ctx: int) -> list[Workload]:
    """One for each size of trees that is open."""
    on_cpu = known.machine.device == "cpu"
    open_budgets = TREE_BUDGETS["cpu" if on_cpu else "cuda"]
    budgets = open_budgets if request.tree_budget is None else (request.tree_budget,)
    return [
        Workload(
            dtype=dtype,
            ctx=ctx,
            tree_budget=budget,
            draft_rows=DRAFT_ROWS_PER_NODE * budget,
            chunk_rows=CHUNK_ROWS,
            slots=0,
            device=known.machine.device,
            reserve_bytes=0 if on_cpu else CUDA_RESERVE_BYTES,
        )
        for budget in ((0,) if known.draft is None else budgets)
    ]


def _predicted(
    request: PlanRequest, known: Known, model: CostModel, shelves: "_Shelves", placed: "_Placed"
) -> tuple[tuple[int, ...], Prediction]:
    """Which streamed layers stay in host memory, and how fast that is."""
    kept = set(placed.resident)
    sizes = {i: size for i, size in enumerate(shelves.sizes) if i not in kept}
    on_cpu = known.machine.device == "cpu"
    in_ram = keep_in_ram(sizes, _host_room(request, known.machine, taken=placed.device_bytes if on_cpu else 0))
    ram_bytes = sum(sizes[i] for i in in_ram)
    placement = Placement(
        num_layers=len(shelves.sizes),
        num_in_ram=len(in_ram),
        num_on_disk=len(sizes) - len(in_ram),
        ram_bytes=ram_bytes,
        disk_bytes=sum(sizes.values()) - ram_bytes,
        slots=placed.work.slots,
    )
    return in_ram, model.predict(placement, placed.work.tree_budget, adaptive=request.tree_budget is None)


@dataclass(frozen=True)
class _Placed:
    """Layers that stay, the workload with its slots, and the sum of its ledger."""

    work: Workload
    resident: tuple[int, ...]
    device_bytes: int


class _Shelves:
    """Ways to divide a target's layers into resident and streamed ones.

    Args:
        target: its sizes.
        dtype: that they are stored in.
        slots: as asked for, or None.
    """

    def __init__(self, target: ModelSpec, dtype: Dtype, slots: int | None) -> None:
        self.dtype: Dtype = dtype
        self.sizes = tuple(layer_bytes(target, i, dtype) for i in range(target.num_layers))
        self._target = target
        self._slots = SLOTS if slots is None else (slots,)

    def fill(self, draft: ModelSpec | None, work: Workload, budget: int) -> list[_Placed]:
        """For every number of slots the most layers that the budget lets stay."""
        beside = self._beside(draft, work)
        placed = [self._most_resident(work, slots, beside, budget) for slots in self._slots]
        return list(dict.fromkeys(each for each in placed if each is not None))

    def least_bytes(self, draft: ModelSpec | None, work: Workload) -> int:
        """What it takes to run at all."""
        return self._beside(draft, work) + min(need for _, need, _ in self._divisions(self._slots[0]))

    def _beside(self, draft: ModelSpec | None, work: Workload) -> int:
        """Everything but layers and slots; it depends on neither."""
        ledger = build_ledger(self._target, draft, work, ())
        return sum(item.bytes for item in ledger)

    def _most_resident(self, work: Workload, slots: int, beside: int, budget: int) -> _Placed | None:
        for num_resident, need, slots_needed in self._divisions(slots):
            if beside + need <= budget:
                resident = interleaved(num_resident, len(self.sizes))
                return _Placed(replace(work, slots=slots_needed), resident, beside + need)
        return None

    def _divisions(self, slots: int) -> Iterator[tuple[int, int, int]]:
        """(resident layers, bytes with slots, slots), most resident ones first."""
        for count, slots_needed in _divisions(len(self.sizes), slots):
            resident_bytes, largest = self._needs[count]
            yield count, resident_bytes + slots_needed * largest, slots_needed

    @cached_property
    def _needs(self) -> list[tuple[int, int]]:
        """By the number of resident layers: their bytes, and the largest streamed one's."""
        return [_resident_bytes(self.sizes, count) for count in range(len(self.sizes) + 1)]


def _resident_bytes(sizes: Sequence[int], count: int) -> tuple[int, int]:
    if min(sizes) == max(sizes):  # as in most models
        return count * sizes[0], sizes[0] if count < len(sizes) else 0
    resident = set(interleaved(count, len(sizes)))
    streamed = [size for i, size in enumerate(sizes) if i not in resident]
    return sum(sizes) - sum(streamed), max(streamed, default=0)


def _divisions(num_layers: int, slots: int) -> Iterator[tuple[int, int]]:
    """Ways to divide layers into resident and streamed ones, best first: (resident, slots)."""
    yield num_layers, 0
    for num_streamed in range(slots + 1, num_layers + 1):  # as many slots as layers: they might as well stay
        yield num_layers - num_streamed, slots


def _does_not_fit(
    request: PlanRequest, known: Known, target: ModelSpec, shelves: _Shelves, budget: int
) -> DoesNotFitError:
    """With a hint that names the longest context that the budget allows."""
    least_known = replace(known, draft=_drafts(request, known)[-1])
    draft, ctx = least_known.draft, list(_contexts(request, target))[-1]
    work = min(_workloads(request, least_known, shelves.dtype, ctx), key=lambda work: work.tree_budget)
    fits, too_long = 0, ctx
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        enough = shelves.least_bytes(draft, replace(work, ctx=middle)) <= budget
        fits, too_long = (middle, too_long) if enough else (fits, middle)
    advice = "raise --vram, or lower --tree-budget" if draft is not None else "raise --vram"
    return DoesNotFitError(
        f"{target.name} needs at least {format_bytes(shelves.least_bytes(draft, work))} with --ctx {ctx:,}, "
        f"the budget is {format_bytes(budget)}",
        hint=f"--ctx {fits} would fit; else {advice}" if fits else advice,
    )


def _default_budget(machine: Machine) -> int:
    """Free memory less a reserve for everything else on the machine."""
    free = machine.device_free_bytes
    return usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def usable_ram(available_bytes: int) -> int:
    """What may be taken, or pinned, of the host's available memory without the rest of the system feeling it."""
    return max(available_bytes - max(4 * GIB, available_bytes // 10), 0)


def _host_room(request: PlanRequest, machine: Machine, *, taken: int) -> int:
    """Host memory for streamed layers; `taken` of what is usable is spoken for already."""
    room = max(usable_ram(machine.ram_available_bytes) - taken, 0)
    return room if request.ram_bytes is None else min(room, request.ram_bytes)


def keep_in_ram(sizes: Mapping[int, int], room: int) -> tuple[int, ...]:
    """The streamed layers that stay in host memory, spread evenly: while they are computed, the disk reads on.

    Args:
        sizes: bytes of the streamed layers, by index.
        room: bytes that there are for them.
    """
    streamed = tuple(sizes)
    most = min(len(streamed), room // min(sizes.values(), default=1))
    for count in range(most, 0, -1):
        kept = tuple(streamed[j] for j in interleaved(count, len(streamed)))
        if sum(sizes[i] for i in kept) <= room:
            return kept
    return ()


def _host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Host memory beside a GPU's: the layers that stay there, and slots for those that are read from the disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)


def _dtype(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    match request.dtype:
        case "bf16" | "fp16" | "fp32":
            return request.dtype
    if target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "fp32"
    if machine.device == "cpu":
        return "bf16" if target.dtype == "bf16" and machine.fast_bf16 else "fp32"
    if target.dtype == "fp16" or not machine.fast_bf16:
        return "fp16"
    return "bf16"


def smaller_plan(request: PlanRequest, plan: Plan) -> Plan:
    """The next plan to try after `plan` could not have its memory: fewer resident layers, then a smaller tree.

    Raises:
        DoesNotFitError: there is nothing left to give up.
    """
    less = replace(
        request,
        vram_bytes=plan.device_bytes - 1,
        ctx=plan.ctx,
        tree_budget=plan.tree_budget or None,
        draft=request.draft if plan.draft is not None else None,
        draft_is_open=False,
        quant=_as_planned(plan.quant, request.quant),
        draft_quant=_as_planned(plan.draft_quant, request.draft_quant),
    )
    try:
        smaller = make_plan(less)
    except DoesNotFitError:
        if plan.tree_budget <= 1:
            raise DoesNotFitError(
                f"{plan.target} needs {format_bytes(plan.device_bytes)} with --ctx {plan.ctx:,}, which cannot be had",
                hint="close other programs, or lower --ctx",
            ) from None
        smaller = make_plan(replace(less, tree_budget=plan.tree_budget // 2))
    return replace(smaller, adaptive=plan.adaptive, lowered_from=plan.lowered_from)


def _as_planned(planned: str, asked: Literal["auto"] | Quant) -> Literal["auto"] | Quant:
    """The plan's precision: what there is less memory for must not be answered in another."""
    return next((quant for quant in ("none", *_LOWER) if quant == planned), asked)


@cache
def interleaved(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Layers spread evenly among all, the last one not among them: of resident ones among streamed.

    While resident layers are computed, the next streamed ones come. Behind the last streamed layer nothing comes in a
    pass, so whatever is computed there leaves the link idle; and before the first one all slots are full already.
    """
    offset = max(num_layers // 2, num_chosen)
    ends = [(i * num_chosen + offset) // num_layers for i in range(num_layers + 1)]
    return tuple(i for i in range(num_layers) if ends[i + 1] > ends[i])
