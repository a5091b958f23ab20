"""The records that floors hand to each other: plain data, no torch, printable. And where we keep what can be remade."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

Dtype = Literal["bf16", "fp16", "fp32"]
# Where a layer's bytes are between passes: with the device, in host memory (pinned, or the page cache), on the disk.
Tier = Literal["device", "ram", "disk"]
# What specchat makes of full-precision weights. Checkpoints that come quantized have names of their own ("gptq int4").
Quant = Literal["none", "int8", "int4"]
# What an engine is at; "prefill" is a pass that reads more than one committed token.
Phase = Literal["idle", "drafting", "prefill", "verifying"]
FinishReason = Literal["stop", "length", "context", "interrupt"]
# The parts of what a model writes: the answer, and the thinking before it.
Part = Literal["answer", "reasoning"]
# What becomes of a chat that fills its context: refuse the next message, or leave out the oldest turns.
Overflow = Literal["stop", "drop-oldest"]

DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

# Items of the ledger that are weights, resident or on their way.
WEIGHT_ITEMS = frozenset({"resident layers", "slots", "embeddings and head", "head", "draft"})

# Workspaces of the engine that the ledger counts. Visited nodes are few; scoring a node's likeliest descendants along
# with it costs the head's weights only once.
HEAD_BLOCK_ROWS = 8
# Rows of noise that are kept; drafter and walk look at the same few positions ahead.
NOISE_ROWS = 64
# Threads that read layers from files that are not laid out for it: each copies what it has read to its place. Packs are
# read into their places, by `hardware.disk.READ_THREADS`. A third one gains a tenth here, and takes a window more.
NUM_READERS = 2
# What each of them reads at a time of a file that is not laid out for it, into memory of its own.
READ_WINDOW_BYTES = 8 * 2**20


def draft_width(tree_budget: int) -> int:
    """Nodes that one pass of the draft expands: an early guess at which nodes stay wastes rows and passes.

    Measured on the demo pair, budget 64, t=0.7: 32 4.77, 16 5.11, 8 5.16 tokens per step.
    """
    return max(8, tree_budget // 8)


def cache_folder() -> Path:
    """Where packs and measured rates lie; SPECCHAT_CACHE_DIR overrides the platform's folder. It need not exist yet."""
    import platformdirs

    cache = os.environ.get("SPECCHAT_CACHE_DIR") or platformdirs.user_cache_dir("specchat", appauthor=False)
    return Path(cache).expanduser()


def state_folder() -> Path:
    """Where chats, typed lines and statistics are kept: SPECCHAT_STATE_DIR, or the platform's folder for them."""
    import platformdirs

    chosen = os.environ.get("SPECCHAT_STATE_DIR") or platformdirs.user_state_dir("specchat", appauthor=False)
    return Path(chosen).expanduser()


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the target's scores; the values transformers gives the same names.

    Attributes:
        temperature: 0 is greedy: the processors that only apply to sampling are then left out, as in transformers.
        top_k: 0 keeps every token.
        top_p: 1.0 keeps every token.
        min_p: 0.0 keeps every token.
        repetition_penalty: 1.0 is none.
        seed: keys the draws, together with token position and token id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken instead of a draw."""
        return self.temperature == 0.0


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


@dataclass(frozen=True)
class LedgerItem:
    """One line of the memory account."""

    item: str
    bytes: int


@dataclass(frozen=True)
class Expectation:
    """What steps are expected to take and to bring, before any is measured; forgotten as they are.

    Attributes:
        pass_s: seconds of a pass over the target by its rows, ascending; drafting not included.
        draft_s: likewise of a pass over the draft.
        tree_nodes: of a step.
        draft_passes: that growing such a tree takes.
        tokens_per_step: that it emits.
    """

    pass_s: tuple[tuple[int, float], ...]
    draft_s: tuple[tuple[int, float], ...]
    tree_nodes: int
    draft_passes: float
    tokens_per_step: float


@dataclass(frozen=True)
class Plan:
    """Everything the engine needs to know before it moves a byte; the whole contract between planner and engine.

    Attributes:
        target, draft: names; draft is None for plain decoding.
        quant: how the target's weights are stored, as in `ModelSpec`.
        device: "cpu" or "cuda:0".
        ctx: committed tokens that the caches hold.
        tree_budget: the most draft nodes per tree, root excluded; 0 without a draft.
        adaptive: whether trees are kept smaller where the last nodes would not pay for their time.
        draft_rows: rows that one growing tree may take in the draft's cache; 0 without a draft.
        slots: staging buffers for streamed layers; 0 when nothing streams.
        resident: indices of the layers that stay in device memory, ascending.
        num_layers: L of the target.
        chunk_rows: rows that one layer computes at a time.
        ledger: device memory, item by item.
        device_budget_bytes: what the ledger had to stay within.
        host_bytes: memory outside the device budget: copies of layers, embeddings; 0 on the CPU, where both are one.
        host_ledger: host memory that the ledger does not count, item by item: libraries, too, and what the page cache
            is to hold.
        streamed_bytes_per_step: bytes over the link for one pass.
        draft_quant: how the draft's weights are stored; "none" without a draft.
        lowered_from: the precision that the user gets less than without having asked for it; None in most plans.
        head_rows: nodes that are scored at a time on the walk down the tree; what is not visited is not scored.
        in_ram: indices of the streamed layers whose bytes stay in host memory between passes, ascending; the other
            streamed layers are read from the disk for every pass.
        host_embeddings: whether the target's input embeddings stay in host memory, and only the rows that a pass needs
            come to the device.
        expected: of steps, for trees to start from where `adaptive`; None if nothing is known.
    """

    target: str
    draft: str | None
    quant: str
    device: str
    dtype: Dtype
    ctx: int
    tree_budget: int
    draft_rows: int
    slots: int
    resident: tuple[int, ...]
    num_layers: int
    chunk_rows: int
    ledger: tuple[LedgerItem, ...]
    device_budget_bytes: int
    host_bytes: int
    streamed_bytes_per_step: int
    adaptive: bool = False
    draft_quant: str = "none"
    lowered_from: Dtype | None = None
    in_ram: tuple[int, ...] = ()
    head_rows: int = HEAD_BLOCK_ROWS
    host_ledger: tuple[LedgerItem, ...] = ()
    host_embeddings: bool = False
    expected: Expectation | None = None

    @property
    def device_bytes(self) -> int:
        """Sum of the ledger."""
        return sum(item.bytes for item in self.ledger)

    @property
    def generation_bytes(self) -> int:
        """The ledger without weights: what it takes to generate, whatever the model's size on disk."""
        return sum(item.bytes for item in self.ledger if item.item not in WEIGHT_ITEMS)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the layers that are streamed for every pass, ascending."""
        resident = set(self.resident)
        return tuple(i for i in range(self.num_layers) if i not in resident)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Of every layer, in order."""
        resident, in_ram = set(self.resident), set(self.in_ram)
        return tuple("device" if i in resident else "ram" if i in in_ram else "disk" for i in range(self.num_layers))


@dataclass(frozen=True)
class Guesses:
    """What one drafter put into a tree.

    Attributes:
        source: the drafter's name.
        offered: its nodes.
        accepted: those of them that the target took.
    """

    source: str
    offered: int
    accepted: int


@dataclass(frozen=True)
class DraftTree:
    """The guesses that a step verified.

    Attributes:
        tokens: one per node, likeliest first.
        parents: index of each node's parent, -1 for those that follow the committed text; always smaller than its own.
        accepted: the nodes that the target took, root to leaf.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """What the engine is at.

    Attributes:
        phase: the part of a step.
        layers_done: of the pass under way.
        num_layers: of the target.
    """

    phase: Phase
    layers_done: int
    num_layers: int


@dataclass(frozen=True)
class Step:
    """One target pass and what came of it: the engine's only output.

    Attributes:
        token_ids: tokens emitted by this pass, in order; empty only for an interrupted pass.
        finish_reason: None while the answer goes on.
        new_rows: committed tokens the pass had to compute (the prompt in the first step, then 1 or more).
        cached_rows: committed tokens it found in the cache.
        tree_nodes: draft nodes verified, root excluded.
        accepted: draft nodes among `token_ids`.
        depth: depth of the tree that was offered.
        pass_s: wall time of the whole step.
        draft_s: time spent drafting that the pass did not hide.
        verify_s: time of the target pass.
        sample_s: time of head, processors and walk.
        stream_wait_s: time within verify_s spent waiting for layers.
        streamed_bytes: bytes moved over the link.
        guesses: the tree's nodes by the drafter they came from; empty without a tree.
        tree: the guesses themselves; None if there were none, or the step was interrupted.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    new_rows: int
    cached_rows: int
    tree_nodes: int
    accepted: int
    depth: int
    pass_s: float
    draft_s: float
    verify_s: float
    sample_s: float
    stream_wait_s: float
    streamed_bytes: int
    guesses: tuple[Guesses, ...] = ()
    tree: DraftTree | None = None


@dataclass(frozen=True)
class MemoryReport:
    """What the engine holds, beside what the ledger promised; bytes."""

    device_budget_bytes: int
    device_peak_bytes: int
    predicted_device_bytes: int
    host_peak_bytes: int
    runtime_bytes: int
    resident_layers: int
    streamed_layers: int
    streamed_bytes_per_step: int


@dataclass(frozen=True)
class Message:
    """One turn of a chat, in the words of chat templates; `reasoning` is the thinking before an answer."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str | None = field(default=None)


@dataclass(frozen=True)
class Setting:
    """A setting that holds, as it is shown, and where it came from: a flag, a file, the model, a default."""

    name: str
    value: str
    source: str
