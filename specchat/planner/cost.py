"""How long a pass takes and how many tokens come out of it: closed forms, before anything is loaded.

A step drafts a tree, has it verified in one pass, and scores the nodes that the walk visits. The link never rests:
it fills the slots while the draft grows its tree, and then stays as far ahead of the layers as there are slots. With
layers spread evenly, a pass over L layers of compute time c each, s of them streamed in time l each, ends when the last
layer has come and been computed, or when all have been computed that waited for nothing, whichever is later:

    pass = max(L c + what the first layer is waited for,  s l - (filled ahead) + c)

What comes out of a step grows with the logarithm of the tree: a node is worth its probability, and those of the best
unexplored nodes fall off as a power of their rank.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Literal

from specchat.planner.placement import TierSizes
from specchat.planner.rates import Basis, Rates, least_sure
from specchat.records.limits import HEAD_BLOCK_ROWS, draft_width
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec
from specchat.records.plan import Expectation

# What keeps a step from being faster: its layers' way to the device, computing them, or growing the tree.
Bound = Literal["link", "compute", "draft"]

# Keys that attention is priced for: a short chat. Longer ones are slower than predicted.
_KEYS = 512
# What growing a tree takes, as counted on the demo pair with 4 to 256 nodes: rows that the draft reads for each node of
# the tree (dropped ones included), and the batches of them, which are as many as the tree is deep.
_READ_PER_NODE = 1.4
_DEPTH_GAIN, _DEPTH_KNEE = 6.5, 8.0
# Of a batch besides the draft's layers and scores, on a CPU: choosing the best paths, laying out the rows. Measured on
# two cores with the demo's draft: 1.6 to 2 ms a batch with everything resident, 4.5 ms while layers come from the disk,
# when readers take the cores and the interpreter; its layers are 1.4 ms of that. Not measured beside a GPU.
_CPU_BATCH_S, _CPU_BATCH_BESIDE_READS_S = 0.5e-3, 3e-3
# Sweeps over a row of float32 scores while they become children of a node: scaled, softmax, the best sorted out.
_SCORE_SWEEPS = 10
# Layers with up to so many times the weights of their MLP's active width have no experts: what is taken for the MLP may
# have norms, biases and gates in it.
_DENSE_SHARE = 1.5
# Visited nodes for which a block of the head is computed.
_VISITS_PER_BLOCK = 2.5
# On a CPU reading and computing are uneven, and a layer that comes late is waited for unless more are there already:
# the share of the shorter of the two that is lost. Measured where both took about as long: 0.76-0.93 of raw reads with
# two slots, 0.95-1.04 with three.
_STALLS = {1: 1.0, 2: 0.2}
_STALL_OF_MANY = 0.03
# What whole passes took on a CPU beside the rates of single reads and products, which the probe measures: reading while
# two cores compute, and norms, activations and attention's small operations; by tests/benchmarks/predicted.py.
_DISK_SHARE = 0.92
_BESIDE_PRODUCTS = 1.12


@dataclass(frozen=True)
class Acceptance:
    """Tokens that come out of a step with so many draft nodes: `1 + gain ln(1 + nodes / knee)`.

    Attributes:
        basis: measured on this pair, or typical of such pairs.
    """

    gain: float
    knee: float
    basis: Basis

    def tokens_per_step(self, nodes: int) -> float:
        """At least the target's own token, at most one more than there are nodes."""
        return 1.0 if nodes == 0 else min(1.0 + self.gain * math.log1p(nodes / self.knee), 1.0 + nodes)


# SpecExec (arXiv 2406.02532) publishes 13.5 tokens per step for a 70B chat model with a 7B draft and up to 20 at 2,048
# nodes, UMbreLLa about 13 with a 1B one, SubSpec 11.9 for 7B with 1.5B: this form gives 8, 11 and 15 at 64, 256 and
# 2,048 nodes, and should rather promise too little.
TYPICAL_ACCEPTANCE = Acceptance(gain=2.0, knee=1.5, basis="typical")
# The embedded pair, with trees of 1, 4, 16, 64 and 128 nodes.
DEMO_ACCEPTANCE = Acceptance(gain=1.0, knee=1.0, basis="typical")


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to take and to bring.

    Attributes:
        pass_s: a whole step: drafting that nothing hides, the pass, scoring.
        link_s: the link's part of the pass, were it alone.
        compute_s: likewise of computing.
        draft_s: growing the tree.
        tokens_per_step: emitted by a step.
        tree_nodes: verified by a step; adaptive trees are taken to be as large as pays best.
        tok_per_s: while decoding; reading the prompt comes on top.
        bound: what the step waits for.
        basis: how sure the figures are, by the least sure of them.
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
    """Predicts steps of a pair on a machine.

    Args:
        target: its sizes, in the precision that is streamed.
        draft: likewise, or None for plain decoding.
        dtype: of weights and activations.
        device: "cpu" or "cuda:N".
        rates: of the machine.
        acceptance: of the pair.
    """

    def __init__(
        self,
        target: ModelSpec,
        draft: ModelSpec | None,
        dtype: Dtype,
        device: str,
        rates: Rates,
        acceptance: Acceptance,
    ) -> None:
        self._on_cpu = device == "cpu"
        self._num_layers = target.num_layers
        self._target = _compute_of(target, dtype, rates, on_cpu=self._on_cpu)
        self._draft = None if draft is None else _compute_of(draft, dtype, rates, on_cpu=self._on_cpu)
        self._rates = rates
        self._acceptance = acceptance
        self._timed: dict[tuple[int, bool], _StepCosts] = {}
        self._speeds: dict[TierSizes, dict[int, float]] = {}

    def predict(self, placement: TierSizes, tree_budget: int, *, adaptive: bool) -> Prediction:
        """The step that this placement gives.

        Args:
            placement: of the target's layers.
            tree_budget: the most nodes of a tree; 0 without a draft.
            adaptive: whether trees may be smaller where that pays.
        """
        return self._step(placement, self._best_size(placement, tree_budget, adaptive)[1])

    def expectation(self, placement: TierSizes, tree_budget: int) -> Expectation | None:
        """What adaptive trees start from: the same figures for trees of all sizes; None without a draft."""
        if self._draft is None or tree_budget == 0:
            return None
        steps = [self._step(placement, nodes) for nodes in (0, *_sizes_up_to(tree_budget))]
        best, reads = self.predict(placement, tree_budget, adaptive=True), self._reads(placement)
        return Expectation(
            pass_s=tuple((1 + step.tree_nodes, step.pass_s - step.draft_s) for step in steps),
            draft_s=tuple((rows, self._batch_s(rows, reads=reads)) for rows in _sizes_up_to(draft_width(tree_budget))),
            tree_nodes=best.tree_nodes,
            draft_passes=1 + draft_batches(best.tree_nodes),
            tokens_per_step=best.tokens_per_step,
        )

    def tok_per_s(self, placement: TierSizes, tree_budget: int, *, adaptive: bool) -> float:
        """That of `predict`, in a fraction of its time."""
        return self._best_size(placement, tree_budget, adaptive)[0]

    def most_tok_per_s(self, tree_budget: int, *, adaptive: bool) -> float:
        """What no placement exceeds: `tok_per_s` if every layer stayed with the device."""
        sizes = self._sizes(tree_budget, adaptive)
        return max(self._step_costs(nodes, reads=False).most_tok_per_s(self._num_layers) for nodes in sizes)

    def _sizes(self, tree_budget: int, adaptive: bool) -> tuple[int, ...]:
        """Trees to try."""
        if self._draft is None or tree_budget == 0:
            return (0,)
        return _sizes_up_to(tree_budget) if adaptive else (tree_budget,)

    def _best_size(self, placement: TierSizes, tree_budget: int, adaptive: bool) -> tuple[float, int]:
        """The best of all sizes' speeds, and the smallest size that has it.

        A larger budget often leaves as many layers where they are, so what was worked out for one counts for others.
        """
        speeds = self._speeds.setdefault(placement, {})
        queue: LinkQueue | None = None
        best_per_s, best = 0.0, 0
        for nodes in self._sizes(tree_budget, adaptive):
            per_s = speeds.get(nodes)
            if per_s is None:
                queue = queue or self._queue(placement)
                sides = self._step_costs(nodes, reads=self._reads(placement))
                per_s = speeds[nodes] = sides.tokens / self._pass_s(queue, sides)
            if per_s > best_per_s:
                best_per_s, best = per_s, nodes
        return best_per_s, best

    def _step(self, placement: TierSizes, nodes: int) -> Prediction:
        sides, queue = self._step_costs(nodes, reads=self._reads(placement)), self._queue(placement)
        pass_s = self._pass_s(queue, sides)
        compute_s = placement.num_layers * sides.layer_s
        linked_s = self._linked_s(queue, sides)
        bound: Bound = "link" if linked_s > compute_s else "draft" if sides.draft_s > compute_s else "compute"
        return Prediction(
            pass_s=pass_s,
            link_s=self._link(placement)[0],
            compute_s=compute_s,
            draft_s=sides.draft_s,
            tokens_per_step=sides.tokens,
            tree_nodes=nodes,
            tok_per_s=sides.tokens / pass_s,
            bound=bound,
            basis=self._basis(placement, nodes),
        )

    def _pass_s(self, queue: "LinkQueue", sides: "_StepCosts") -> float:
        """A whole step: drafting and scoring, then whatever of the pass ends last."""
        computed_s = queue.computed_s(sides.layer_s, sides.outside_s)
        return sides.outside_s + max(computed_s, self._linked_s(queue, sides))

    def _linked_s(self, queue: "LinkQueue", sides: "_StepCosts") -> float:
        stalled_s = queue.num_linked * min(queue.arrival_s, sides.layer_s) * self._stall(queue.slots)
        return queue.linked_s(sides.layer_s, sides.outside_s) + stalled_s

    def _queue(self, placement: TierSizes) -> "LinkQueue":
        link_s, num_linked = self._link(placement)
        arrival_s = link_s / num_linked if num_linked else 0.0
        return LinkQueue(placement.num_layers, num_linked, arrival_s, placement.slots)

    def _link(self, placement: TierSizes) -> tuple[float, int]:
        """Seconds that the slowest link is busy in a pass, and the layers that cross it."""
        from_disk_s = placement.disk_bytes / self._rates.disk.per_s
        if self._on_cpu:  # what the page cache has is computed where it is
            return from_disk_s / _DISK_SHARE, placement.num_on_disk
        to_device_s = (placement.ram_bytes + placement.disk_bytes) / self._rates.host.per_s
        if from_disk_s > to_device_s:
            return from_disk_s, placement.num_on_disk
        return to_device_s, placement.num_in_ram + placement.num_on_disk

    def _stall(self, slots: int) -> float:
        return _STALLS.get(slots, _STALL_OF_MANY) if self._on_cpu else 0.0

    def _reads(self, placement: TierSizes) -> bool:
        """Whether reading takes the cores that the draft runs on."""
        return self._on_cpu and placement.num_on_disk > 0

    def _step_costs(self, nodes: int, *, reads: bool) -> "_StepCosts":
        """What depends on nothing else of the placement."""
        key = nodes, reads
        if key not in self._timed:
            tokens = self._acceptance.tokens_per_step(nodes)
            draft_s, head_s = self._draft_s(nodes, tokens, reads=reads), self._target.head_s(tokens)
            self._timed[key] = _StepCosts(self._target.layer_s(1 + nodes), draft_s, draft_s + head_s, tokens)
        return self._timed[key]

    def _draft_s(self, nodes: int, tokens: float, *, reads: bool) -> float:
        """Batches of the draft: one that reads the last step's tokens, then as many as the tree has nodes to expand."""
        if self._draft is None or nodes == 0:
            return 0.0
        num_batches = draft_batches(nodes)
        rows = max(round(_READ_PER_NODE * nodes / num_batches), 1)
        return self._draft.pass_s(math.ceil(tokens)) + num_batches * self._batch_s(rows, reads=reads)

    def _batch_s(self, rows: int, *, reads: bool) -> float:
        """A pass of the draft, and what comes with it."""
        drafting_s = 0.0 if self._draft is None else self._draft.pass_s(rows)
        beside_s = 0.0 if not self._on_cpu else _CPU_BATCH_BESIDE_READS_S if reads else _CPU_BATCH_S
        return drafting_s + beside_s

    def _basis(self, placement: TierSizes, nodes: int) -> Basis:
        bases: list[Basis] = [self._rates.compute_basis]
        if placement.disk_bytes:
            bases.append(self._rates.disk.basis)
        if placement.ram_bytes and not self._on_cpu:
            bases.append(self._rates.host.basis)
        if nodes:
            bases.append(self._acceptance.basis)
        return least_sure(bases)


@dataclass(frozen=True)
class LinkQueue:
    """When a pass ends that shares its time with a link, in the long run of many steps.

    Attributes:
        num_layers, num_linked: of the target, and those of them that come over the link.
        arrival_s: the link's time for one layer.
        slots: that there are.
    """

    num_layers: int
    num_linked: int
    arrival_s: float
    slots: int

    def computed_s(self, layer_s: float, outside_s: float) -> float:
        """When everything is computed, if only the first layer was waited for.

        Resident layers stand before streamed ones, so some are computed before the first of those is needed.

        Args:
            layer_s: computing one.
            outside_s: of a step without its pass; slots fill meanwhile.
        """
        if not self.num_linked:
            return self.num_layers * layer_s
        front_s = layer_s * max(self.num_layers / self.num_linked - 1, 0.0)
        waiting_s = max(self.arrival_s - min(outside_s, self.arrival_s) - front_s, 0.0)
        return self.num_layers * layer_s + waiting_s

    def linked_s(self, layer_s: float, outside_s: float) -> float:
        """When the last layer has come and been computed, if the link never rested.

        Args:
            layer_s: as for `computed_s`.
            outside_s: likewise.
        """
        if not self.num_linked:
            return 0.0
        ahead_s = min(outside_s, min(self.slots, self.num_linked) * self.arrival_s)
        return self.num_linked * self.arrival_s - ahead_s + layer_s


@dataclass(frozen=True)
class _StepCosts:
    """Of a tree of some size: computing a layer of the target, drafting, all but the pass, tokens."""

    layer_s: float
    draft_s: float
    outside_s: float
    tokens: float

    def most_tok_per_s(self, num_layers: int) -> float:
        """If the pass waits for nothing."""
        return self.tokens / (self.outside_s + num_layers * self.layer_s)


def draft_batches(nodes: int) -> float:
    """Passes of the draft for a tree of so many nodes: one for each of its levels.

    A pass may expand `draft_width` of them, which is never fewer than a level has.
    """
    return min(_DEPTH_GAIN * math.log1p(nodes / _DEPTH_KNEE), float(nodes))


@cache
def _sizes_up_to(most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, and itself."""
    return (*(1 << power for power in range(most.bit_length()) if 1 << power < most), most)


@lru_cache(maxsize=512)
def _compute_of(spec: ModelSpec, dtype: Dtype, rates: Rates, *, on_cpu: bool) -> "_Compute":
    """One model is a draft of many, and is asked for in every search of a target."""
    return _Compute(spec, _products_of(dtype, rates, on_cpu=on_cpu), rates, on_cpu=on_cpu)


class _Compute:
    """How long a model's layers and head take for so many rows."""

    def __init__(self, spec: ModelSpec, products: "_Products", rates: Rates, *, on_cpu: bool) -> None:
        self._spec = spec
        self._products = products
        self._rates = rates
        self._on_cpu = on_cpu
        self._pass_s: dict[int, float] = {}
        self._layer_s: dict[int, float] = {}

    def pass_s(self, rows: int) -> float:
        """All layers, resident, and the scores of every row: a batch of a draft."""
        if rows not in self._pass_s:
            spec = self._spec
            scoring = _SCORE_SWEEPS * rows * spec.vocab_size * 4 / self._rates.memory.per_s
            head_s = self._head_weights * self._products.weight_s(rows)
            self._pass_s[rows] = spec.num_layers * self.layer_s(rows) + head_s + scoring
        return self._pass_s[rows]

    def head_s(self, tokens: float) -> float:
        """Scores of the nodes that a walk visits, in blocks."""
        blocks = max(tokens / _VISITS_PER_BLOCK, 1.0)
        sweeps = _SCORE_SWEEPS * tokens * self._spec.vocab_size * 4 / self._rates.memory.per_s
        products_s = blocks * self._head_weights * self._products.weight_s(HEAD_BLOCK_ROWS)
        return self._rates.layer_s * blocks + products_s + sweeps

    def layer_s(self, rows: int) -> float:
        """One layer on average, its weights being there."""
        if rows not in self._layer_s:
            hit, rows_each = self._experts_hit(rows)
            weight_s = self._products.weight_s
            shared = self._shared_weights + self._attention_weights
            weights_s = shared * weight_s(rows) + hit * self._expert_weights * weight_s(rows_each)
            products_s = weights_s * (_BESIDE_PRODUCTS if self._on_cpu else 1.0)
            self._layer_s[rows] = self._rates.layer_s + products_s + self._dequantizing_s(hit)
        return self._layer_s[rows]

    def _dequantizing_s(self, hit: float) -> float:
        """Once a pass for each matrix that is used; experts that no row goes to are left alone."""
        quant = self._spec.quant
        if quant == "none":
            return 0.0
        per_weight = self._rates.dequantize_s["int4" if "4" in quant else "int8"]
        return per_weight * (self._shared_weights + hit * self._expert_weights)

    def _experts_hit(self, rows: int) -> tuple[float, float]:
        """The share of the experts' weights that rows go to, chosen at random, and the rows that each of those gets."""
        active = self._active_share
        hit = 1.0 - (1.0 - active) ** rows
        return hit, max(rows * active / hit, 1.0)

    @cached_property
    def _layer_weights(self) -> float:
        """Of one layer, whatever they are stored in."""
        return self._spec.num_layer_params / max(self._spec.num_layers, 1)

    @cached_property
    def _mlp_weights(self) -> float:
        """That one row is multiplied with: three matrices of the width that is active."""
        return min(3.0 * self._spec.hidden_size * self._spec.mlp_size, self._layer_weights)

    @cached_property
    def _active_share(self) -> float:
        """Of the experts' weights, how many one row uses; 1 for models without experts."""
        beside = (
            self._spec.hidden_size
            * sum(2 * self._spec.num_heads * shape.key_dim + shape.numbers_per_row for shape in self._spec.kv_shapes)
            / max(len(self._spec.kv_shapes), 1)
        )
        experts = self._layer_weights - min(beside, self._layer_weights)
        return 1.0 if experts <= _DENSE_SHARE * self._mlp_weights else self._mlp_weights / experts

    @cached_property
    def _expert_weights(self) -> float:
        return 0.0 if self._active_share == 1.0 else self._mlp_weights / self._active_share

    @cached_property
    def _shared_weights(self) -> float:
        return self._layer_weights - self._expert_weights

    @cached_property
    def _attention_weights(self) -> float:
        """Attention to the keys of a short chat, as if it were a matrix."""
        dims = max((shape.key_dim + shape.value_dim for shape in self._spec.kv_shapes), default=0)
        return float(self._spec.num_heads * dims * _KEYS)

    @cached_property
    def _head_weights(self) -> float:
        return float(self._spec.vocab_size * self._spec.hidden_size)


@lru_cache(maxsize=16)
def _products_of(dtype: Dtype, rates: Rates, *, on_cpu: bool) -> "_Products":
    return _Products(dtype, rates, on_cpu=on_cpu)


class _Products:
    """How long products take with matrices of some dtype."""

    def __init__(self, dtype: Dtype, rates: Rates, *, on_cpu: bool) -> None:
        self._dtype: Dtype = dtype
        self._rates = rates
        self._on_cpu = on_cpu
        self._weight_s: dict[float, float] = {}

    def weight_s(self, rows: float) -> float:
        """Seconds for one weight of a matrix that so many rows are multiplied with."""
        if rows not in self._weight_s:  # asked for a hundred times in a search
            self._weight_s[rows] = self._interpolated(rows) * self._dtype_factor(rows)
        return self._weight_s[rows]

    def _interpolated(self, rows: float) -> float:
        rates = self._rates.matmul
        above = next((i for i, rate in enumerate(rates) if rate.rows >= rows), len(rates))
        if above == 0 or len(rates) == 1:
            return 2 * rates[0].rows / rates[0].flop_per_s
        if above == len(rates):
            return 2 * rows / rates[-1].flop_per_s
        (x0, y0), (x1, y1) = ((r.rows, 2 * r.rows / r.flop_per_s) for r in rates[above - 1 : above + 1])
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def _dtype_factor(self, rows: float) -> float:
        """Of the dtype against that of the measurement: by bytes for few rows, by arithmetic for many."""
        wide = DTYPE_BYTES[self._dtype] / DTYPE_BYTES[self._rates.matmul_dtype]
        if wide == 1 or (wide < 1 and self._on_cpu):  # a CPU that was measured in float32 has nothing faster
            return 1.0
        many = min(math.log2(max(rows, 1.0)) / 6, 1.0)
        return float(wide ** (1 + many))
