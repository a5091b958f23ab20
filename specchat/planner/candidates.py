"""All plans that fit for a target in one precision, with their predicted speeds.

The search varies the draft, the tree budget, the slots and the resident layers, and shortens a default context that
does not fit. Settings that the user has fixed are not varied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from specchat.errors import BudgetError
from specchat.models.sizes.geometry import expanded_sizes, head_copy_bytes, layer_sizes
from specchat.planner.candidate import Candidate, preference, rounded
from specchat.planner.copies import COPY_IF_FASTER_BY, open_copies, smaller_copies
from specchat.planner.cost import CostModel
from specchat.planner.experts import expert_options
from specchat.planner.memory import (
    bytes_beside_layers,
    host_embedding_bytes,
    lookup_bytes,
)
from specchat.planner.placement import (
    PlacementOptions,
    TierSizes,
    num_expanded,
    pinnable_ram,
    placement_options,
)
from specchat.planner.request import PlanInputs, PlanRequest
from specchat.planner.states import num_points, point_bytes
from specchat.planner.workload import (
    contexts,
    default_budget,
    default_tree_budgets,
    dtype_for,
    usual_ctx,
    with_host_embeddings,
    with_points,
    workload,
)
from specchat.records.limits import LEAST_RESTORE_POINTS
from specchat.records.model import ModelSpec
from specchat.records.plan import Workload
from specchat.units import format_bytes

# Tree budgets to try without a draft model, whose guesses run out earlier.
RETRIEVAL_BUDGETS = (64, 32, 16)
# A plan with a shorter context must be this many times as fast.
SHORTER_IF_FASTER_BY = 2.0


class Candidates:
    """All configurations that fit; for each draft, those with the longest context that fits.

    Args:
        request: models and choices.
        inputs: machine, rates, sizes and statistics.
        target: sizes of the target in one precision.

    Attributes:
        dtype: dtype of weights, activations and caches.
        vram_bytes: memory budget of the device in bytes.
        contexts: contexts to try, longest first.
        usable_ram: bytes of host memory that may be used.

    Raises:
        UsageError: the context is longer than the model allows.
    """

    def __init__(self, request: PlanRequest, inputs: PlanInputs, target: ModelSpec) -> None:
        self._request = request
        self._choices = request.choices
        self._inputs = inputs
        self._target = target
        self.dtype = dtype_for(request, inputs.machine, target)
        on_gpu, learnt = inputs.machine.device != "cpu", inputs.experts
        asks_for_slots = request.choices.slots is not None
        self._expert_options = None if asks_for_slots else expert_options(target, self.dtype, learnt, on_gpu=on_gpu)
        self.vram_bytes = (
            request.choices.vram_bytes if request.choices.vram_bytes is not None else default_budget(inputs.machine)
        )
        self.contexts = contexts(usual_ctx(request, target), is_open=request.choices.ctx is None)
        self.usable_ram = pinnable_ram(inputs.machine)
        self._models: dict[ModelSpec | None, CostModel] = {}
        self._found: dict[ModelSpec | None, list[Candidate]] = {}

    @cached_property
    def best(self) -> Candidate | None:
        """Preferred candidate; None if nothing fits.

        Drafts are skipped that would lose even with every layer resident. A copy that was asked for gives way to other
        drafts only if no layer is streamed: then nothing is copied, and each draft pass costs as much as the target's.
        """
        best: Candidate | None = None
        best_preference: tuple[float, ...] = (0.0,)
        for draft in self.drafts:
            if draft is None and best is not None and best.streams and self._asks_for_copy:
                continue
            if best is not None and rounded(self._most_tok_per_s(draft)) < rounded(best.tok_per_s):
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
        return [candidate for draft in self.drafts for candidate in self._with_draft(draft)]

    def refusal(self) -> BudgetError:
        """Build the error for a budget that is too small; the hint names the longest context that fits."""
        drafts = [None] if None in self.drafts and not self._asks_for_copy else self.drafts
        draft, ctx = next((each for each in reversed(drafts) if each is not None), None), self.contexts[-1]
        fits, too_long = 0, ctx
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            fits, too_long = (
                (middle, too_long) if self._least_bytes(draft, middle) <= self.vram_bytes else (fits, middle)
            )
        lowered = ["--tree-budget"] * (draft is not None) + ["the number of answers at once"] * (
            self._choices.seats > 1
        )
        advice = f"raise --vram or lower {' or '.join(lowered)}" if lowered else "raise --vram"
        needed = self._least_bytes(draft, ctx)
        return BudgetError(
            f"{self._target.name} needs at least {format_bytes(needed)} with --ctx {ctx:,}, "
            f"but the budget is {format_bytes(self.vram_bytes)}",
            hint=f"use --ctx {fits} or less, or {advice}" if fits else advice,
            needed_bytes=needed,
        )

    @property
    def _asks_for_copy(self) -> bool:
        return self._inputs.draft is not None and self._inputs.draft.is_copy and not self._request.draft_is_open

    @cached_property
    def drafts(self) -> tuple[ModelSpec | None, ...]:
        """Drafts to try, None for none."""
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

    def tree_budgets(self, draft: ModelSpec | None) -> tuple[int, ...]:
        """Return the tree budgets to try."""
        if draft is None:
            return self._budgets_without_draft
        asked = self._choices.tree_budget
        return default_tree_budgets(self._inputs.machine.device) if asked is None else (asked,)

    @cached_property
    def _open_copies(self) -> tuple[ModelSpec, ...]:
        return open_copies(self._request, self._inputs, self._target, self.dtype, self.vram_bytes)

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
        if self._least_bytes(draft, self.contexts[-1]) > self.vram_bytes:
            return []
        ctx = next(ctx for ctx in self.contexts if self._least_bytes(draft, ctx) <= self.vram_bytes)
        works = [self.workload_for(draft, ctx, tree_budget) for tree_budget in self.tree_budgets(draft)]
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
        for ctx in self.contexts[self.contexts.index(found[0].work.ctx) + 1 :]:
            works = [self.workload_for(draft, ctx, tree_budget) for tree_budget in self.tree_budgets(draft)]
            shorter = [candidate for work in works for candidate in self._with_experts(draft, work)]
            if shorter:
                return [each for each in shorter if each.tok_per_s >= SHORTER_IF_FASTER_BY * best]
        return []

    def _with_workload(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        """Yield the candidates with most resident layers, per slot count, with embeddings on the device or the host."""
        variants = self.workload_variants(draft, work)
        one_point = point_bytes(self._target, draft, work) if self._choices.seats == 1 else 0
        options = self._options(draft)
        rooms = [self._room(other_bytes, one_point, options.least_bytes) for _, other_bytes in variants]
        for index, split in options.split(rooms):
            variant, other_bytes = variants[index]
            host_bytes = self.host_budget(variant, other_bytes + split.num_bytes)
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
        for each, other_bytes in self.workload_variants(draft, work):
            tier = options.fit(self._room(other_bytes, one_point, options.least_bytes))
            if tier is None:
                continue
            variant, host_bytes = each, self.host_budget(each, other_bytes + options.nbytes(tier.quota))
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
        return Candidate(self._target, draft, work, sizes, self.vram_bytes, per_s, adaptive, model, retrieval)

    def workload_variants(self, draft: ModelSpec | None, work: Workload) -> list[tuple[Workload, int]]:
        """Return workloads with embeddings on the device and, if possible, on the host; each with its other bytes.

        Other bytes are device memory besides layers and slots. Copying embedding rows from the host has no cost here:
        it takes less than a thousandth of a step that streams.
        """
        other_bytes = bytes_beside_layers(self._target, draft, work)
        if not self._can_move_embeddings:
            return [(work, other_bytes)]
        return [
            (work, other_bytes),
            (with_host_embeddings(work), other_bytes - lookup_bytes(self._target, self.dtype)),
        ]

    @cached_property
    def _can_move_embeddings(self) -> bool:
        """Whether the input embeddings may move to host memory; never on the CPU, where both are the same memory."""
        if self._inputs.machine.device == "cpu" or not self._target.lookup_params:
            return False
        return (
            host_embedding_bytes(self._target, with_host_embeddings(self.workload_for(None, self.contexts[-1], 0)))
            <= self.usable_ram
        )

    def _num_expanded(self, room: int) -> int:
        """Return the number of layers that may take `room` more bytes to be faster; only on a CPU."""
        if self._inputs.machine.device != "cpu" or not self._target.layer_quant or self.dtype == "fp16":
            return 0
        has_kernel = self._inputs.machine.has_row_kernel
        expanded = expanded_sizes(self._target, self.dtype, has_row_kernel=has_kernel)
        room -= head_copy_bytes(self._target, self.dtype)
        return num_expanded(layer_sizes(self._target, self.dtype), expanded, room)

    def _least_bytes(self, draft: ModelSpec | None, ctx: int) -> int:
        """Return the least device memory that any configuration at this context needs."""
        variants = self.workload_variants(draft, self.workload_for(draft, ctx, min(self.tree_budgets(draft))))
        ways = [each.least_bytes for each in (self._options(draft), self._expert_options) if each is not None]
        return min(other_bytes for _, other_bytes in variants) + min(ways)

    def _options(self, draft: ModelSpec | None) -> PlacementOptions:
        copy = draft if draft is not None and draft.is_copy else None
        return placement_options(self._target, self.dtype, self._choices.slots, copy)

    def workload_for(self, draft: ModelSpec | None, ctx: int, tree_budget: int) -> Workload:
        """Return the workload of a draft, a context and a tree budget."""
        device, seats = self._inputs.machine.device, self._choices.seats
        is_copy = draft is not None and draft.is_copy
        tapped = 0 if draft is None else draft.tapped_width
        return workload(self.dtype, ctx, tree_budget, device, seats, shares_cache=is_copy, tapped_width=tapped)

    def _room(self, other_bytes: int, one_point: int, least_bytes: int) -> int:
        """Return the device memory left for layers and slots.

        On a CPU, restore points lie in the same memory, so room for the least of them stays free if layers can stream.
        """
        room = self.vram_bytes - other_bytes
        if not one_point or self._inputs.machine.device != "cpu":
            return room
        beside_points = self.usable_ram - LEAST_RESTORE_POINTS * one_point - other_bytes
        return min(room, max(beside_points, least_bytes))

    def host_budget(self, work: Workload, device_bytes: int) -> int:
        """Return the host memory left for restore points and streamed layers.

        Host embeddings are taken first and, on a CPU, all other memory.
        """
        on_cpu = self._inputs.machine.device == "cpu"
        taken = device_bytes if on_cpu else host_embedding_bytes(self._target, work)
        available = max(self.usable_ram - taken, 0)
        return available if self._choices.ram_bytes is None else min(available, self._choices.ram_bytes)

    def _most_tok_per_s(self, draft: ModelSpec | None) -> float:
        adaptive, budgets = self._request.is_adaptive, self.tree_budgets(draft)
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
                target, draft, self.dtype, device, inputs.rates, acceptance, seats, retrieval=retrieval
            )
        return self._models[draft]
