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
from functools import cached_property
from typing import Literal

from specchat.config import DTYPE_BYTES, HEAD_BLOCK_ROWS, Dtype, ModelSpec, draft_width
from specchat.planner.placement import Placement
from specchat.planner.rates import Basis, Rates, least_sure

# What keeps a step from being faster: its layers' way to the device, computing them, or growing the tree.
Bound = Literal["link", "compute", "draft"]

# Keys that attention is priced for: a short chat. Longer ones are slower than predicted.
_KEYS = 512
# What growing a tree takes, as counted on the demo pair with 4 to 256 nodes: rows that the draft reads for each node of
# the tree (dropped ones included), and the batches of them, which are as many as the tree is deep.
_READ_PER_NODE = 1.4
_DEPTH_GAIN, _DEPTH_KNEE = 6.5, 8.0
# Of a batch besides the draft's layers and scores: choosing the best paths, laying out the rows. Measured on two cores
# while layers stream: 4.5 ms a batch of a draft that computes for 0.5 ms. Not measured on a GPU, whose host is idle.
_CPU_BATCH_S = 4e-3
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
        self._target = _Compute(target, dtype, rates, on_cpu=device == "cpu")
        self._draft = None if draft is None else _Compute(draft, dtype, rates, on_cpu=device == "cpu")
        self._on_cpu = device == "cpu"
        self._rates = rates
        self._acceptance = acceptance
        self._timed: dict[tuple[int, int], _Sides] = {}

    def predict(self, placement: Placement, tree_budget: int, *, adaptive: bool) -> Prediction:
        """The step that this placement gives.

        Args:
            placement: of the target's layers.
            tree_budget: the most nodes of a tree; 0 without a draft.
            adaptive: whether trees may be smaller where that pays.
        """
        if self._draft is None or tree_budget == 0:
            return self._step(placement, 0, 0)
        sizes = _sizes(tree_budget) if adaptive else [tree_budget]
        return max((self._step(placement, nodes, tree_budget) for nodes in sizes), key=lambda p: p.tok_per_s)

    def _step(self, placement: Placement, nodes: int, tree_budget: int) -> Prediction:
        sides = self._sides(nodes, tree_budget)
        link_s, num_linked = self._link(placement)
        outside_s = sides.draft_s + sides.head_s
        compute_s = placement.num_layers * sides.layer_s
        queue = LinkQueue(
            num_layers=placement.num_layers,
            num_linked=num_linked,
            arrival_s=link_s / num_linked if num_linked else 0.0,
            layer_s=sides.layer_s,
            outside_s=outside_s,
            slots=placement.slots,
        )
        linked_s = queue.linked_s + num_linked * min(queue.arrival_s, queue.layer_s) * self._stall(placement.slots)
        pass_s = outside_s + max(queue.computed_s, linked_s)
        bound: Bound = "link" if linked_s > compute_s else "draft" if sides.draft_s > compute_s else "compute"
        return Prediction(
            pass_s=pass_s,
            link_s=link_s,
            compute_s=compute_s,
            draft_s=sides.draft_s,
            tokens_per_step=sides.tokens,
            tree_nodes=nodes,
            tok_per_s=sides.tokens / pass_s,
            bound=bound,
            basis=self._basis(placement, nodes),
        )

    def _link(self, placement: Placement) -> tuple[float, int]:
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

    def _sides(self, nodes: int, tree_budget: int) -> "_Sides":
        """What does not depend on the placement."""
        key = nodes, tree_budget
        if key not in self._timed:
            tokens = self._acceptance.tokens_per_step(nodes)
            self._timed[key] = _Sides(
                layer_s=self._target.layer_s(1 + nodes),
                head_s=self._target.head_s(tokens),
                draft_s=self._draft_s(nodes, tree_budget, tokens),
                tokens=tokens,
            )
        return self._timed[key]

    def _draft_s(self, nodes: int, tree_budget: int, tokens: float) -> float:
        """Batches of the draft: one that reads the last step's tokens, then as many as the tree has nodes to expand."""
        if self._draft is None or nodes == 0:
            return 0.0
        num_batches = draft_batches(nodes, draft_width(tree_budget))
        rows = max(round(_READ_PER_NODE * nodes / num_batches), 1)
        beside_s = _CPU_BATCH_S if self._on_cpu else 0.0
        return self._draft.pass_s(math.ceil(tokens)) + num_batches * (self._draft.pass_s(rows) + beside_s)

    def _basis(self, placement: Placement, nodes: int) -> Basis:
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
        layer_s: computing one.
        outside_s: of a step without its pass; slots fill meanwhile.
        slots: that there are.
    """

    num_layers: int
    num_linked: int
    arrival_s: float
    layer_s: float
    outside_s: float
    slots: int

    @property
    def computed_s(self) -> float:
        """When everything is computed, if only the first layer was waited for.

        Resident layers stand before streamed ones, so some are computed before the first of those is needed.
        """
        if not self.num_linked:
            return self.num_layers * self.layer_s
        front_s = self.layer_s * max(self.num_layers / self.num_linked - 1, 0.0)
        waiting_s = max(self.arrival_s - min(self.outside_s, self.arrival_s) - front_s, 0.0)
        return self.num_layers * self.layer_s + waiting_s

    @property
    def linked_s(self) -> float:
        """When the last layer has come and been computed, if the link never rested."""
        if not self.num_linked:
            return 0.0
        ahead_s = min(self.outside_s, min(self.slots, self.num_linked) * self.arrival_s)
        return self.num_linked * self.arrival_s - ahead_s + self.layer_s


@dataclass(frozen=True)
class _Sides:
    """Of a tree of some size: a layer of the target, scoring, drafting, tokens."""

    layer_s: float
    head_s: float
    draft_s: float
    tokens: float


def draft_batches(nodes: int, width: int) -> float:
    """Passes of the draft for a tree: one for each of its levels, or more where a level has more nodes than a pass.

    Args:
        nodes: of the tree.
        width: the most that a pass expands.
    """
    depth = min(_DEPTH_GAIN * math.log1p(nodes / _DEPTH_KNEE), float(nodes))
    return max(depth, _READ_PER_NODE * nodes / width)


def _sizes(most: int) -> list[int]:
    """Powers of two up to `most`, and itself."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


class _Compute:
    """How long a model's layers and head take for so many rows."""

    def __init__(self, spec: ModelSpec, dtype: Dtype, rates: Rates, *, on_cpu: bool) -> None:
        self._spec = spec
        self._rates = rates
        self._dtype: Dtype = dtype
        self._on_cpu = on_cpu
        self._weight_s: dict[float, float] = {}

    def pass_s(self, rows: int) -> float:
        """All layers, resident, and the scores of every row: a batch of a draft."""
        spec = self._spec
        scoring = _SCORE_SWEEPS * rows * spec.vocab_size * 4 / self._rates.memory.per_s
        return spec.num_layers * self.layer_s(rows) + self._head_weights * self.weight_s(rows) + scoring

    def head_s(self, tokens: float) -> float:
        """Scores of the nodes that a walk visits, in blocks."""
        blocks = max(tokens / _VISITS_PER_BLOCK, 1.0)
        sweeps = _SCORE_SWEEPS * tokens * self._spec.vocab_size * 4 / self._rates.memory.per_s
        return self._rates.layer_s * blocks + blocks * self._head_weights * self.weight_s(HEAD_BLOCK_ROWS) + sweeps

    def layer_s(self, rows: int) -> float:
        """One layer on average, its weights being there."""
        hit, rows_each = self._experts_hit(rows)
        shared = self._shared_weights + self._attention_weights
        weights_s = shared * self.weight_s(rows) + hit * self._expert_weights * self.weight_s(rows_each)
        products_s = weights_s * (_BESIDE_PRODUCTS if self._on_cpu else 1.0)
        return self._rates.layer_s + products_s + self._dequantizing_s(hit)

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
