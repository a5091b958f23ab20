"""A configuration of a plan that fits, with its predicted speed, and the order of preference."""

from dataclasses import dataclass, replace
from functools import cached_property

from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import expanded_sizes, head_copy_bytes, layer_sizes
from specchat.planner.cost import CostModel, Prediction
from specchat.planner.experts import with_experts
from specchat.planner.memory import (
    build_host_ledger,
    build_ledger,
    host_embedding_bytes,
    host_embeddings,
    kv_bytes,
    retrieval_items,
)
from specchat.planner.placement import TierSizes, among, interleaved
from specchat.planner.states import restore_items, state_memory
from specchat.planner.workload import default_tree_budgets, layer_host_bytes
from specchat.records.model import LOWER_QUANTS, ModelSpec
from specchat.records.plan import Placement, Plan, PlanChoices, Workload


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
    def devices(self) -> tuple[str, ...]:
        """Names of the devices if there are several, else empty."""
        return ()

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
        head = head_copy_bytes(target, work.dtype) if expanded else 0
        tier = self.sizes.experts
        expert_items = () if tier is None else tier.host_items
        placement = Placement(
            target.num_layers,
            resident,
            in_ram,
            self.slots,
            expanded=expanded,
            expanded_bytes=more,
            head_copy_bytes=head,
        )
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
    return rounded(candidate.tok_per_s), -is_lower, -rank, -candidate.slots


def rounded(tok_per_s: float) -> float:
    """Round a speed, because sums in another order differ in their last bits."""
    return round(tok_per_s, 6)
