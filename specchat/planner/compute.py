"""Predict the compute time of layers and head by number of rows, from measured rates of matmuls."""

import math
from functools import cached_property, lru_cache

from specchat.hardware.machine import MatmulRate
from specchat.models.sizes.geometry import is_4bit_float
from specchat.planner.experts import used_share
from specchat.planner.rates import Rates
from specchat.records.limits import CUDA_HEAD_BLOCK_ROWS, HEAD_BLOCK_ROWS
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec, own_quant

# Keys that attention is priced for: a short chat. Longer chats are slower than predicted.
_KEYS = 512
# Reads and writes of a row of float32 scores to turn the row into children of a node: scaling, softmax, top-k.
_SCORE_SWEEPS = 10
# Layers whose non-attention weights are at most this multiple of the active MLP width count as dense, without experts.
# The margin covers norms, biases and gates.
_DENSE_SHARE = 1.5
# Visited nodes per computed block of the head, counted on the demo pair with blocks of 8 rows, and of a GPU's 32.
_VISITS_PER_BLOCK, _CUDA_VISITS_PER_BLOCK = 2.5, 3.75
# Fixed seconds of a layer in a pass that a GPU repeats from a graph: 41 to 57 kernels of 1.5 us. Not measured.
_GRAPH_LAYER_S = 75e-6
# Time of a whole pass on a CPU, relative to its matmuls at the probe's rates. The rest is norms, activations and small
# operations of attention. Measured with tests/benchmarks/predicted.py.
_MATMUL_OVERHEAD = 1.12
_COPY_ROWS = 32  # with more rows, copies of 4-bit codes are not used
# A GPU's kernels that scale codes while they multiply: most rows, the rows that they compute at a time, and the time of
# their arithmetic relative to that of large matmuls. The last is not measured.
_FUSED_ROWS, _FUSED_TILE, _FUSED_ARITHMETIC = 64, 16, 2.0


@lru_cache(maxsize=512)
def compute_times(spec: ModelSpec, dtype: Dtype, rates: Rates, *, on_cpu: bool) -> "ComputeTimes":
    """Return the compute times of a model; cached, because one draft serves many targets."""
    return ComputeTimes(spec, dtype, rates, on_cpu=on_cpu)


class ComputeTimes:
    """Compute times of a model's layers and head by number of rows."""

    def __init__(self, spec: ModelSpec, dtype: Dtype, rates: Rates, *, on_cpu: bool) -> None:
        self._spec = spec
        self._stored = _matmul_times(dtype, rates, rates.matmul, on_cpu=on_cpu)
        self._packed = _matmul_times(dtype, rates, rates.packed or rates.matmul, on_cpu=on_cpu)
        self._rates = rates
        self._on_cpu = on_cpu
        self._pass_s: dict[tuple[int, bool], float] = {}
        self._layer_s: dict[tuple[int, bool, bool], float] = {}

    def pass_s(self, rows: int, *, by_graph: bool = False) -> float:
        """Return the seconds of a draft batch: all layers, resident, and the scores of every row.

        Args:
            rows: rows of the batch.
            by_graph: whether the host starts the pass with one launch.
        """
        if (rows, by_graph) not in self._pass_s:
            saved_s = max(self._rates.layer_s - _GRAPH_LAYER_S, 0.0) if by_graph else 0.0
            layers_s = self._spec.num_layers * (self.layer_s(rows, resident=True) - saved_s)
            self._pass_s[rows, by_graph] = layers_s + self.scoring_s(rows)
        return self._pass_s[rows, by_graph]

    def scoring_s(self, rows: int) -> float:
        """Return the seconds to score every row, and to turn the scores into children of nodes."""
        scoring = _SCORE_SWEEPS * rows * self._spec.vocab_size * 4 / self._rates.memory.per_s
        return self._head_weights * self._head_weight_s(rows) + scoring

    def head_s(self, tokens: float) -> float:
        """Return the seconds to score, in blocks, the nodes that a walk visits."""
        visits, rows = (
            (_VISITS_PER_BLOCK, HEAD_BLOCK_ROWS) if self._on_cpu else (_CUDA_VISITS_PER_BLOCK, CUDA_HEAD_BLOCK_ROWS)
        )
        blocks = max(tokens / visits, 1.0)
        sweeps = _SCORE_SWEEPS * tokens * self._spec.vocab_size * 4 / self._rates.memory.per_s
        return self._rates.layer_s * blocks + blocks * self._head_weights * self._head_weight_s(rows) + sweeps

    def _head_weight_s(self, rows: int) -> float:
        """Return the seconds per weight of the head; one in int8 is dequantized on a GPU, if that is not fused."""
        weight_s = self._stored.weight_s(rows)
        if self._on_cpu or own_quant(self._spec.quant) == "none":
            return weight_s
        return min(weight_s + self._rates.dequantize_s["int8"], self._fused_s("int8", rows))

    def layer_s(self, rows: int, *, resident: bool, expanded: bool = False) -> float:
        """Return the mean seconds of one layer whose weights are on the device.

        Args:
            rows: rows of the pass.
            resident: whether the layer stays on the device, so that a CPU packs its matrices.
            expanded: whether quantized matrices take more memory to be faster, as in `Placement.expanded`.
        """
        if (rows, resident, expanded) not in self._layer_s:
            used, rows_each = self._used_experts(rows)
            is_packed = resident and (expanded or self._spec.quant == "none")
            weight_s = (self._packed if is_packed else self._stored).weight_s
            shared = self._shared_weights + self._attention_weights
            weights_s = shared * weight_s(rows) + used * self._expert_weights * weight_s(rows_each)
            matmul_s = weights_s * (_MATMUL_OVERHEAD if self._on_cpu else 1.0)
            plain_s = matmul_s + (0.0 if expanded and not self._has_copies else self._dequantizing_s(used))
            if expanded and self._has_copies and rows_each <= _COPY_ROWS:
                fixed_s, row_s = self._rates.copy_s
                plain_s = min(plain_s, (shared + used * self._expert_weights) * (fixed_s + row_s * rows_each))
            if not self._expert_weights:
                fused_s = self._shared_weights * self._fused_s(self._spec.quant, rows)
                plain_s = min(plain_s, self._attention_weights * weight_s(rows) + fused_s)
            self._layer_s[rows, resident, expanded] = self._rates.layer_s + plain_s
        return self._layer_s[rows, resident, expanded]

    def _fused_s(self, quant: str, rows: int) -> float:
        """Return the seconds per weight of a product with codes; infinite without a kernel for it."""
        stored_s = self._rates.fused_s.get(quant, math.inf)
        tiled = -(-rows // _FUSED_TILE) * _FUSED_TILE
        return max(stored_s, _FUSED_ARITHMETIC * self._stored.arithmetic_s(tiled)) if rows <= _FUSED_ROWS else math.inf

    def experts_s(self, rows: int) -> float:
        """Return the mean seconds of the experts of one layer, a part of `layer_s`."""
        used, rows_each = self._used_experts(rows)
        weights = used * self._expert_weights
        matmul_s = weights * self._stored.weight_s(rows_each) * (_MATMUL_OVERHEAD if self._on_cpu else 1.0)
        return matmul_s + self._weight_dequantize_s * weights

    def _dequantizing_s(self, used: float) -> float:
        """Return the seconds to dequantize each used matrix once a pass, for a share `used` of the experts."""
        return self._weight_dequantize_s * (self._shared_weights + used * self._expert_weights)

    @cached_property
    def _weight_dequantize_s(self) -> float:
        """Seconds to dequantize one weight; 0 for plain matrices."""
        quant = self._spec.quant
        if quant == "none":
            return 0.0
        known = self._rates.dequantize_s
        return known[quant] if quant in known else known["int4" if "4" in quant else "int8"]

    @property
    def _has_copies(self) -> bool:
        """Whether expanded layers keep copies of 4-bit codes, instead of dequantized matrices."""
        has_kernel = self._on_cpu and self._rates.has_row_kernel and self._stored.dtype == "bf16"
        return has_kernel and is_4bit_float(self._spec.quant)

    def _used_experts(self, rows: int) -> tuple[float, float]:
        """Return the share of experts in use, and the mean rows per expert in use."""
        active = self._active_share
        used = used_share(active, rows)
        return used, max(rows * active / used, 1.0)

    @cached_property
    def _layer_weights(self) -> float:
        """Mean number of weights in a layer."""
        return self._spec.num_layer_params / max(self._spec.num_layers, 1)

    @cached_property
    def _mlp_weights(self) -> float:
        """Number of MLP weights that one row uses: three matrices of the active width."""
        return min(3.0 * self._spec.hidden_size * self._spec.mlp_size, self._layer_weights)

    @cached_property
    def _active_share(self) -> float:
        """Share of the experts' weights that one row uses; 1 for models without experts."""
        attention = (
            self._spec.hidden_size
            * sum(2 * self._spec.num_heads * shape.key_dim + shape.numbers_per_row for shape in self._spec.kv_shapes)
            / max(len(self._spec.kv_shapes), 1)
        )
        experts = self._layer_weights - min(attention, self._layer_weights)
        return 1.0 if experts <= _DENSE_SHARE * self._mlp_weights else self._mlp_weights / experts

    @cached_property
    def _expert_weights(self) -> float:
        return 0.0 if self._active_share == 1.0 else self._mlp_weights / self._active_share

    @cached_property
    def _shared_weights(self) -> float:
        return self._layer_weights - self._expert_weights

    @cached_property
    def _attention_weights(self) -> float:
        """Attention to the keys of a short chat, expressed as a number of weights of an average layer."""
        shapes = self._spec.kv_shapes
        dims = max((shape.key_dim + shape.value_dim for shape in shapes), default=0)
        recurrent = sum(shape.state is not None and not shape.heads for shape in shapes)
        return float(self._spec.num_heads * dims * _KEYS) * (1 - recurrent / max(len(shapes), 1))

    @cached_property
    def _head_weights(self) -> float:
        return float(self._spec.vocab_size * self._spec.hidden_size)


@lru_cache(maxsize=32)
def _matmul_times(dtype: Dtype, rates: Rates, matmul: tuple[MatmulRate, ...], *, on_cpu: bool) -> "_MatmulTimes":
    return _MatmulTimes(dtype, rates.matmul_dtype, matmul, on_cpu=on_cpu)


class _MatmulTimes:
    """Matmul times for matrices of a dtype, from rates in `measured_dtype`."""

    def __init__(self, dtype: Dtype, measured_dtype: Dtype, rates: tuple[MatmulRate, ...], *, on_cpu: bool) -> None:
        self.dtype: Dtype = dtype
        self._measured_dtype: Dtype = measured_dtype
        self._rates = rates
        self._on_cpu = on_cpu
        self._weight_s: dict[float, float] = {}

    def weight_s(self, rows: float) -> float:
        """Return the seconds per weight of a matmul with `rows` rows."""
        if rows not in self._weight_s:  # a search needs the same value a hundred times
            self._weight_s[rows] = self._interpolated(rows) * self._dtype_factor(rows)
        return self._weight_s[rows]

    def arithmetic_s(self, rows: int) -> float:
        """Return the seconds per weight of the arithmetic alone, at the rate of the largest matmul."""
        return 2 * rows / self._rates[-1].flop_per_s

    def _interpolated(self, rows: float) -> float:
        rates = self._rates
        above = next((i for i, rate in enumerate(rates) if rate.rows >= rows), len(rates))
        if above == 0 or len(rates) == 1:
            return 2 * rates[0].rows / rates[0].flop_per_s
        if above == len(rates):
            return 2 * rows / rates[-1].flop_per_s
        (x0, y0), (x1, y1) = ((r.rows, 2 * r.rows / r.flop_per_s) for r in rates[above - 1 : above + 1])
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    def _dtype_factor(self, rows: float) -> float:
        """Return the cost ratio of the dtype to the measured dtype: by bytes for few rows, by arithmetic for many."""
        wide = DTYPE_BYTES[self.dtype] / DTYPE_BYTES[self._measured_dtype]
        if wide == 1 or (wide < 1 and self._on_cpu):  # a CPU measured in float32 has no faster 16-bit arithmetic
            return 1.0
        many = min(math.log2(max(rows, 1.0)) / 6, 1.0)
        return float(wide ** (1 + many))
