"""Records of a model: where its files are, and the sizes of its parts."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

Dtype = Literal["bf16", "fp16", "fp32"]


# Where a layer's bytes are between passes: device memory, host memory (pinned or page cache), or disk.
Tier = Literal["device", "ram", "disk"]


# Quantization formats that specchat converts full-precision weights to. Pre-quantized checkpoints have names of their
# own ("gptq int4").
Quant = Literal["none", "int8", "int4", "int3"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
# Formats below full precision, highest quality first.
LOWER_QUANTS: tuple[Quant, ...] = tuple(quant for quant in QUANTS if quant != "none")
# Those that plans may choose by themselves. int3 changes a text too much for that.
AUTO_QUANTS: tuple[Quant, ...] = ("int8", "int4")


DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


def own_quant(name: str) -> Quant:
    """Return the quantization that specchat applies for a plan's quant `name`; "none" for pre-quantized models."""
    return next((quant for quant in QUANTS if quant == name), "none")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: model name as the user typed it.
        path: local folder with config.json and safetensors files.
        revision: hub commit; None for local folders.
        label: note that every output must show for models that are not real (the demo, shapes); "" for real models.
        part: part of the files that is meant: "mtp" for the layer that guesses further tokens; "self" for the layers
            as a low-bit copy beside the model itself; "" for the model. "eagle3", "dflash" and "assistant" for
            files that are such a head.
        headers_only: whether files of weights hold their headers and zeros only, and there is no tokenizer.
    """

    name: str
    path: Path
    revision: str | None = None
    label: str = ""
    part: Literal["", "mtp", "self", "eagle3", "dflash", "assistant"] = ""
    headers_only: bool = False

    @property
    def is_toy(self) -> bool:
        """Whether the model only exists to exercise the software."""
        return bool(self.label)

    @property
    def is_head(self) -> bool:
        """Whether a head is meant, which reads the states of its target."""
        return self.part in HEAD_SUFFIXES

    @property
    def is_copy(self) -> bool:
        """Whether a low-bit copy of the model is meant, which drafts for the model itself."""
        return self.part == "self"


# Bytes of a number in the states, decays and strengths of recurrent layers, which are float32 in every compute dtype.
STATE_ITEM_BYTES = 4


@dataclass(frozen=True)
class StateShape:
    """Shape of the running state of one recurrent layer, and of the rows that the layer stashes for draft nodes.

    Attributes:
        channels: number of channels of the short convolution.
        taps: number of rows that the convolution sees, the current row included.
        key_heads: number of heads of keys; each serves `heads // key_heads` heads of values.
        heads: number of states, one per head of values; 0 for layers with a convolution only.
        key_dim: rows of a state.
        value_dim: columns of a state.
        decays: number of decays per head: 1, or `key_dim` for layers that decay every channel separately.
        rates: number of constant rates per head that multiply its one decay: 0, or `key_dim` for Mamba 1, whose heads
            have values of one number.
    """

    channels: int
    taps: int
    key_heads: int = 0
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    decays: int = 1
    rates: int = 0

    def state_bytes(self, item_bytes: int) -> int:
        """Return the bytes of one state: the matrices, and the last inputs of the convolution."""
        matrices = self.heads * self.key_dim * self.value_dim * STATE_ITEM_BYTES
        return matrices + (self.taps - 1) * self.channels * item_bytes

    def rate_bytes(self) -> int:
        """Return the bytes of the constant rates of decay, which paths are folded with."""
        return self.heads * self.rates * STATE_ITEM_BYTES

    def stash_bytes(self, item_bytes: int) -> int:
        """Return the bytes that one draft node stashes: the inputs of the convolution and of the recurrence."""
        given = self.channels + self.key_heads * self.key_dim + self.heads * self.value_dim
        floats = 1 if self.rates else self.decays + 1  # time steps, or decays and strengths
        return given * item_bytes + self.heads * floats * STATE_ITEM_BYTES

    def update_bytes(self) -> int:
        """Return the bytes of one draft node while its tree is computed: keys, updates, sums of decays; or a state."""
        if self.rates:
            return self.heads * self.key_dim * STATE_ITEM_BYTES
        numbers = self.key_heads * self.key_dim + self.heads * self.value_dim
        return numbers * STATE_ITEM_BYTES + self.heads * self.decays * 2 * STATE_ITEM_BYTES  # sums are float64


@dataclass(frozen=True)
class KvShape:
    """What one layer caches: `heads` keys of size `key_dim` and values of size `value_dim` per token, and a state.

    A layer that caches no rows has 0 heads. Only recurrent layers have a state.
    """

    heads: int
    key_dim: int
    value_dim: int
    state: StateShape | None = None

    @property
    def numbers_per_row(self) -> int:
        """Number of elements stored for one token, not bytes."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ParamSize:
    """Size of one parameter: `count` values of `item_bytes` each; None for values in the compute dtype."""

    count: int
    item_bytes: int | None = None

    def nbytes(self, dtype: Dtype) -> int:
        """Return the parameter's bytes in a model that computes in `dtype`."""
        return self.count * (DTYPE_BYTES[dtype] if self.item_bytes is None else self.item_bytes)


@dataclass(frozen=True)
class RowCost:
    """Bytes live at one point of a pass: `fixed + per_row rows + per_key keys + per_row_key rows keys`."""

    fixed: float = 0.0
    per_row: float = 0.0
    per_key: float = 0.0
    per_row_key: float = 0.0

    def at(self, rows: int, keys: int = 0) -> int:
        """Return the bytes for a number of rows and keys, rounded up."""
        return math.ceil(self.fixed + self.per_row * rows + self.per_key * keys + self.per_row_key * rows * keys)


@dataclass(frozen=True)
class Activations:
    """Memory of a pass besides weights, caches and masks; the maximum of each tuple counts.

    Attributes:
        outside: costs before the first and after the last layer.
        entry: costs outside a layer while that layer runs, including its input.
        layer: costs inside a layer, including its output.
        head: costs of scoring hidden states, including float32 scores; they depend on rows only.
        num_masks: number of masks that live at the same time (full, sliding window ...).
    """

    outside: tuple[RowCost, ...]
    entry: tuple[RowCost, ...]
    layer: tuple[RowCost, ...]
    head: tuple[RowCost, ...]
    num_masks: int


@dataclass(frozen=True)
class RoutedExperts:
    """Routed experts that can be read one by one.

    Attributes:
        layers: indices of the layers that have such experts.
        num_experts: experts of each of these layers, N.
        per_row: experts that one row uses, k.
        params: parameters of one expert, in the order of a slot.
        has_kernel: whether a GPU's kernel for many experts reads all their matrices.
    """

    layers: tuple[int, ...]
    num_experts: int
    per_row: int
    params: tuple[ParamSize, ...]
    has_kernel: bool = True

    def beside(self, layer_params: tuple[ParamSize, ...]) -> tuple[ParamSize, ...]:
        """Return the parameters of a layer besides its experts, which are stacked or apart."""
        stored, in_experts = Counter(layer_params), Counter[ParamSize]()
        for each in self.params:
            stack = replace(each, count=self.num_experts * each.count)
            in_experts.update([stack] if stored[stack] else [each] * self.num_experts)
        beside = []
        for each in layer_params:
            if in_experts[each]:
                in_experts[each] -= 1
            else:
                beside.append(each)
        return tuple(beside)

    def is_held(self, param: ParamSize, dtype: Dtype) -> bool:
        """Return whether a parameter of an expert is so small that it stays in memory for all experts."""
        total = sum(each.nbytes(dtype) for each in self.params)
        return param.item_bytes is None and is_held_piece(param.nbytes(dtype), total)


def is_held_piece(nbytes: int, expert_bytes: int) -> bool:
    """Return whether a piece of an expert, such as its biases, is too small for a read of its own."""
    return 64 * nbytes < expert_bytes


# End of the architecture's name of a head, by the part of a source, and of a model's low-bit copy.
HEAD_SUFFIXES = {"mtp": " MTP", "eagle3": " EAGLE-3", "dflash": " DFlash", "assistant": " assistant"}
COPY_SUFFIX = " copy"


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a model, from its config.json and file headers alone.

    Attributes:
        name: model name as the user typed it, for messages.
        architecture: class name in transformers; with one of `HEAD_SUFFIXES` for a head of such a model, with
            `COPY_SUFFIX` for its low-bit copy.
        vocab_size, hidden_size, num_layers: V, hidden width, L.
        mlp_size: width of the MLP's inner activation for one row, all active experts together.
        num_heads: number of query heads, H.
        max_positions: longest context that the position encoding supports without changing its scaling.
        dtype: dtype of the weights, as the checkpoint declares.
        num_params: number of weights of the whole model in any format, tied weights counted once.
        num_layer_params: number of weights that the decoder layers compute with; those of a block that layers share
            count once for each of these layers.
        layer_params: parameters of each decoder layer, in module order.
        other_params: parameters outside the layers (embeddings, head, final norm), tied parameters counted once.
        buffer_bytes: bytes of persistent buffers, which always stay in device memory.
        kv_shapes: KV cache shape of each layer.
        quant: format of the matrices: "none", a format of specchat ("int8"), or a pre-quantized one ("gptq int4").
        quant_shapes: (rows, cols) of the quantized matrices, without duplicates.
        narrowed_bytes: bytes that buffers save in a 16-bit model.
        activations: memory of a pass by element size in bytes; sizes without a profile are absent.
        lookup_params: number of weights among other_params that are only looked up by token: untied input embeddings.
        lookup_item_bytes: bytes of each of these weights; None for the dtype of passes. Packed ones count as bytes.
        text_only: whether this is the text half of a multimodal model.
        shared_params: parameters of blocks that several layers share, which always stay in device memory.
        experts: experts that can be read one by one; None without any.
        layer_quant: number of weights of each layer in quantized matrices; empty without any.
        target_size: width of the target's states that a head reads, if it is not the head's own; else 0.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    mlp_size: int
    num_heads: int
    max_positions: int
    dtype: Dtype
    num_params: int
    num_layer_params: int
    layer_params: tuple[tuple[ParamSize, ...], ...]
    other_params: tuple[ParamSize, ...]
    buffer_bytes: int
    kv_shapes: tuple[KvShape, ...]
    quant: str = "none"
    quant_shapes: tuple[tuple[int, int], ...] = ()
    narrowed_bytes: int = 0
    activations: Mapping[int, Activations] = field(default_factory=dict)
    lookup_params: int = 0
    lookup_item_bytes: int | None = None
    text_only: bool = False
    shared_params: tuple[ParamSize, ...] = ()
    experts: RoutedExperts | None = None
    layer_quant: tuple[int, ...] = ()
    target_size: int = 0

    def __hash__(self) -> int:  # hashing every field would cost more than the cached results save
        return hash((self.name, self.quant, self.num_params))

    @property
    def is_head(self) -> bool:
        """Whether this is a head, which reads the target's states."""
        return self.architecture.endswith(tuple(HEAD_SUFFIXES.values()))

    @property
    def tapped_width(self) -> int:
        """Numbers of each row that a head keeps of the states between the target's layers; 0 if it reads none."""
        reads_none = self.is_assistant or self.architecture.endswith(HEAD_SUFFIXES["mtp"])
        return self.hidden_size if self.is_head and not reads_none else 0

    @property
    def is_block(self) -> bool:
        """Whether this is a head that guesses all levels of a tree in one pass."""
        return self.architecture.endswith(HEAD_SUFFIXES["dflash"])

    @property
    def is_assistant(self) -> bool:
        """Whether this is a head that attends to the target's keys and values, and caches nothing."""
        return self.architecture.endswith(HEAD_SUFFIXES["assistant"])

    @property
    def is_copy(self) -> bool:
        """Whether this is a low-bit copy of the target, which shares all but the layers that the target streams."""
        return self.architecture.endswith(COPY_SUFFIX)

    @cached_property
    def kv_numbers_per_row(self) -> int:
        """Number of KV cache elements that all layers together store for one token."""
        return sum(shape.numbers_per_row for shape in self.kv_shapes)
