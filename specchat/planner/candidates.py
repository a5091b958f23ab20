"""All plans that fit for a target in one precision, with their predicted speeds.

The search varies the draft, the tree budget, the slots and the resident layers, and shortens a default context that
does not fit. Settings that the user has fixed are not varied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from specchat.errors import DoesNotFitError
from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import expanded_sizes, layer_sizes
from specchat.planner.copies import COPY_IF_FASTER_BY, open_copies, smaller_copies
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.experts import expert_options, with_experts
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
from specchat.planner.placement import (
    PlacementOptions,
    TierSizes,
    among,
    interleaved,
    num_expanded,
    placement_options,
    usable_ram,
)
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.states import num_points, point_bytes, restore_items, state_memory
from specchat.planner.workload import (
    contexts,
    default_budget,
    default_tree_budgets,
    dtype_for,
    layer_host_bytes,
    usual_ctx,
    with_host_embeddings,
    with_points,
    workload,
)
from specchat.records.limits import LEAST_RESTORE_POINTS
from specchat.records.model import LOWER_QUANTS, ModelSpec
from specchat.records.plan import Placement, Plan, PlanChoices, Workload
from specchat.units import format_bytes

# Tree budgets to try without a draft model, whose guesses run out earlier.
RETRIEVAL_BUDGETS = (64, 32, 16)
# A plan with a shorter context must be this many times as fast.
SHORTER_IF_FASTER_BY = 2.0


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

    @property
    def streams(self) -> bool:
        """Whether passes read layers or experts."""
        return self.num_streamed > 0 or self.sizes.experts is not None

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
        tier = self.sizes.experts
        expert_items = () if tier is None else tier.host_items
        placement = Placement(target.num_layers, resident, in_ram, self.slots, expanded=expanded, expanded_bytes=more)
        if tier is not None:
            placement = with_experts(placement, target, work.dtype, tier)
        forecast = None if tier is None else tier.forecast(work.seats + self.prediction.tree_nodes)
        points = restore_items(target, draft, work)
        host_bytes = layer_host_bytes(sizes, in_ram, self.slots) + host_embedding_bytes(target, work)
        host_bytes += sum(item.bytes for item in (*points, *expert_items))
        found_by_lookup = retrieval_items(work, used=self.retrieval)
        beside_layers = (*host_embeddings(target, work), *points, *found_by_lookup, *expert_items)
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            work=work,
            placement=placement,
            ledger=build_ledger(target, draft, work, placement),
            vram_bytes=self.vram_bytes,
            host_bytes=0 if machine.device == "cpu" else host_bytes,
            streamed_bytes_per_step=sum(sizes.values()) if forecast is None else forecast.missed_bytes,
            adaptive=self.adaptive,
            draft_quant="none" if draft is None else draft.quant,
            text_only=target.text_only,
            retrieval=self.retrieval,
            lowered_from=target.dtype if choices.quant == "auto" and target.quant in LOWER_QUANTS else None,
            host_ledger=build_host_ledger(sizes, in_ram, self.slots, machine.device, beside_layers),
            expected=self.model.expectation(self.sizes, work.tree_budget) if self.adaptive else None,
            states=state_memory(target, draft, work, kv_bytes(target, work, work.tree_rows)),
            experts=forecast,
        )


def preference(candidate: Candidate) -> tuple[float, ...]:
    """Return a sort key, larger is better: speed, then an unquantized draft, the default tree budget, fewer slots."""
    budgets, budget = default_tree_budgets(candidate.work.device), candidate.work.tree_budget
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
        on_gpu, learnt = inputs.machine.device != "cpu", inputs.experts
        asks_for_slots = request.choices.slots is not None
        self._expert_options = None if asks_for_slots else expert_options(target, self._dtype, learnt, on_gpu=on_gpu)
        self._vram_bytes = (
            request.choices.vram_bytes if request.choices.vram_bytes is not None else default_budget(inputs.machine)
        )
        self._contexts = contexts(usual_ctx(request, target), is_open=request.choices.ctx is None)
        self._usable_ram = usable_ram(inputs.machine.ram_available_bytes)
        self._models: dict[ModelSpec | None, CostModel] = {}
        self._found: dict[ModelSpec | None, list[Candidate]] = {}

    @cached_property
    def best(self) -> Candidate | None:
        """Preferred candidate; None if nothing fits.

        Drafts are skipped that would lose even with every layer resident. Quantizing a draft saves memory, not compute
        time. So a quantized draft cannot win once everything fits. A copy that was asked for gives way to other drafts
        only if no layer is streamed: then nothing is copied, and each draft pass costs as much as the target's.
        """
        best: Candidate | None = None
        best_preference: tuple[float, ...] = (0.0,)
        for draft in self._drafts:
            if draft is None and best is not None and best.streams and self._asks_for_copy:
                continue
            if best is not None and _rounded(self._most_tok_per_s(draft)) < _rounded(best.tok_per_s):
                continue
            for candidate in self._with_draft(draft):
                if (found := preference(candidate)) > best_preference and self._is_worth_it(candidate, best):
                    best, best_preference = candidate, found
        return best

    def _is_worth_it(self, candidate: Candidate, best: Candidate | None) -> bool:
        """Return whether a faster candidate is worth the disk space of a copy that nobody asked for."""
        is_open = candidate.draft is not None and candidate.draft in self._open_copies
        if not is_open or best is None or best.draft in self._open_copies:
            return True
        return candidate.tok_per_s >= COPY_IF_FASTER_BY * best.tok_per_s

    @property
    def all(self) -> list[Candidate]:
        """All candidates, with every draft and without."""
        return [candidate for draft in self._drafts for candidate in self._with_draft(draft)]

    def refusal(self) -> DoesNotFitError:
        """Build the error for a budget that is too small; the hint names the longest context that fits."""
        drafts = [None] if None in self._drafts and not self._asks_for_copy else self._drafts
        draft, ctx = next((each for each in reversed(drafts) if each is not None), None), self._contexts[-1]
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

    @property
    def _asks_for_copy(self) -> bool:
        return self._inputs.draft is not None and self._inputs.draft.is_copy and not self._request.draft_is_open

    @cached_property
    def _drafts(self) -> tuple[ModelSpec | None, ...]:
        inputs = self._inputs
        given = () if inputs.draft is None else (inputs.draft, *inputs.lower_drafts)
        if inputs.draft is not None and inputs.draft.is_copy:
            given = smaller_copies(self._target, given)
            if not self._request.draft_is_open:
                return (*given, None)
        if self._request.draft_is_open:
            return (*given, *inputs.heads, None, *self._open_copies)
        # A user who fixes the size of the trees or the draft's precision wants a draft, and a head is one.
        heads = inputs.heads if self._request.heads else ()
        return given or heads or (None,)

    def _tree_budgets(self, draft: ModelSpec | None) -> tuple[int, ...]:
        """Return the tree budgets to try."""
        if draft is None:
            return self._budgets_without_draft
        asked = self._choices.tree_budget
        return default_tree_budgets(self._inputs.machine.device) if asked is None else (asked,)

    @cached_property
    def _open_copies(self) -> tuple[ModelSpec, ...]:
        return open_copies(self._request, self._inputs, self._target, self._dtype, self._vram_bytes)

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
        works = [self._workload(draft, ctx, tree_budget) for tree_budget in self._tree_budgets(draft)]
        found = [candidate for work in works for candidate in self._with_workload(draft, work)]
        return found + self._with_shorter_context(draft, found)

    def _with_shorter_context(self, draft: ModelSpec | None, found: Sequence[Candidate]) -> list[Candidate]:
        """Return candidates that read experts one by one where only whole layers leave room for the context.

        Everything besides experts is resident then, which takes more memory than a few slots for layers. A context that
        nobody asked for is shortened only where that is much faster.
        """
        best = max((candidate.tok_per_s for candidate in found), default=0.0)
        if not found or any(candidate.sizes.experts or not candidate.streams for candidate in found):
            return []
        for ctx in self._contexts[self._contexts.index(found[0].work.ctx) + 1 :]:
            works = [self._workload(draft, ctx, tree_budget) for tree_budget in self._tree_budgets(draft)]
            shorter = [candidate for work in works for candidate in self._with_experts(draft, work)]
            if shorter:
                return [each for each in shorter if each.tok_per_s >= SHORTER_IF_FASTER_BY * best]
        return []

    def _with_workload(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        """Yield the candidates with most resident layers, per slot count, with embeddings on the device or the host."""
        variants = self._workload_variants(draft, work)
        one_point = point_bytes(self._target, draft, work) if self._choices.seats == 1 else 0
        options = self._options(draft)
        rooms = [self._room(other_bytes, one_point, options.least_bytes) for _, other_bytes in variants]
        for index, split in options.split(rooms):
            variant, other_bytes = variants[index]
            host_bytes = self._host_budget(variant, other_bytes + split.num_bytes)
            if one_point:
                points = num_points(one_point, host_bytes, options.streamed_bytes(split))
                variant, host_bytes = with_points(variant, points), host_bytes - points * one_point
            sizes = options.place(split, host_bytes)
            if not sizes.num_streamed:
                room = self._room(other_bytes, one_point, options.least_bytes) - split.num_bytes
                sizes = replace(sizes, num_expanded=self._num_expanded(room))
            yield self._candidate(draft, variant, sizes)
        if draft is None or not draft.is_copy:  # a copy has streamed layers
            yield from self._with_experts(draft, work)

    def _with_experts(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        """Yield the candidates that read experts one by one, with as many of them in memory as fit.

        One reads nothing ahead, the other likely experts of the next layer, which costs a call of its router.
        Everything besides experts is resident.
        """
        options = self._expert_options
        if options is None:
            return
        one_point = point_bytes(self._target, draft, work) if self._choices.seats == 1 else 0
        for each, other_bytes in self._workload_variants(draft, work):
            tier = options.fit(self._room(other_bytes, one_point, options.least_bytes))
            if tier is None:
                continue
            variant, host_bytes = each, self._host_budget(each, other_bytes + options.nbytes(tier.quota))
            if one_point:
                points = num_points(one_point, host_bytes, tier.all_bytes)
                variant, host_bytes = with_points(each, points), host_bytes - points * one_point
            for looks_ahead in (False, True):
                experts = replace(tier.kept(host_bytes), looks_ahead=looks_ahead)
                yield self._candidate(draft, variant, TierSizes(self._target.num_layers, experts=experts))

    def _candidate(self, draft: ModelSpec | None, work: Workload, sizes: TierSizes) -> Candidate:
        model, adaptive = self._model(draft), self._request.is_adaptive
        per_s = model.tok_per_s(sizes, work.tree_budget, adaptive=adaptive)
        retrieval = self._request.retrieval and work.tree_budget > 0
        return Candidate(self._target, draft, work, sizes, self._vram_bytes, per_s, adaptive, model, retrieval)

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
            (with_host_embeddings(work), other_bytes - lookup_bytes(self._target, self._dtype)),
        ]

    @cached_property
    def _can_move_embeddings(self) -> bool:
        """Whether the input embeddings may move to host memory; never on the CPU, where both are the same memory."""
        if self._inputs.machine.device == "cpu" or not self._target.lookup_params:
            return False
        return (
            host_embedding_bytes(self._target, with_host_embeddings(self._workload(None, self._contexts[-1], 0)))
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
        variants = self._workload_variants(draft, self._workload(draft, ctx, min(self._tree_budgets(draft))))
        ways = [each.least_bytes for each in (self._options(draft), self._expert_options) if each is not None]
        return min(other_bytes for _, other_bytes in variants) + min(ways)

    def _options(self, draft: ModelSpec | None) -> PlacementOptions:
        copy = draft if draft is not None and draft.is_copy else None
        return placement_options(self._target, self._dtype, self._choices.slots, copy)

    def _workload(self, draft: ModelSpec | None, ctx: int, tree_budget: int) -> Workload:
        device, seats = self._inputs.machine.device, self._choices.seats
        is_copy = draft is not None and draft.is_copy
        tapped = 0 if draft is None else draft.tapped_width
        return workload(self._dtype, ctx, tree_budget, device, seats, shares_cache=is_copy, tapped_width=tapped)

    def _room(self, other_bytes: int, one_point: int, least_bytes: int) -> int:
        """Return the device memory left for layers and slots.

        On a CPU, restore points lie in the same memory, so room for the least of them stays free if layers can stream.
        """
        room = self._vram_bytes - other_bytes
        if not one_point or self._inputs.machine.device != "cpu":
            return room
        beside_points = self._usable_ram - LEAST_RESTORE_POINTS * one_point - other_bytes
        return min(room, max(beside_points, least_bytes))

    def _host_budget(self, work: Workload, device_bytes: int) -> int:
        """Return the host memory left for restore points and streamed layers.

        Host embeddings are taken first and, on a CPU, all other memory.
        """
        on_cpu = self._inputs.machine.device == "cpu"
        taken = device_bytes if on_cpu else host_embedding_bytes(self._target, work)
        available = max(self._usable_ram - taken, 0)
        return available if self._choices.ram_bytes is None else min(available, self._choices.ram_bytes)

    def _most_tok_per_s(self, draft: ModelSpec | None) -> float:
        adaptive, budgets = self._request.is_adaptive, self._tree_budgets(draft)
        model = self._model(draft)
        return max(model.most_tok_per_s(budget, adaptive=adaptive) for budget in {min(budgets), max(budgets)})

    def _model(self, draft: ModelSpec | None) -> CostModel:
        if draft not in self._models:
            inputs, target = self._inputs, self._target
            acceptance = inputs.acceptance(target, draft, samples=self._request.samples)
            device = inputs.machine.device
            seats = self._choices.seats
            retrieval = self._request.retrieval
            self._models[draft] = CostModel(
                target, draft, self._dtype, device, inputs.rates, acceptance, seats, retrieval=retrieval
            )
        return self._models[draft]
