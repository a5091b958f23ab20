"""Memory of one pass: hidden rows, masks, activations, and the scores of some rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from specchat.records.limits import padded_rows
from specchat.records.model import DTYPE_BYTES, Activations, Dtype, ModelSpec, RowCost
from specchat.records.plan import Workload

INDEX_BYTES = 8  # token ids and positions are int64
FLOAT_BYTES = 4  # scores are float32 in every compute dtype


@dataclass(frozen=True)
class PassBytes:
    """Peak bytes of one pass: `hidden` outlives the pass, `masks` last for the pass, `rest` is the peak of all else."""

    hidden: int
    masks: int
    rest: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.hidden + self.masks + self.rest


def memory_of_pass(spec: ModelSpec, work: Workload, rows: int, keys: int, tapped_width: int = 0) -> PassBytes:
    """Return the bytes of a pass over `rows` new rows, with `keys` keys in a seat at its end; taps keep their width."""
    element, costs = DTYPE_BYTES[work.dtype], _activations(spec, work.dtype)
    chunk, keys = min(rows, work.chunk_rows), padded_rows(keys)
    every_key = work.seats * keys  # models with latent attention expand the keys of all seats
    hidden = rows * spec.hidden_size * element
    masks = costs.num_masks * chunk * keys * element
    indices = 2 * INDEX_BYTES * rows
    in_layer = _max_bytes(costs.entry, rows, keys, every_key) + _max_bytes(costs.layer, chunk, keys, every_key)
    if rows > chunk:
        in_layer += hidden  # the layer's output collects all chunks
    outside = _max_bytes(costs.outside, rows, keys, every_key)
    tapped = rows * tapped_width * element
    return PassBytes(hidden + tapped, masks, max(max(in_layer, outside) + indices - hidden, 0))


def head_bytes(spec: ModelSpec, work: Workload, rows: int) -> int:
    """Return the bytes of float32 scores of `rows` rows, and of the workspace to compute them."""
    hidden = rows * spec.hidden_size * DTYPE_BYTES[work.dtype]
    return hidden + _max_bytes(_activations(spec, work.dtype).head, rows, 0, 0)


def _max_bytes(costs: Iterable[RowCost], rows: int, keys: int, every_key: int) -> int:
    """Return the largest cost of rows that see the keys of one seat; costs per key alone apply to all seats' keys."""
    return max(cost.at(rows, keys) + math.ceil(cost.per_key * (every_key - keys)) for cost in costs)


def _activations(spec: ModelSpec, dtype: Dtype) -> Activations:
    """Return the profiled activation sizes, or a cautious estimate for a model without a profile."""
    return spec.activations.get(DTYPE_BYTES[dtype]) or _estimated_activations(spec, DTYPE_BYTES[dtype])


def _estimated_activations(spec: ModelSpec, element: int) -> Activations:
    """Estimate activation sizes: attention that keeps all scores, and no operation in place."""
    attention = spec.num_heads * max((shape.key_dim for shape in spec.kv_shapes), default=0)
    rows = 4 * spec.hidden_size + 6 * attention + 4 * spec.mlp_size
    scores = spec.num_heads * (2 * element + FLOAT_BYTES)
    head = spec.vocab_size * (3 * element + FLOAT_BYTES)
    norm = 3 * spec.hidden_size * FLOAT_BYTES
    return Activations(
        outside=(RowCost(per_row=3 * spec.hidden_size * element + norm),),
        entry=(RowCost(per_row=2 * spec.hidden_size * element + norm),),
        layer=(RowCost(per_row=rows * element, per_row_key=scores),),
        head=(RowCost(per_row=head),),
        num_masks=2,
    )
