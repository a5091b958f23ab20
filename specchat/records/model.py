"""What a model is: where its files are and how large its parts are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

Dtype = Literal["bf16", "fp16", "fp32"]


# Where a layer's bytes are between passes: with the device, in host memory (pinned, or the page cache), on the disk.
Tier = Literal["device", "ram", "disk"]


# What specchat makes of full-precision weights. Checkpoints that come quantized have names of their own ("gptq int4").
Quant = Literal["none", "int8", "int4"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
# What full precision may be lowered to, the better one first.
LOWER_QUANTS: tuple[Quant, ...] = tuple(quant for quant in QUANTS if quant != "none")


DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


def own_quant(name: str) -> Quant:
    """Return what specchat makes of a model that a plan has as `name`; models that come quantized stay as they are."""
    return next((quant for quant in QUANTS if quant == name), "none")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        name: what the user typed.
        path: a local folder with config.json and safetensors files.
        revision: the hub commit, or None for local folders.
        label: what every output must say of a model that is not what its size or name suggests (the demo, shapes).
    """

    name: str
    path: Path
    revision: str | None = None
    label: str = ""

    @property
    def is_toy(self) -> bool:
        """Whether the model exists to exercise the software."""
        return bool(self.label)


@dataclass(frozen=True)
class KvShape:
    """What one layer stores per token: `heads` keys of `key_dim` and values of `value_dim` numbers."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers_per_row(self) -> int:
        """Numbers, not bytes, stored for one token."""
        return self.heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ParamSize:
    """How large one parameter is: `count` numbers of `item_bytes` each, None where those are of the compute dtype."""

    count: int
    item_bytes: int | None = None

    def nbytes(self, dtype: Dtype) -> int:
        """Its bytes in a model that computes in `dtype`."""
        return self.count * (DTYPE_BYTES[dtype] if self.item_bytes is None else self.item_bytes)


@dataclass(frozen=True)
class RowCost:
    """Bytes that a moment of a pass holds: `fixed + per_row rows + per_key keys + per_row_key rows keys`."""

    fixed: float = 0.0
    per_row: float = 0.0
    per_key: float = 0.0
    per_row_key: float = 0.0

    def at(self, rows: int, keys: int = 0) -> int:
        """Bytes for so many rows and keys."""
        return math.ceil(self.fixed + self.per_row * rows + self.per_key * keys + self.per_row_key * rows * keys)


@dataclass(frozen=True)
class Activations:
    """What a pass holds besides weights, caches and masks; the most of each tuple counts.

    Attributes:
        outside: before the first and after the last layer.
        entry: outside of a layer while it runs, its input included.
        layer: inside of a layer, its output included.
        head: scoring hidden states, scores in float32 included; by rows alone.
        num_masks: masks that live at the same time (full, sliding window ...).
    """

    outside: tuple[RowCost, ...]
    entry: tuple[RowCost, ...]
    layer: tuple[RowCost, ...]
    head: tuple[RowCost, ...]
    num_masks: int


@dataclass(frozen=True)
class ModelSpec:
    """What a model's config.json and headers alone say about its size.

    Attributes:
        name: what the user typed, for messages.
        architecture: transformers' class name.
        vocab_size, hidden_size, num_layers: V, hidden width, L.
        mlp_size: width of the MLP's inner activation for one row, all active experts together.
        num_heads: query heads, H.
        max_positions: the longest context that the position encoding serves without switching its scaling.
        dtype: what the checkpoint says its weights are.
        num_params: weights of the whole model, tied ones once, whatever they are stored in.
        num_layer_params: those of the decoder layers.
        layer_params: for each decoder layer, its parameters in module order.
        other_params: the parameters outside the layers (embeddings, head, final norm), tied ones once.
        buffer_bytes: persistent buffers, which always stay in device memory.
        kv_shapes: one per layer.
        quant: how its matrices are stored: "none", what we make ("int8"), or what it came as ("gptq int4").
        quant_shapes: (rows, cols) of the quantized matrices, each once.
        narrowed_bytes: what buffers take less in a model of 16 bits.
        activations: by the bytes of a number; without those that could not be found out.
        lookup_params: numbers among other_params that are only looked up, by token: embeddings that no head shares.
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

    def __hash__(self) -> int:  # of all the fields it would take longer than what is worth remembering by it
        return hash((self.name, self.quant, self.num_params))

    @cached_property
    def kv_numbers_per_row(self) -> int:
        """Numbers that all layers together store for one token."""
        return sum(shape.numbers_per_row for shape in self.kv_shapes)
