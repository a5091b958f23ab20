"""Predict the time of a step and its tokens in closed form, before anything is loaded.

A step drafts a tree, verifies it in one pass of the target, and scores the nodes that the walk visits. The link never
idles: it fills the slots while the draft grows its tree, and then runs ahead of the layers by the number of slots.
Assume layers spread evenly: L layers of compute time c each, and s of them streamed in time l each. Then a pass is
bound either by compute, or by the link until the last layer has arrived and been computed:

    pass = max(L c + (exposed wait for the first streamed layer),  s l - (filled ahead) + c)

Sequences that share a pass also share its nodes, so each adds one row and the tokens of a tree of its share. Speeds
are those of all sequences together.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

from specchat.planner.acceptance import Acceptance
from specchat.planner.compute import ComputeTimes, compute_times
from specchat.planner.link_queue import LinkQueue
from specchat.planner.placement import TierSizes
from specchat.planner.rates import Basis, Rates, least_sure
from specchat.records.limits import MOST_BLOCK_ROWS, draft_width
from specchat.records.model import Dtype, ModelSpec
from specchat.records.plan import Expectation

# Bottleneck of a step: moving layers to the device, computing them, or growing the tree.
Bound = Literal["link", "compute", "draft"]

# Cost of growing a tree, counted on the demo pair with 4 to 256 nodes: rows that the draft reads per node of the tree
# (dropped nodes included), and the number of batches, which equals the depth of the tree.
_READ_PER_NODE = 1.4
_DEPTH_GAIN, _DEPTH_KNEE = 6.5, 8.0
# Time of a batch on a CPU besides the draft's layers and scores: choosing the best paths, laying out the rows. Measured
# on two cores with the demo's draft: 1.6 to 2 ms a batch with everything resident, 4.5 ms while layers are read from
# disk and readers occupy the cores and the interpreter. The draft's layers take 1.4 ms of both.
_CPU_BATCH_S, _CPU_BATCH_BESIDE_READS_S = 0.5e-3, 3e-3
# The same on a GPU: 70 kernels where a tree grows on the device, else a wait and the host's choice of nodes, as in
# engine/drafting. Not measured.
_GPU_BATCH_S, _HOST_BATCH_S = 0.2e-3, 1.5e-3
# A tree that grows on a device takes as many batches as the draft's cache has rows for: two for each node.
_MOST_GPU_BATCHES = 16
# Most rows of a pass to predict for adaptive trees.
_MOST_PREDICTED = 512
# Time to look up what may follow a node, without a draft model. Measured on the demo, with trees of 16 and 64 nodes.
_LOOKUP_S = 50e-6
# On a CPU, reading and computing overlap only partly. This share of the shorter of the two is lost, by slot count: a
# late layer stalls the pass unless other layers are ready. Measured where both took about equally long:
# 0.76-0.93 of the raw read rate with two slots, 0.95-1.04 with three.
_STALLS = {1: 1.0, 2: 0.2}
_STALL_OF_MANY = 0.03
# Read rate during whole passes on a CPU, relative to the probe's reads without other work: here two cores also compute.
# Measured with tests/benchmarks/predicted.py.
_DISK_SHARE = 0.92
# Rate of small reads from the page cache, relative to copies within host memory: each copies once, on one thread.
_CACHED_SHARE = 0.5


@dataclass(frozen=True)
class Prediction:
    """Expected time and tokens of a step.

    Attributes:
        pass_s: seconds of a whole step: exposed drafting, the pass, scoring.
        link_s: seconds that the link is busy in a pass.
        compute_s: seconds of computing the layers in a pass.
        draft_s: seconds of growing the tree.
        tokens_per_step: expected number of tokens that a step emits.
        tree_nodes: nodes that a step verifies; for adaptive trees the fastest size.
        tok_per_s: tokens per second while decoding, without reading the prompt.
        bound: bottleneck of the step.
        basis: origin of the figures, by the least certain one.
    """

    pass_s: float
    link_s: float
    compute_s: float
    draft_s: float
    tokens_per_step: float
    tree_nodes: int
    tok_per_s: float
    bound: Bound
    basis: Basis


class CostModel:
    """Prediction of steps for a pair of models on a machine.

    Args:
        target: sizes of the target, in the precision that is streamed.
        draft: sizes of the draft, or None without a draft model.
        dtype: dtype of weights and activations.
        device: "cpu" or "cuda:N".
        rates: rates of the machine.
        acceptance: acceptance of the pair.
        seats: number of sequences of every pass.
        retrieval: whether draft nodes may come from the text itself.
    """

    def __init__(
        self,
        target: ModelSpec,
        draft: ModelSpec | None,
        dtype: Dtype,
        device: str,
        rates: Rates,
        acceptance: Acceptance,
        seats: int = 1,
        *,
        retrieval: bool = False,
    ) -> None:
        self._on_cpu = device == "cpu"
        self._num_layers = target.num_layers
        self._target = compute_times(target, dtype, rates, on_cpu=self._on_cpu)
        self._draft = None if draft is None else compute_times(draft, dtype, rates, on_cpu=self._on_cpu)
        self._drafts_by_copy = draft is not None and draft.is_copy
        self._drafts_by_head = draft is not None and draft.is_head
        self._drafts_by_block = draft is not None and draft.is_block
        self._drafts = draft is not None or retrieval
        self._rates = rates
        self._acceptance = acceptance
        self._seats = seats
        self._timed: dict[tuple[int, _Drafting, _LayerKinds], StepCosts] = {}
        self._speeds: dict[tuple[TierSizes, int], dict[int, float]] = {}

    def predict(self, placement: TierSizes, tree_budget: int, *, adaptive: bool) -> Prediction:
        """Predict a step with this placement.

        Args:
            placement: tier sizes of the target's layers.
            tree_budget: maximum number of nodes of a tree; 0 without a draft.
            adaptive: whether trees may be smaller where that is faster.
        """
        return self._step(placement, self._best_size(placement, tree_budget, adaptive)[1], tree_budget)

    def expectation(self, placement: TierSizes, tree_budget: int) -> Expectation | None:
        """Return the predictions that adaptive trees start from; None for plain decoding.

        Passes are predicted beyond the largest tree, because trees share passes with the rows of prompts.
        """
        if not self._drafts or tree_budget == 0:
            return None
        sizes = (0, *_sizes_up_to(max(tree_budget, _MOST_PREDICTED)))
        steps = [self._step(placement, nodes, tree_budget) for nodes in sizes]
        best, drafting = self.predict(placement, tree_budget, adaptive=True), self._drafting(placement, tree_budget)
        width = draft_width(tree_budget, self._seats)
        return Expectation(
            pass_s=tuple((self._seats + step.tree_nodes, step.pass_s - step.draft_s) for step in steps),
            draft_s=tuple((rows, self._batch_s(rows, drafting)) for rows in _sizes_up_to(width)),
            tree_nodes=best.tree_nodes,
            draft_passes=self._draft_passes(best.tree_nodes, best.tokens_per_step),
            tokens_per_step=best.tokens_per_step,
            num_sequences=self._seats,
        )

    def tok_per_s(self, placement: TierSizes, tree_budget: int, *, adaptive: bool) -> float:
        """Return the speed of `predict`, in a fraction of its time."""
        return self._best_size(placement, tree_budget, adaptive)[0]

    def most_tok_per_s(self, tree_budget: int, *, adaptive: bool) -> float:
        """Return an upper bound of `tok_per_s` over all placements: the speed with every layer resident."""
        drafting = _Drafting(reads=False, num_copied=0, width=self._fixed_width(tree_budget))
        sizes = self._sizes(tree_budget, adaptive)
        fastest = _LayerKinds(num_streamed=0, num_expanded=self._num_layers if self._on_cpu else 0)
        costs = (self._step_costs(nodes, drafting, fastest) for nodes in sizes)
        return max(each.most_tok_per_s(self._num_layers) for each in costs)

    def _sizes(self, tree_budget: int, adaptive: bool) -> tuple[int, ...]:
        """Return the tree sizes to try."""
        if not self._drafts or tree_budget == 0:
            return (0,)
        return _sizes_up_to(tree_budget) if adaptive else (tree_budget,)

    def _best_size(self, placement: TierSizes, tree_budget: int, adaptive: bool) -> tuple[float, int]:
        """Return the best speed of all tree sizes, and the smallest size that reaches it.

        Speeds are cached by placement, because larger tree budgets often lead to the same placement.
        """
        speeds = self._speeds.setdefault((placement, self._fixed_width(tree_budget)), {})
        queue: LinkQueue | None = None
        best_per_s, best = 0.0, 0
        for nodes in self._sizes(tree_budget, adaptive):
            per_s = speeds.get(nodes)
            if per_s is None:
                queue = queue or self._queue(placement)
                costs = self._costs(placement, nodes, tree_budget)
                per_s = speeds[nodes] = costs.tokens / self._pass_s(placement, queue, costs)
            if per_s > best_per_s:
                best_per_s, best = per_s, nodes
        return best_per_s, best

    def _step(self, placement: TierSizes, nodes: int, tree_budget: int) -> Prediction:
        costs, queue = self._costs(placement, nodes, tree_budget), self._queue(placement)
        pass_s = self._pass_s(placement, queue, costs)
        compute_s = placement.num_layers * costs.layer_s
        linked_s = self._linked_s(queue, costs) if placement.experts is None else self._missing_s(placement, costs)
        bound: Bound = "link" if linked_s > compute_s else "draft" if costs.draft_s > compute_s else "compute"
        return Prediction(
            pass_s=pass_s,
            link_s=self._link_load(placement)[0] if placement.experts is None else linked_s,
            compute_s=compute_s,
            draft_s=costs.draft_s,
            tokens_per_step=costs.tokens,
            tree_nodes=nodes,
            tok_per_s=costs.tokens / pass_s,
            bound=bound,
            basis=self._basis(placement, nodes),
        )

    def _pass_s(self, placement: TierSizes, queue: LinkQueue, costs: "StepCosts") -> float:
        """Return the seconds of a whole step: drafting and scoring, then the later end of link and compute.

        Experts that are missing are read while others are computed, but not before their router has been computed.
        """
        if placement.experts is not None:
            computed_s, experts_s = placement.num_layers * costs.layer_s, placement.num_layers * costs.experts_s
            missing_s = self._missing_s(placement, costs)
            return (
                costs.outside_s + computed_s + placement.experts.waited_s(costs.rows, missing_s, computed_s, experts_s)
            )
        computed_s = queue.computed_s(costs.layer_s, costs.outside_s) + self._reading_s(placement)
        return costs.outside_s + max(computed_s, self._linked_s(queue, costs))

    def _reading_s(self, placement: TierSizes) -> float:
        """Return the seconds by which reads slow down a CPU that computes beside them."""
        return self._rates.reading_s * placement.disk_bytes if self._on_cpu else 0.0

    def _missing_s(self, placement: TierSizes, costs: "StepCosts") -> float:
        """Return the seconds that reading the missing experts of a pass takes."""
        experts = placement.experts
        assert experts is not None
        missed, disk_share = experts.missed_bytes(costs.rows), experts.disk_share
        if experts.on_gpu:
            return max(missed / self._rates.host.per_s, disk_share * missed / self._rates.disk.per_s)
        from_disk_s = disk_share * missed / (_DISK_SHARE * self._rates.disk.per_s)
        from_cache_s = (1 - disk_share) * missed / (_CACHED_SHARE * self._rates.ram.per_s)
        return from_disk_s + from_cache_s

    def _linked_s(self, queue: LinkQueue, costs: "StepCosts") -> float:
        stalled_s = queue.num_linked * min(queue.arrival_s, costs.layer_s) * self._stall(queue.slots)
        return queue.linked_s(costs.layer_s, costs.outside_s) + stalled_s

    def _queue(self, placement: TierSizes) -> LinkQueue:
        link_s, num_linked = self._link_load(placement)
        arrival_s = link_s / num_linked if num_linked else 0.0
        return LinkQueue(placement.num_layers, num_linked, arrival_s, placement.slots)

    def _link_load(self, placement: TierSizes) -> tuple[float, int]:
        """Return the seconds that the slowest link is busy in a pass, and the number of layers that cross the link."""
        from_disk_s = placement.disk_bytes / self._rates.disk.per_s
        if self._on_cpu:  # layers in the page cache are computed in place
            return from_disk_s / _DISK_SHARE, placement.num_on_disk
        to_device_s = (placement.ram_bytes + placement.disk_bytes) / self._rates.host.per_s
        if from_disk_s > to_device_s:
            return from_disk_s, placement.num_on_disk
        return to_device_s, placement.num_in_ram + placement.num_on_disk

    def _stall(self, slots: int) -> float:
        return _STALLS.get(slots, _STALL_OF_MANY) if self._on_cpu else 0.0

    def _drafting(self, placement: TierSizes, tree_budget: int) -> "_Drafting":
        """Return whether disk readers occupy the cores that the draft runs on, and what a copy computes with."""
        experts = placement.experts
        reads_experts = experts is not None and experts.reads_disk
        reads = self._on_cpu and (placement.num_on_disk > 0 or reads_experts)
        num_copied = placement.num_streamed if self._drafts_by_copy else 0
        return _Drafting(reads, num_copied, self._fixed_width(tree_budget))

    def _fixed_width(self, tree_budget: int) -> int:
        """Return the rows of each draft pass where trees grow on the device, in passes of a fixed size; else 0."""
        return min(draft_width(tree_budget), tree_budget) if self._grows_on_device else 0

    def _costs(self, placement: TierSizes, nodes: int, tree_budget: int) -> "StepCosts":
        kinds = _LayerKinds(placement.num_streamed, placement.num_expanded)
        return self._step_costs(nodes, self._drafting(placement, tree_budget), kinds)

    def _step_costs(self, nodes: int, drafting: "_Drafting", kinds: "_LayerKinds") -> "StepCosts":
        """Return the costs that depend only on the tree size, the conditions of drafting, and the layers' kinds."""
        key = nodes, drafting, kinds
        if key not in self._timed:
            tokens = self._seats * self._acceptance.tokens_per_step(nodes / self._seats)
            draft_s, head_s = self._draft_s(nodes, tokens, drafting), self._target.head_s(tokens)
            rows = self._seats + nodes
            layer_s, experts_s = self._mean_layer_s(rows, kinds), self._target.experts_s(rows)
            self._timed[key] = StepCosts(rows, layer_s, experts_s, draft_s, draft_s + head_s, tokens)
        return self._timed[key]

    def _mean_layer_s(self, rows: int, kinds: "_LayerKinds") -> float:
        """Return the mean seconds of a layer over streamed, resident and expanded ones.

        The sum begins with the fastest kind, so that rounding makes no mean faster than that.
        """
        layer_s = self._target.layer_s
        streamed_s, resident_s = layer_s(rows, resident=False), layer_s(rows, resident=True)
        fastest_s = layer_s(rows, resident=True, expanded=True) if kinds.num_expanded else resident_s
        num_plain = self._num_layers - kinds.num_streamed - kinds.num_expanded
        beside_s = kinds.num_streamed * (streamed_s - fastest_s) + num_plain * (resident_s - fastest_s)
        return fastest_s + beside_s / self._num_layers

    def _draft_passes(self, nodes: int, tokens: float) -> float:
        """Return the expected passes of the draft for a tree: one for the new tokens, then one per level.

        A head that guesses in blocks needs the first one only.
        """
        return 1 if self._draft is None or self._drafts_by_block else 1 + self._num_batches(nodes, tokens)

    def _num_batches(self, nodes: int, tokens: float) -> float:
        """Return the expected batches for a tree: as on the demo, but one for each accepted level after the first."""
        # Else a draft that is nearly always right would seem to win even if its passes cost as much as the target's.
        batches = max(draft_batches(nodes), tokens / self._seats - 2)
        return min(batches, _MOST_GPU_BATCHES) if self._grows_on_device else batches

    @property
    def _grows_on_device(self) -> bool:
        """Whether a draft model on a GPU grows its tree without the host."""
        has_model = self._draft is not None and not self._drafts_by_head and not self._drafts_by_copy
        return not self._on_cpu and self._seats == 1 and has_model

    def _draft_s(self, nodes: int, tokens: float, drafting: "_Drafting") -> float:
        """Return the seconds of drafting: one pass over the last step's tokens, then one batch per tree level.

        A copy has the target's rows of these tokens, and computes the root alone.
        """
        if nodes == 0:
            return 0.0
        if self._draft is None:
            return _LOOKUP_S * nodes
        if self._drafts_by_block:
            block_s = self._draft_pass_s(self._draft, self._seats * MOST_BLOCK_ROWS, drafting)
            return block_s + draft_batches(nodes) * self._beside_s(drafting)
        num_batches = self._num_batches(nodes, tokens)
        rows = drafting.width or max(round(_READ_PER_NODE * nodes / num_batches), 1)
        new = self._seats if self._drafts_by_copy else math.ceil(tokens)
        return self._draft_pass_s(self._draft, new, drafting) + num_batches * self._batch_s(rows, drafting)

    def _draft_pass_s(self, draft: ComputeTimes, rows: int, drafting: "_Drafting") -> float:
        """Return the seconds of a draft pass; a copy has the target's own layers beside those that are copied."""
        if not self._drafts_by_copy:
            return draft.pass_s(rows, by_graph=self._grows_on_device)
        resident_s = (self._num_layers - drafting.num_copied) * self._target.layer_s(rows, resident=True)
        return resident_s + drafting.num_copied * draft.layer_s(rows, resident=True) + self._target.scoring_s(rows)

    def _batch_s(self, rows: int, drafting: "_Drafting") -> float:
        """Return the seconds of one draft batch: the pass and its bookkeeping, or looking up proposals."""
        if self._draft is None:
            return _LOOKUP_S * rows
        return self._draft_pass_s(self._draft, rows, drafting) + self._beside_s(drafting)

    def _beside_s(self, drafting: "_Drafting") -> float:
        """Return the seconds of a draft batch besides its pass."""
        if not self._on_cpu:
            return _GPU_BATCH_S if self._grows_on_device else _HOST_BATCH_S
        return _CPU_BATCH_BESIDE_READS_S if drafting.reads else _CPU_BATCH_S

    def _basis(self, placement: TierSizes, nodes: int) -> Basis:
        bases: list[Basis] = [self._rates.compute_basis]
        experts = placement.experts
        if placement.disk_bytes or (experts is not None and experts.reads_disk):
            bases.append(self._rates.disk.basis)
        if (placement.ram_bytes or experts is not None) and not self._on_cpu:
            bases.append(self._rates.host.basis)
        if nodes:
            bases.append(self._acceptance.basis)
        return least_sure(bases)


@dataclass(frozen=True)
class _Drafting:
    """Conditions of drafting.

    Attributes:
        reads: whether disk readers occupy the cores that the draft runs on.
        num_copied: number of layers that the target's own copy has in low precision; 0 for other drafts.
        width: rows of each pass over nodes if they are fixed, else 0.
    """

    reads: bool
    num_copied: int
    width: int = 0


@dataclass(frozen=True)
class _LayerKinds:
    """Numbers of the target's layers that stream, and of resident ones that are expanded."""

    num_streamed: int
    num_expanded: int


@dataclass(frozen=True)
class StepCosts:
    """Costs of a step by tree size.

    Attributes:
        rows: rows of the pass.
        layer_s: seconds of a layer of the target.
        experts_s: part of `layer_s` for the experts.
        draft_s: seconds of drafting.
        outside_s: seconds of drafting and of the head.
        tokens: expected tokens.
    """

    rows: int
    layer_s: float
    experts_s: float
    draft_s: float
    outside_s: float
    tokens: float

    def most_tok_per_s(self, num_layers: int) -> float:
        """Return the speed of a pass that waits for no layer."""
        return self.tokens / (self.outside_s + num_layers * self.layer_s)


def draft_batches(nodes: int) -> float:
    """Return the expected draft passes for a tree of `nodes` nodes: one per level.

    A pass may expand up to `draft_width` nodes, which covers every level.
    """
    return min(_DEPTH_GAIN * math.log1p(nodes / _DEPTH_KNEE), float(nodes))


@cache
def _sizes_up_to(most: int) -> tuple[int, ...]:
    """Return the powers of two below `most`, then `most`."""
    return (*(1 << power for power in range(most.bit_length()) if 1 << power < most), most)
