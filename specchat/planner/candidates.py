"""All plans that fit for a target in one precision, with their predicted speeds.

The search varies the draft, the tree budget, the slots and the resident layers, and shortens a default context that
does not fit. Settings that the user has fixed are not varied.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from specchat.errors import DoesNotFitError, UsageError
from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import expanded_sizes, layer_sizes
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.memory import (
    build_host_ledger,
    build_ledger,
    bytes_beside_layers,
    host_embedding_bytes,
    host_embeddings,
    kv_bytes,
    lookup_bytes,
    retrieval_items,
)
from specchat.planner.placement import TierSizes, among, interleaved, num_expanded, placement_options, usable_ram
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.planner.states import num_points, point_bytes, restore_items, state_memory
from specchat.records.limits import LEAST_RESTORE_POINTS
from specchat.records.model import DTYPE_BYTES, LOWER_QUANTS, Dtype, ModelSpec
from specchat.records.plan import Placement, Plan, PlanChoices, Workload
from specchat.units import GIB, MIB, format_bytes

DEFAULT_CTX = 8192
_LEAST_CTX = 512
# Tree budgets to try, the default first; adaptive trees (engine/drafting) may stay smaller. A GPU computes hundreds of
# rows while a layer is loaded; on two CPU cores, computing 128 rows takes longer than reading the layer from disk.
TREE_BUDGETS = {"cpu": (128, 64, 32, 16), "cuda": (256, 512, 128, 64, 32)}
# Tree budgets to try without a draft model, whose guesses run out earlier.
RETRIEVAL_BUDGETS = (64, 32, 16)
CHUNK_ROWS = 512
# Memory for the workspaces of cuBLAS and for rounding in the CUDA allocator; not measured on a GPU yet.
CUDA_RESERVE_BYTES = 96 * MIB
# Expanded nodes may be cut from the tree again, so the draft needs more rows than the tree has nodes.
DRAFT_ROWS_PER_NODE = 2


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits, with its predicted speed.

    Attributes:
        target, draft: sizes of the models; draft is None without a draft model.
        work: device, dtype, context and trees.
        sizes: layers and bytes in each tier.
        vram_bytes: device memory budget in bytes.
        tok_per_s: predicted speed.
        adaptive: whether trees may be smaller than the tree budget.
        model: cost model of the pair.
        retrieval: whether draft nodes also come from the text itself.
    """

    target: ModelSpec
    draft: ModelSpec | None
    work: Workload
    sizes: TierSizes
    vram_bytes: int
    tok_per_s: float
    adaptive: bool
    model: CostModel
    retrieval: bool = False

    @cached_property
    def prediction(self) -> Prediction:
        """Full prediction for this configuration."""
        return self.model.predict(self.sizes, self.work.tree_budget, adaptive=self.adaptive)

    @property
    def slots(self) -> int:
        """Staging buffers for streamed layers."""
        return self.sizes.slots

    @property
    def num_streamed(self) -> int:
        """Number of streamed layers."""
        return self.sizes.num_streamed

    def plan(self, choices: PlanChoices, machine: Machine) -> Plan:
        """Build the plan, with placement and ledgers."""
        target, draft, work = self.target, self.draft, self.work
        if draft is None:
            work = replace(work, draft_rows=0)
        resident = interleaved(target.num_layers - self.num_streamed, target.num_layers)
        kept, all_sizes = set(resident), layer_sizes(target, work.dtype)
        sizes = {i: size for i, size in enumerate(all_sizes) if i not in kept}
        in_ram = among(sizes, self.sizes.num_in_ram)
        expanded = interleaved(self.sizes.num_expanded, target.num_layers)
        larger = expanded_sizes(target, work.dtype, has_row_kernel=machine.has_row_kernel) if expanded else all_sizes
        more = sum(larger[i] - all_sizes[i] for i in expanded)
        placement = Placement(target.num_layers, resident, in_ram, self.slots, expanded, more)
        points = restore_items(target, draft, work)
        host_bytes = _host_bytes(sizes, in_ram, self.slots) + host_embedding_bytes(target, work)
        host_bytes += sum(item.bytes for item in points)
        beside_layers = (*host_embeddings(target, work), *points, *retrieval_items(work, used=self.retrieval))
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            work=work,
            placement=placement,
            ledger=build_ledger(target, draft, work, placement),
            vram_bytes=self.vram_bytes,
            host_bytes=0 if machine.device == "cpu" else host_bytes,
            streamed_bytes_per_step=sum(sizes.values()),
            adaptive=self.adaptive,
            draft_quant="none" if draft is None else draft.quant,
            text_only=target.text_only,
            retrieval=self.retrieval,
            lowered_from=target.dtype if choices.quant == "auto" and target.quant in LOWER_QUANTS else None,
            host_ledger=build_host_ledger(sizes, in_ram, self.slots, machine.device, beside_layers),
            expected=self.model.expectation(self.sizes, work.tree_budget) if self.adaptive else None,
            states=state_memory(target, draft, work, kv_bytes(target, work, work.tree_budget)),
        )


def preference(candidate: Candidate) -> tuple[float, ...]:
    """Return a sort key, larger is better: speed, then an unquantized draft, the default tree budget, fewer slots."""
    budgets, budget = _default_tree_budgets(candidate.work.device), candidate.work.tree_budget
    rank = budgets.index(budget) if budget in budgets else 0
    is_lower = candidate.draft is not None and candidate.draft.quant in LOWER_QUANTS
    return _rounded(candidate.tok_per_s), -is_lower, -rank, -candidate.slots


def _rounded(tok_per_s: float) -> float:
    """Round a speed, because sums in another order differ in their last bits."""
    return round(tok_per_s, 6)


class Candidates:
    """All configurations that fit; for each draft, those with the longest context that fits.

    Args:
        request: models and choices.
        inputs: machine, rates, sizes and statistics.
        target: sizes of the target in one precision.

    Raises:
        UsageError: the context is longer than the model allows.
    """

    def __init__(self, request: PlanRequest, inputs: PlanInputs, target: ModelSpec) -> None:
        self._request = request
        self._choices = request.choices
        self._inputs = inputs
        self._target = target
        self._dtype = dtype_for(request, inputs.machine, target)
        self._options = placement_options(target, self._dtype, request.choices.slots)
        self._vram_bytes = (
            request.choices.vram_bytes if request.choices.vram_bytes is not None else _default_budget(inputs.machine)
        )
        self._contexts = _contexts(usual_ctx(request, target), is_open=request.choices.ctx is None)
        self._usable_ram = usable_ram(inputs.machine.ram_available_bytes)
        self._models: dict[ModelSpec | None, CostModel] = {}
        self._found: dict[ModelSpec | None, list[Candidate]] = {}

    @cached_property
    def best(self) -> Candidate | None:
        """Preferred candidate; None if nothing fits.

        Drafts are skipped that would lose even with every layer resident. Quantizing a draft saves memory, not compute
        time. So a quantized draft cannot win once everything fits.
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
        """All candidates, with every draft and without."""
        return [candidate for draft in self._drafts for candidate in self._with_draft(draft)]

    def refusal(self) -> DoesNotFitError:
        """Build the error for a budget that is too small; the hint names the longest context that fits."""
        draft, ctx = self._drafts[-1], self._contexts[-1]
        fits, too_long = 0, ctx
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (
                (middle, too_long) if self._least_bytes(draft, middle) <= self._vram_bytes else (fits, middle)
            )
        lowered = ["--tree-budget"] * (draft is not None) + ["the number of answers at once"] * (
            self._choices.seats > 1
        )
        advice = f"raise --vram or lower {' or '.join(lowered)}" if lowered else "raise --vram"
        return DoesNotFitError(
            f"{self._target.name} needs at least {format_bytes(self._least_bytes(draft, ctx))} with --ctx {ctx:,}, "
            f"but the budget is {format_bytes(self._vram_bytes)}",
            hint=f"use --ctx {fits} or less, or {advice}" if fits else advice,
        )

    @cached_property
    def _drafts(self) -> tuple[ModelSpec | None, ...]:
        inputs = self._inputs
        given = () if inputs.draft is None else (inputs.draft, *inputs.lower_drafts)
        if self._request.draft_is_open:
            return (*given, *inputs.heads, None)
        # A user who fixes the size of the trees or the draft's precision wants a draft, and a head is one.
        heads = () if self._request.head is None else inputs.heads
        return given or heads or (None,)

    def _tree_budgets(self, draft: ModelSpec | None) -> tuple[int, ...]:
        """Return the tree budgets to try."""
        if draft is None:
            return self._budgets_without_draft
        asked = self._choices.tree_budget
        return _default_tree_budgets(self._inputs.machine.device) if asked is None else (asked,)

    @cached_property
    def _budgets_without_draft(self) -> tuple[int, ...]:
        asked = self._choices.tree_budget
        if not self._request.retrieval:
            return (0,)
        if asked is not None:
            return (asked,)
        return (*RETRIEVAL_BUDGETS, 0) if self._request.draft_is_open else RETRIEVAL_BUDGETS

    def _with_draft(self, draft: ModelSpec | None) -> list[Candidate]:
        """Return all candidates with this draft, and cache them."""
        if draft not in self._found:
            self._found[draft] = self._search(draft)
        return self._found[draft]

    def _search(self, draft: ModelSpec | None) -> list[Candidate]:
        """Return the candidates at the longest context that fits.

        Memory never shrinks with a longer context or a larger tree, so the smallest tree decides.
        """
        if self._least_bytes(draft, self._contexts[-1]) > self._vram_bytes:
            return []
        ctx = next(ctx for ctx in self._contexts if self._least_bytes(draft, ctx) <= self._vram_bytes)
        works = [self._workload(ctx, tree_budget) for tree_budget in self._tree_budgets(draft)]
        return [candidate for work in works for candidate in self._with_workload(draft, work)]

    def _with_workload(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        """Yield the candidates with most resident layers, per slot count, with embeddings on the device or the host."""
        model, adaptive = self._model(draft), self._choices.tree_budget is None
        variants = self._workload_variants(draft, work)
        one_point = point_bytes(self._target, draft, work) if self._choices.seats == 1 else 0
        for index, split in self._options.split([self._room(other_bytes, one_point) for _, other_bytes in variants]):
            variant, other_bytes = variants[index]
            host_bytes = self._host_budget(variant, other_bytes + split.num_bytes)
            if one_point:
                points = num_points(one_point, host_bytes, self._options.streamed_bytes(split))
                variant, host_bytes = _with_points(variant, points), host_bytes - points * one_point
            sizes = self._options.place(split, host_bytes)
            if not sizes.num_streamed:
                room = self._room(other_bytes, one_point) - split.num_bytes
                sizes = replace(sizes, num_expanded=self._num_expanded(room))
            per_s = model.tok_per_s(sizes, variant.tree_budget, adaptive=adaptive)
            retrieval = self._request.retrieval and variant.tree_budget > 0
            yield Candidate(self._target, draft, variant, sizes, self._vram_bytes, per_s, adaptive, model, retrieval)

    def _workload_variants(self, draft: ModelSpec | None, work: Workload) -> list[tuple[Workload, int]]:
        """Return workloads with embeddings on the device and, if possible, on the host; each with its other bytes.

        Other bytes are device memory besides layers and slots. Copying embedding rows from the host has no cost here:
        it takes less than a thousandth of a step that streams.
        """
        other_bytes = bytes_beside_layers(self._target, draft, work)
        if not self._can_move_embeddings:
            return [(work, other_bytes)]
        return [
            (work, other_bytes),
            (_with_host_embeddings(work), other_bytes - lookup_bytes(self._target, self._dtype)),
        ]

    @cached_property
    def _can_move_embeddings(self) -> bool:
        """Whether the input embeddings may move to host memory; never on the CPU, where both are the same memory."""
        if self._inputs.machine.device == "cpu" or not self._target.lookup_params:
            return False
        return (
            host_embedding_bytes(self._target, _with_host_embeddings(self._workload(self._contexts[-1], 0)))
            <= self._usable_ram
        )

    def _num_expanded(self, room: int) -> int:
        """Return the number of layers that may take `room` more bytes to be faster; only on a CPU."""
        if self._inputs.machine.device != "cpu" or not self._target.layer_quant or self._dtype == "fp16":
            return 0
        has_kernel = self._inputs.machine.has_row_kernel
        expanded = expanded_sizes(self._target, self._dtype, has_row_kernel=has_kernel)
        return num_expanded(layer_sizes(self._target, self._dtype), expanded, room)

    def _least_bytes(self, draft: ModelSpec | None, ctx: int) -> int:
        """Return the least device memory that any configuration at this context needs."""
        variants = self._workload_variants(draft, self._workload(ctx, min(self._tree_budgets(draft))))
        return min(other_bytes for _, other_bytes in variants) + self._options.least_bytes

    def _workload(self, ctx: int, tree_budget: int) -> Workload:
        return _workload(self._dtype, ctx, tree_budget, self._inputs.machine.device, self._choices.seats)

    def _room(self, other_bytes: int, one_point: int) -> int:
        """Return the device memory left for layers and slots.

        On a CPU, restore points lie in the same memory, so room for the least of them stays free if layers can stream.
        """
        room = self._vram_bytes - other_bytes
        if not one_point or self._inputs.machine.device != "cpu":
            return room
        beside_points = self._usable_ram - LEAST_RESTORE_POINTS * one_point - other_bytes
        return min(room, max(beside_points, self._options.least_bytes))

    def _host_budget(self, work: Workload, device_bytes: int) -> int:
        """Return the host memory left for restore points and streamed layers.

        Host embeddings are taken first and, on a CPU, all other memory.
        """
        on_cpu = self._inputs.machine.device == "cpu"
        taken = device_bytes if on_cpu else host_embedding_bytes(self._target, work)
        available = max(self._usable_ram - taken, 0)
        return available if self._choices.ram_bytes is None else min(available, self._choices.ram_bytes)

    def _most_tok_per_s(self, draft: ModelSpec | None) -> float:
        adaptive, budgets = self._choices.tree_budget is None, self._tree_budgets(draft)
        model = self._model(draft)
        return max(model.most_tok_per_s(budget, adaptive=adaptive) for budget in {min(budgets), max(budgets)})

    def _model(self, draft: ModelSpec | None) -> CostModel:
        if draft not in self._models:
            inputs, target = self._inputs, self._target
            acceptance = inputs.acceptance(target, draft, samples=self._request.samples)
            device = inputs.machine.device
            seats = self._choices.seats
            self._models[draft] = CostModel(
                target,
                draft,
                self._dtype,
                device,
                inputs.rates,
                acceptance,
                seats,
                retrieval=self._request.retrieval,
            )
        return self._models[draft]


def _default_tree_budgets(device: str) -> tuple[int, ...]:
    return TREE_BUDGETS["cpu" if device == "cpu" else "cuda"]


@lru_cache(maxsize=512)
def _workload(dtype: Dtype, ctx: int, tree_budget: int, device: str, seats: int) -> Workload:
    return Workload(
        device=device,
        dtype=dtype,
        ctx=ctx,
        tree_budget=tree_budget,
        draft_rows=DRAFT_ROWS_PER_NODE * tree_budget,
        chunk_rows=CHUNK_ROWS,
        reserve_bytes=0 if device == "cpu" else CUDA_RESERVE_BYTES,
        seats=seats,
    )


@lru_cache(maxsize=512)
def _with_points(work: Workload, num_points: int) -> Workload:
    """Return the workload with another number of restore points."""
    return replace(work, most_points=num_points)


@lru_cache(maxsize=512)
def _with_host_embeddings(work: Workload) -> Workload:
    """Return the workload with input embeddings in host memory."""
    return replace(work, host_embeddings=True)


def _contexts(ctx: int, *, is_open: bool) -> tuple[int, ...]:
    """Return the contexts to try, longest first; a context that the user left open is halved down to 512."""
    found = [ctx]
    while is_open and found[-1] > _LEAST_CTX:
        found.append(max(found[-1] // 2, _LEAST_CTX))
    return tuple(found)


def usual_ctx(request: PlanRequest, target: ModelSpec) -> int:
    """Return the requested context, or the default limited to the model's maximum.

    Raises:
        UsageError: the context is longer than the model allows.
    """
    if request.choices.ctx is None:
        return min(target.max_positions, DEFAULT_CTX)
    if request.choices.ctx > target.max_positions:
        raise UsageError(
            f"--ctx {request.choices.ctx:,} exceeds the {target.max_positions:,} positions of {target.name}",
            hint=f"use --ctx {target.max_positions} or less",
        )
    return request.choices.ctx


def dtype_for(request: PlanRequest, machine: Machine, target: ModelSpec) -> Dtype:
    """Return the dtype of weights, activations and caches."""
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
    """Return free device memory minus a reserve for other programs."""
    free = machine.device_free_bytes
    return usable_ram(free) if machine.device == "cpu" else max(free - GIB, 0)


def _host_bytes(sizes: Mapping[int, int], in_ram: Sequence[int], slots: int) -> int:
    """Return the host memory of a plan for a GPU: layers kept in RAM, and slots for layers read from disk."""
    read = [size for i, size in sizes.items() if i not in in_ram]
    return sum(sizes[i] for i in in_ram) + min(slots, len(read)) * max(read, default=0)
