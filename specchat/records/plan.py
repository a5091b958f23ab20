"""The plan: the contract between planner and engine."""

from dataclasses import dataclass, replace
from typing import Literal

from specchat.records.limits import HEAD_BLOCK_ROWS, MOST_RESTORE_POINTS
from specchat.records.microbatches import WHOLE_PASSES, Microbatches
from specchat.records.model import Dtype, Quant, Tier

# Ledger items that hold weights, resident or streamed.
WEIGHT_ITEMS = frozenset(
    {
        *("resident layers", "slots", "shared blocks", "embeddings and head", "head", "draft"),
        *("expert pool", "expert slots", "small tensors of experts"),
    }
)


# Owner of a layer that another machine has, where a placement describes one machine.
ELSEWHERE = -1


@dataclass(frozen=True)
class LedgerItem:
    """One line of the memory ledger."""

    item: str
    bytes: int


@dataclass(frozen=True)
class Expectation:
    """Predicted times and tokens of a step, before any step is measured; measurements replace them.

    Attributes:
        pass_s: (rows, seconds) of a target pass, rows ascending; drafting not included.
        draft_s: (rows, seconds) of a draft pass, rows ascending.
        tree_nodes: number of draft nodes in the tree of a step.
        draft_passes: number of draft passes that growing this tree takes.
        tokens_per_step: expected number of tokens that a pass emits, those of all its sequences together.
        num_sequences: number of sequences of the pass that `tokens_per_step` belongs to.
    """

    pass_s: tuple[tuple[int, float], ...]
    draft_s: tuple[tuple[int, float], ...]
    tree_nodes: int
    draft_passes: float
    tokens_per_step: float
    num_sequences: int = 1


@dataclass(frozen=True)
class DeviceChoice:
    """One of several devices that the user has named.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        vram_bytes: memory budget of the device in bytes; None leaves it to the planner.
    """

    device: str
    vram_bytes: int | None = None


@dataclass(frozen=True)
class PlanChoices:
    """The user's choices for a plan; None and "auto" leave a choice to the planner.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        devices: devices that layers are dealt to; "auto" for all GPUs if that is faster, empty for `device` alone.
        dtype: dtype of weights, activations and caches.
        vram_bytes: device memory budget in bytes; a host memory budget on the CPU.
        ram_bytes: cap on host memory in bytes.
        slots: staging buffers for streamed layers.
        ctx: committed tokens that the caches hold.
        tree_budget: draft nodes per pass, roots excluded.
        quant: quantization of the target's matrices.
        draft_quant: quantization of the draft's matrices; it changes the speed, never the text.
        seats: number of answers that share a pass; 1 for chats.
    """

    device: str = "auto"
    devices: Literal["auto"] | tuple[DeviceChoice, ...] = ()
    dtype: Literal["auto"] | Dtype = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    slots: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    quant: Literal["auto"] | Quant = "auto"
    draft_quant: Literal["auto"] | Quant = "auto"
    seats: int = 1


@dataclass(frozen=True)
class Workload:
    """The work of a pass, as the ledger prices it.

    Attributes:
        device: device that passes run on, "cpu" or "cuda:N".
        dtype: dtype of weights, activations and caches.
        ctx: committed tokens that the caches hold.
        tree_budget: most draft nodes of a pass, roots excluded; 0 for plain decoding.
        draft_rows: rows that growing trees may take in the draft's cache; 0 without a draft.
        chunk_rows: rows that one layer computes at a time.
        reserve_bytes: bytes kept for libraries and for what the allocator rounds up.
        head_rows: nodes that the head scores at a time on the walk; blocks without a visited node are not scored.
        host_embeddings: whether input embeddings stay in host memory, and only the rows of a pass cross the link.
        seats: most sequences of a pass, each with a context of `ctx` tokens; 1 for chats.
        most_points: most copies of recurrent states that a chat keeps in host memory.
        shares_cache: whether the draft's rows are in the target's cache.
        tapped_width: numbers of each row of a pass that a head keeps of the states between the layers; 0 without.
    """

    device: str
    dtype: Dtype
    ctx: int
    tree_budget: int
    draft_rows: int
    chunk_rows: int
    reserve_bytes: int = 0
    head_rows: int = HEAD_BLOCK_ROWS
    host_embeddings: bool = False
    seats: int = 1
    most_points: int = MOST_RESTORE_POINTS
    shares_cache: bool = False
    tapped_width: int = 0

    @property
    def tree_rows(self) -> int:
        """Rows of trees in each seat of the target's cache."""
        return max(self.tree_budget, self.draft_rows) if self.shares_cache else self.tree_budget

    @property
    def prompt_rows(self) -> int:
        """Most rows of prompts in a pass: one prompt that fills the context, or several of a chunk together."""
        return min(max(self.ctx, self.chunk_rows), self.seats * self.ctx)

    @property
    def restore_points(self) -> int:
        """Number of copies of recurrent states; none with several seats, whose answers are not continued."""
        return self.most_points if self.seats == 1 else 0


@dataclass(frozen=True)
class ExpertSlots:
    """Slots for routed experts in device memory.

    Attributes:
        quota: slots of each layer, for the experts that passes use most.
        shared: slots that the other experts of all layers pass through.
        uses: share of earlier passes that used each expert, by layer with experts; the slots of each layer are filled
            with the most used ones at loading. Empty before anything was learned.
        looks_ahead: whether likely experts of the next layer are read while a layer is computed.
        in_host: experts of each layer that stay in pinned host memory between passes, the most used ones beside those
            that fill the pool; the others are read from the disk. 0 on a CPU.
    """

    quota: int
    shared: int
    uses: tuple[tuple[float, ...], ...] = ()
    looks_ahead: bool = True
    in_host: int = 0


@dataclass(frozen=True)
class Placement:
    """Where the target's layers lie.

    Attributes:
        num_layers: decoder layers of the target, L.
        resident: indices of the layers that stay in device memory, ascending.
        in_ram: indices of the streamed layers whose bytes stay in host memory between passes, ascending; the other
            streamed layers are read from the disk for every pass. If experts are streamed, the layers whose experts
            stay in host memory.
        slots: staging buffers for streamed layers; 0 when nothing streams.
        experts: slots for routed experts, which are then not part of the resident layers; None if whole layers are
            streamed.
        expanded: indices of the resident layers whose quantized matrices take more memory to be faster: dequantized, or
            with a copy in another order. Only on a CPU.
        expanded_bytes: most bytes that these layers take beyond their stored size.
        head_copy_bytes: bytes of a dequantized copy of a packed head, which is faster; 0 without one. Only on a CPU.
        devices: devices that layers are dealt to; the first one also has embeddings, head and draft. Empty if the
            device of the workload has all layers.
        owner: number of the device of each layer; empty for one device. `slots` counts for each device. ELSEWHERE for
            layers that another machine has.
        apart: whether each device belongs to another machine, which reads and computes its own layers.
        microbatches: numbers of microbatches of passes; with several devices.
    """

    num_layers: int
    resident: tuple[int, ...]
    in_ram: tuple[int, ...] = ()
    slots: int = 0
    experts: ExpertSlots | None = None
    expanded: tuple[int, ...] = ()
    expanded_bytes: int = 0
    head_copy_bytes: int = 0
    devices: tuple[str, ...] = ()
    owner: tuple[int, ...] = ()
    apart: bool = False
    microbatches: Microbatches = WHOLE_PASSES

    def part(self, number: int) -> "Placement":
        """Return the placement of one device, as its own machine loads it."""
        owned = set(self.owned(number))
        return replace(
            self,
            resident=tuple(index for index in self.resident if index in owned),
            in_ram=tuple(index for index in self.in_ram if index in owned),
            devices=(),
            owner=tuple(0 if index in owned else ELSEWHERE for index in range(self.num_layers)),
            apart=False,
            microbatches=WHOLE_PASSES,
            head_copy_bytes=0 if number else self.head_copy_bytes,
        )

    def owned(self, number: int) -> tuple[int, ...]:
        """Return the indices of the layers of one device, ascending."""
        if not self.owner:
            return tuple(range(self.num_layers))
        return tuple(index for index, owner in enumerate(self.owner) if owner == number)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the layers that are streamed for every pass, ascending."""
        resident = {*self.resident, *(i for i, owner in enumerate(self.owner) if owner == ELSEWHERE)}
        return tuple(i for i in range(self.num_layers) if i not in resident)

    def more_bytes(self, index: int) -> int:
        """Return the part of `expanded_bytes` that belongs to a layer: equal parts, which together are the whole."""
        if index not in self.expanded:
            return 0
        share, rest = divmod(self.expanded_bytes, len(self.expanded))
        return share + (self.expanded.index(index) < rest)

    @property
    def streams(self) -> bool:
        """Whether passes read layers or experts."""
        return bool(self.streamed) or self.experts is not None

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tier of every layer, in order."""
        resident, in_ram = set(self.resident), set(self.in_ram)
        return tuple("device" if i in resident else "ram" if i in in_ram else "disk" for i in range(self.num_layers))


@dataclass(frozen=True)
class Stage:
    """A chat that is still short: caches are small, and more layers are resident than in the plan's placement.

    Attributes:
        ctx: committed tokens that the caches hold.
        resident: indices of the layers that stay in device memory, ascending; among them those of later stages.
    """

    ctx: int
    resident: tuple[int, ...]


@dataclass(frozen=True)
class StateMemory:
    """Memory of a target's recurrent layers, all seats together.

    Attributes:
        num_recurrent: number of layers with a state.
        num_attention: number of layers that cache keys and values; a layer may have both.
        state_bytes: bytes of the states before the last change.
        working_bytes: bytes of the working copy, which passes advance.
        stash_bytes: (nodes, bytes) that trees of a few sizes stash until a path is accepted.
        num_points: number of restore points in host memory.
        point_bytes: bytes of one restore point, the draft's included.
        kv_bytes: bytes of the keys and values of all layers that cache them.
    """

    num_recurrent: int
    num_attention: int
    state_bytes: int
    working_bytes: int
    stash_bytes: tuple[tuple[int, int], ...]
    num_points: int
    point_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class ExpertForecast:
    """Experts that are read one by one, and what is expected of a pass.

    Attributes:
        num_layers: number of layers with such experts.
        num_experts: experts of each of these layers.
        per_row: experts that one row uses.
        expert_bytes: bytes that are read for one expert.
        rows: rows of the expected pass.
        used: expected experts of a layer that the pass uses.
        hit_rate: expected share of these experts that are in their slots.
        missed_bytes: expected bytes of the other ones, which the pass reads.
    """

    num_layers: int
    num_experts: int
    per_row: int
    expert_bytes: int
    rows: int
    used: float
    hit_rate: float
    missed_bytes: int

    @property
    def all_bytes(self) -> int:
        """Bytes of all experts, which a pass over whole layers would move."""
        return self.num_layers * self.num_experts * self.expert_bytes


@dataclass(frozen=True)
class DevicePlan:
    """What one of several devices holds and does in a pass.

    Attributes:
        device: name of the device.
        resident: number of layers that stay in its memory.
        streamed: number of layers that it streams.
        ledger: device memory, item by item.
        vram_bytes: memory budget in bytes that the ledger stays within.
        streamed_bytes: bytes over its link for one pass.
        link_bytes_per_s: expected rate of its link while the links of all devices are in use.
        link_s: expected seconds that its link is busy in a pass.
        compute_s: expected seconds that it computes in a pass.
    """

    device: str
    resident: int
    streamed: int
    ledger: tuple[LedgerItem, ...]
    vram_bytes: int
    streamed_bytes: int
    link_bytes_per_s: float
    link_s: float
    compute_s: float

    @property
    def num_bytes(self) -> int:
        """Sum of the ledger in bytes."""
        return sum(item.bytes for item in self.ledger)


@dataclass(frozen=True)
class Plan:
    """All decisions that the engine needs before loading: the whole contract between planner and engine.

    Attributes:
        target, draft: names of the models; draft is None without a draft model.
        quant: quantization of the target's matrices, as in `ModelSpec`.
        work: device, dtype, context and trees.
        placement: tiers of the target's layers, and the number of slots.
        ledger: device memory, item by item.
        vram_bytes: device memory budget in bytes that the ledger stays within.
        host_bytes: bytes outside the device budget: copies of layers, embeddings; 0 on the CPU, which has one budget.
        streamed_bytes_per_step: bytes over the link for one pass.
        adaptive: whether trees stay smaller where the last nodes would cost more time than they save.
        draft_quant: quantization of the draft's matrices; "none" without a draft.
        lowered_from: the checkpoint's dtype if the planner chose a lower precision by itself, else None.
        host_ledger: host memory that the ledger does not count, item by item, including libraries and page cache.
        expected: predicted times and tokens of a step, from which an adaptive tree starts; None if unknown.
        text_only: whether the target is the text half of a multimodal model.
        retrieval: whether draft nodes also come from the text itself and the target's earlier scores.
        states: memory of recurrent layers; None for a target without any.
        experts: experts that are read one by one; None if whole layers stream, or nothing does.
        stages: stages of a chat, by ascending context; `work` and `placement` follow the last one. No stage takes more
            memory than the ledger.
        devices: all devices if layers are dealt to several, the first of them with the plan's own ledger and budget;
            empty for one device.
    """

    target: str
    draft: str | None
    quant: str
    work: Workload
    placement: Placement
    ledger: tuple[LedgerItem, ...]
    vram_bytes: int
    host_bytes: int
    streamed_bytes_per_step: int
    adaptive: bool = False
    draft_quant: str = "none"
    lowered_from: Dtype | None = None
    host_ledger: tuple[LedgerItem, ...] = ()
    expected: Expectation | None = None
    text_only: bool = False
    retrieval: bool = False
    states: StateMemory | None = None
    experts: ExpertForecast | None = None
    stages: tuple[Stage, ...] = ()
    devices: tuple[DevicePlan, ...] = ()

    @property
    def owner(self) -> tuple[int, ...]:
        """Number of the device of each layer."""
        return self.placement.owner or (0,) * self.placement.num_layers

    @property
    def first_stage(self) -> Stage:
        """What is loaded at first."""
        return self.stages[0] if self.stages else Stage(self.work.ctx, self.placement.resident)

    @property
    def sources(self) -> str:
        """Names of what drafts: the draft model, "retrieval", or both joined by "+"; "none" for plain decoding."""
        return "+".join([*([self.draft] if self.draft else []), *(["retrieval"] if self.retrieval else [])]) or "none"

    @property
    def device_bytes(self) -> int:
        """Sum of the ledger in bytes."""
        return sum(item.bytes for item in self.ledger)

    @property
    def generation_bytes(self) -> int:
        """Bytes of the ledger without weights: the memory of generation itself, such as caches and activations."""
        return sum(item.bytes for item in self.ledger if item.item not in WEIGHT_ITEMS)
