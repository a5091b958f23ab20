"""The plan: the contract between planner and engine."""

from dataclasses import dataclass

from specchat.records.limits import HEAD_BLOCK_ROWS
from specchat.records.model import Dtype, Tier

# Items of the ledger that are weights, resident or on their way.
WEIGHT_ITEMS = frozenset({"resident layers", "slots", "embeddings and head", "head", "draft"})


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
