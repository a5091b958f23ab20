"""Every plan that fits, with its predicted speed, of a target in one precision.

What is open: whether to draft, the size of trees, slots, which layers stay, and the context where nothing larger fits.
Everything that the user has settled stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import layer_sizes
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.memory import (
    build_host_ledger,
    build_ledger,
    bytes_beside_layers,
    host_embedding_bytes,
    host_embeddings,
    lookup_bytes,
)
from specchat.planner.placement import TierSizes, among, interleaved, placement_options, usable_ram
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.records.model import DTYPE_BYTES, LOWER_QUANTS, Dtype, ModelSpec
from specchat.records.plan import Placement, Plan, PlanChoices, Workload
from specchat.units import GIB, MIB, format_bytes

DEFAULT_CTX = 8192
_LEAST_CTX = 512
# The most nodes of a tree whose size follows what its nodes pay (engine/drafting), the usual one first. A GPU computes
# hundreds of rows while a layer is on its way; on two CPU cores 128 rows take longer than the disk.
TREE_BUDGETS = {"cpu": (128, 64, 32, 16), "cuda": (256, 512, 128, 64, 32)}
CHUNK_ROWS = 512
# What cuBLAS keeps for itself and what the allocator of CUDA memory rounds up; not measured on a GPU yet.
CUDA_RESERVE_BYTES = 96 * MIB
# An expanded node may drop out of the tree again, so the draft may spend more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


@dataclass(frozen=True)
class Candidate:
    """A plan that fits, before it is written out.

    Attributes:
        target, draft: their sizes.
        work: device, dtype, context and trees.
        sizes: how many layers lie in each tier.
        vram_bytes: device memory budget in bytes.
        tok_per_s: as predicted.
        adaptive: whether trees may be smaller than the budget of the work.
        model: what predicts.
    """

    target: ModelSpec
    draft: ModelSpec | None
    work: Workload
    sizes: TierSizes
    vram_bytes: int
    tok_per_s: float
    adaptive: bool
    model: CostModel

    @cached_property
    def prediction(self) -> Prediction:
        """All that is predicted of it."""
        return self.model.predict(self.sizes, self.work.tree_budget, adaptive=self.adaptive)

    @property
    def slots(self) -> int:
        """Staging buffers for streamed layers."""
        return self.sizes.slots

    @property
    def num_streamed(self) -> int:
        """Layers that are streamed."""
        return self.sizes.num_streamed

    def plan(self, choices: PlanChoices, machine: Machine) -> Plan:
        """The plan itself."""
        target, draft, work = self.target, self.draft, self.work
        resident = interleaved(target.num_layers - self.num_streamed, target.num_layers)
        kept, all_sizes = set(resident), layer_sizes(target, work.dtype)
        sizes = {i: size for i, size in enumerate(all_sizes) if i not in kept}
        in_ram = among(sizes, self.sizes.num_in_ram)
        placement = Placement(target.num_layers, resident, in_ram, self.slots)
        beside_gpu = _host_bytes(sizes, in_ram, self.slots) + host_embedding_bytes(target, work)
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            work=work,
            placement=placement,
            ledger=build_ledger(target, draft, work, placement),
            vram_bytes=self.vram_bytes,
            host_bytes=0 if machine.device == "cpu" else beside_gpu,
            streamed_bytes_per_step=sum(sizes.values()),
            adaptive=self.adaptive,
            draft_quant="none" if draft is None else draft.quant,
            lowered_from=target.dtype if choices.quant == "auto" and target.quant in LOWER_QUANTS else None,
            host_ledger=build_host_ledger(sizes, in_ram, self.slots, machine.device, host_embeddings(target, work)),
            expected=self.model.expectation(self.sizes, work.tree_budget) if self.adaptive else None,
        )


def preference(candidate: Candidate) -> tuple[float, ...]:
    """Larger is better: speed, then a draft as it is, the usual size of trees, and what takes least memory."""
    budgets, budget = _open_budgets(candidate.work.device), candidate.work.tree_budget
    rank = budgets.index(budget) if budget in budgets else 0
    is_lower = candidate.draft is not None and candidate.draft.quant in LOWER_QUANTS
    return _rounded(candidate.tok_per_s), -is_lower, -rank, -candidate.slots


def _rounded(tok_per_s: float) -> float:
    """Equal speeds differ in how they were added up."""
    return round(tok_per_s, 6)


class Candidates:
    """Everything that fits, with a draft and without, each at the longest context at which any of it does.

    Args:
        request: what was asked for.
        known: what the choice is based on.
        target: its sizes, in one precision.

    Raises:
        UsageError: a context the model has no positions for.
    """

    def __init__(self, request: PlanRequest, known: PlanInputs, target: ModelSpec) -> None:
        self._request = request
        self._choices = request.choices
        self._known = known
        self._target = target
        self._dtype = dtype_for(request, known.machine, target)
        self._options = placement_options(target, self._dtype, request.choices.slots)
        self._vram_bytes = (
            request.choices.vram_bytes if request.choices.vram_bytes is not None else _default_budget(known.machine)
        )
        self._contexts = _contexts(usual_ctx(request, target), is_open=request.choices.ctx is None)
        self._usable_ram = usable_ram(known.machine.ram_available_bytes)
        self._models: dict[ModelSpec | None, CostModel] = {}
        self._found: dict[ModelSpec | None, list[Candidate]] = {}

    @cached_property
    def best(self) -> Candidate | None:
        """The one to prefer; None if nothing fits.

        A draft that would be slower even if all layers stayed is not looked into. One that is stored in fewer bytes
        computes no faster than as it is, so where everything fits that settles it.
        """
        best: Candidate | None = None
        best_preference: tuple[float, ...] = (0.0,)
        for draft in self._drafts:
            if best is not None and _rounded(self._most_tok_per_s(draft)) < _rounded(best.tok_per_s):
                continue
            for candidate in self._with_draft(draft):
                if (found := preference(candidate)) > best_preference:
                    best, best_preference = candidate, found
        return best

    @property
    def all(self) -> list[Candidate]:
        """Every one of them."""
        return [candidate for draft in self._drafts for candidate in self._with_draft(draft)]

    def refusal(self) -> DoesNotFitError:
        """Why nothing fits, with a hint that names the longest context that the budget allows."""
        draft, ctx = self._drafts[-1], self._contexts[-1]
        fits, too_long = 0, ctx
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (
                (middle, too_long) if self._least_bytes(draft, middle) <= self._vram_bytes else (fits, middle)
            )
        advice = "raise --vram, or lower --tree-budget" if draft is not None else "raise --vram"
        return DoesNotFitError(
            f"{self._target.name} needs at least {format_bytes(self._least_bytes(draft, ctx))} with --ctx {ctx:,}, "
            f"the budget is {format_bytes(self._vram_bytes)}",
            hint=f"--ctx {fits} would fit; else {advice}" if fits else advice,
        )

    @cached_property
    def _drafts(self) -> tuple[ModelSpec | None, ...]:
        known = self._known
        if known.draft is None:
            return (None,)
        return (known.draft, *known.lower_drafts, *((None,) if self._request.draft_is_open else ()))

    def _tree_budgets(self, draft: ModelSpec | None) -> tuple[int, ...]:
        """Sizes of trees to try."""
        if draft is None:
            return (0,)
        asked = self._choices.tree_budget
        return _open_budgets(self._known.machine.device) if asked is None else (asked,)

    def _with_draft(self, draft: ModelSpec | None) -> list[Candidate]:
        """All that fits with one of the drafts."""
        if draft not in self._found:
            self._found[draft] = self._search(draft)
        return self._found[draft]

    def _search(self, draft: ModelSpec | None) -> list[Candidate]:
        """At the longest context at which anything fits; longer ones and larger trees never take less memory."""
        if self._least_bytes(draft, self._contexts[-1]) > self._vram_bytes:
            return []
        ctx = next(ctx for ctx in self._contexts if self._least_bytes(draft, ctx) <= self._vram_bytes)
        works = [self._workload(ctx, tree_budget) for tree_budget in self._tree_budgets(draft)]
        return [candidate for work in works for candidate in self._with_workload(draft, work)]

    def _with_workload(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        """The most layers stay that can, with every number of slots, and more where embeddings make room."""
        model, adaptive = self._model(draft), self._choices.tree_budget is None
        ways = self._ways(draft, work)
        for index, split in self._options.split([self._vram_bytes - beside for _, beside in ways]):
            way, beside = ways[index]
            sizes = self._options.place(split, self._host_budget(way, beside + split.num_bytes))
            per_s = model.tok_per_s(sizes, way.tree_budget, adaptive=adaptive)
            yield Candidate(self._target, draft, way, sizes, self._vram_bytes, per_s, adaptive, model)

    def _ways(self, draft: ModelSpec | None, work: Workload) -> list[tuple[Workload, int]]:
        """With bytes of everything but layers and slots: all on the device, and if that can be without embeddings.

        Bringing their rows is not priced: it takes less than a thousandth of a step that streams.
        """
        beside = bytes_beside_layers(self._target, draft, work)
        if not self._can_lend_embeddings:
            return [(work, beside)]
        return [(work, beside), (_apart(work), beside - lookup_bytes(self._target, self._dtype))]

    @cached_property
    def _can_lend_embeddings(self) -> bool:
        """Whether embeddings could be in host memory: there is no such where the device is the CPU."""
        if self._known.machine.device == "cpu" or not self._target.lookup_params:
            return False
        return host_embedding_bytes(self._target, _apart(self._workload(self._contexts[-1], 0))) <= self._usable_ram

    def _least_bytes(self, draft: ModelSpec | None, ctx: int) -> int:
        """What it takes to run at all."""
        ways = self._ways(draft, self._workload(ctx, min(self._tree_budgets(draft))))
        return min(beside for _, beside in ways) + self._options.least_bytes

    def _workload(self, ctx: int, tree_budget: int) -> Workload:
        return _workload(self._dtype, ctx, tree_budget, self._known.machine.device)

    def _host_budget(self, work: Workload, device_bytes: int) -> int:
        """Host memory for streamed layers: what there is, less embeddings, or what a CPU plans to use as the device."""
        on_cpu = self._known.machine.device == "cpu"
        taken = device_bytes if on_cpu else host_embedding_bytes(self._target, work)
        room = max(self._usable_ram - taken, 0)
        return room if self._choices.ram_bytes is None else min(room, self._choices.ram_bytes)

    def _most_tok_per_s(self, draft: ModelSpec | None) -> float:
        adaptive = self._choices.tree_budget is None
        return self._model(draft).most_tok_per_s(max(self._tree_budgets(draft)), adaptive=adaptive)

    def _model(self, draft: ModelSpec | None) -> CostModel:
        if draft not in self._models:
            known, target = self._known, self._target
            acceptance = known.acceptance(target, draft, samples=self._request.samples)
            device = known.machine.device
            self._models[draft] = CostModel(target, draft, self._dtype, device, known.rates, acceptance)
        return self._models[draft]


def _open_budgets(device: str) -> tuple[int, ...]:
    return TREE_BUDGETS["cpu" if device == "cpu" else "cuda"]


@lru_cache(maxsize=512)
def _workload(dtype: Dtype, ctx: int, tree_budget: int, device: str) -> Workload:
    return Workload(
        device=device,
        dtype=dtype,
        ctx=ctx,
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        reserve_bytes=0 if device == "cpu" else CUDA_RESERVE_BYTES,
    )


@lru_cache(maxsize=512)
def _apart(work: Workload) -> Workload:
    """With embeddings in host memory."""
    return replace(work, host_embeddings=True)


def _contexts(ctx: int, *, is_open: bool) -> tuple[int, ...]:
    """Lengths to try, the longest first: a default one is halved before giving up."""
    found = [ctx]
    while is_open and found[-1] > _LEAST_CTX:
        found.append(max(found[-1] // 2, _LEAST_CTX))
    return tuple(found)


def usual_ctx(request: PlanRequest, target: ModelSpec) -> int:
    """What is asked for, or the default as far as the model goes.

    Raises:
        UsageError: the model has no positions for what is asked for.
    """
    if request.choices.ctx is None:
        return min(target.max_positions, DEFAULT_CTX)
    if request.choices.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.choices.ctx:,} is beyond the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    return request.choices.ctx


def dtype_for(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    """Of weights, activations and caches."""
    match request.choices.dtype:
        case "bf16" | "fp16" | "fp32":
            return request.choices.dtype
    if target.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES:
        return "fp32"
    if machine.device == "cpu":
        return "bf16" if target.dtype == "bf16" and machine.fast_bf16 else "fp32"
    if target.dtype == "fp16" or not machine.fast_bf16:
        return "fp16"
    return "bf16"


def _default_budget(machine: Machine) -> int:
    """Free memory less a reserve for everything else on the machine."""
    free = machine.device_free_bytes
    return usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def _host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Host memory beside a GPU's: the layers that stay there, and slots for those that are read from the disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)
