"""Simulate a step of a model that streams to a GPU, where no GPU is at hand: figures, not measurements.

    PYTHONPATH=.:tests python tests/benchmarks/simulated_step.py

Kernels, small copies and waits are those of this code, counted on a pretended GPU with small models of the same
architectures (`support.gpu_counts`). Layers, bytes, slots and trees are those that the planner chooses for known models
on the machine, while the chat is short. Draft passes and head blocks of a step are counted on the demo pair, whose
trees grow as on a GPU, and end where another pass is not worth the time that the plan expects. Everything else is
assumed and printed.

Three things work at the same time: the host queues kernels one after another, the device computes them in order, and
the link copies layers. They wait for each other as in `CudaStreamer`: a layer is computed when its copy has ended, a
slot is filled when its last layer was computed, and the host runs at most slots + 1 layers ahead.

Assumptions, with their sources:

- A kernel takes 5 us of the host: a layer of transformers' Llama takes 0.13 to 0.17 ms with kernels of a CPU here (41
  kernels), and a launch about 2 us. WSL 2 and servers take 1.3 to 2 times as long.
- A kernel takes the device 2 us besides the bytes and products of large matrices, and 1.5 us within a CUDA graph, whose
  launch takes the host 50 us (NVIDIA, "Constant time launch for straight-line CUDA graphs": a few us).
- RTX 4090: 1,008 GB/s, 165 Tflop/s with float32 sums (NVIDIA, Ada whitepaper). RTX 3060: 360 GB/s, 25.5 Tflop/s
  (NVIDIA, GA102 whitepaper, by number of units). Kernels reach 80% and 70%.
- The link brings 25 GB/s with 16 lanes of PCIe 4, 12.5 GB/s with 8 (of 31.5 and 15.8 GB/s; pinned copies reach 80%).
- Quantized matrices are read, written in 16 bits, and read again by the product. With few rows, ours of int8 and
  bitsandbytes' of 4 bits are read once by a fused product, which reaches 3/4 of the memory rate and half of the
  arithmetic of large products. It reads a matrix once for all tiles of 16 rows.
- A small copy takes 10 us, and a wait 15 us of the host. Both variants are shown of what nobody has measured: a small
  copy may have to wait for copies of layers that were queued before (NVIDIA/cudf issue 15620, pytorch/torchrec 4303).
- Between the passes, the host takes 2 ms for Python's part of a step: lists of the tree, its ancestors, records.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from support.gpu_counts import (
    DRAFT_ROWS,
    DemoCounts,
    PassCounts,
    StepCounts,
    count_demo,
    count_pass,
    count_step,
    num_pieces,
)
from support.loading import asking
from support.machines import MachineFile, read_machine

from specchat.hardware.machine import PcieLink
from specchat.models.catalog.known_models import known_models
from specchat.models.sizes.geometry import layer_sizes
from specchat.models.sizes.known_specs import known_spec
from specchat.planner.cost import Prediction
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING
from specchat.planner.request import PlanInputs
from specchat.planner.search import choose_plan
from specchat.records.model import AUTO_QUANTS, ModelSource, ModelSpec
from specchat.records.plan import Plan

HALF = 2.0  # bytes of a weight
STORED = {"int8": 1.0, "int4": 0.5}
FUSED_ROWS, FUSED_TILE = 64, 16
FUSED_MEMORY, FUSED_FLOPS = 0.75, 0.5  # shares of what large products reach
SCORE_SWEEPS = 10  # reads and writes of a row of scores until its best tokens are known
NUM_STEPS = 6  # after as many that fill the slots


@dataclass(frozen=True)
class Card:
    """What a GPU and its link reach.

    Attributes:
        memory: bytes per second from its own memory.
        flops: operations per second of large products.
        link: bytes per second from host memory.
    """

    memory: float
    flops: float
    link: float


@dataclass(frozen=True)
class Times:
    """Assumed seconds; see above.

    Attributes:
        host_kernel, device_kernel: of a kernel, of the host and of the device besides the work of large matrices.
        graph_launch, graph_kernel: of a launch of a graph, of the host; of each of its kernels, of the device.
        copy, wait: of a small copy, and of a wait that nothing delays.
        python: of the host in a step, besides queueing.
    """

    host_kernel: float = 5e-6
    device_kernel: float = 2e-6
    graph_launch: float = 50e-6
    graph_kernel: float = 1.5e-6
    copy: float = 10e-6
    wait: float = 15e-6
    python: float = 2e-3


RTX_4090 = Card(0.8 * 1008e9, 0.7 * 165e12, 25e9)
RTX_3060 = Card(0.8 * 360e9, 0.7 * 25.5e12, 12.5e9)


@dataclass(frozen=True)
class Work:
    """A part of a step that is queued at once.

    Attributes:
        kernels: number of kernels.
        device_s: seconds of large matrices on the device.
    """

    kernels: float
    device_s: float


@dataclass(frozen=True)
class Case:
    """What one step does.

    Attributes:
        streams: for each layer, whether it is streamed.
        layer_s: seconds of the link for a streamed layer.
        slots: staging buffers.
        draft, grow: a draft pass, and choosing its nodes.
        layer, around, block, keep: a layer of the target, its pass besides layers, a block of the walk, and keeping the
            accepted rows.
        passes: draft passes.
        blocks: blocks of the walk.
        counts: small copies and waits.
        by_graphs: whether a draft pass is one launch.
        waits_for_layers: whether small copies wait for copies of layers.
        hidden: share of the draft passes that are computed while layers stream.
    """

    streams: tuple[bool, ...]
    layer_s: float
    slots: int
    draft: Work
    grow: Work
    layer: Work
    around: Work
    block: Work
    keep: Work
    passes: float
    blocks: float
    counts: StepCounts
    by_graphs: bool = True
    waits_for_layers: bool = False
    hidden: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """Seconds of a step and of its parts; `busy` is the share in which the link copies layers."""

    step_s: float
    draft_s: float
    pass_s: float
    walk_s: float
    busy: float


class Timeline:
    """The times at which host, device and link are free; a step begins where the one before has ended."""

    def __init__(self, case: Case, times: Times) -> None:
        self._case = case
        self._times = times
        self._host = self._device = self._link = 0.0
        self._streamed = [index for index, streams in enumerate(case.streams) if streams]
        self._filled = [0.0] * len(self._streamed)
        self._done = [0.0] * len(self._streamed)
        self._used = [0.0] * case.slots
        for place in range(min(case.slots, len(self._streamed))):
            self._copy_layer(place)

    def step(self) -> Simulated:
        """Draft, verify, walk, keep."""
        case, counts, begin = self._case, self._case.counts, self._host
        for _ in range(round(counts.draft_copies)):
            self._copy_small()
        left = case.passes * (1 - case.hidden)
        while left > 0:
            share = min(left, 1.0)
            self._queue(case.draft, share, by_graph=case.by_graphs)
            filled = counts.filling if case.by_graphs else 0
            self._queue(Work(case.grow.kernels + filled, case.grow.device_s), share)
            left -= 1
        for _ in range(round(counts.draft_waits)):
            self._wait()
        self._host += self._times.python / 2
        drafted = self._host
        for _ in range(round(counts.pass_copies)):
            self._copy_small()
        self._queue(case.around)
        for index in range(len(case.streams)):
            self._layer(index)
        self._wait()
        passed = self._host
        for block in range(max(round(case.blocks), 1)):
            if block:
                self._copy_small()
            self._queue(case.block, case.blocks / max(round(case.blocks), 1))
            self._wait()
        walked = self._host
        for _ in range(round(counts.kept_copies)):
            self._copy_small()
        self._queue(case.keep)
        self._host += self._times.python / 2
        link_s = len(self._streamed) * case.layer_s
        step_s = self._host - begin
        return Simulated(step_s, drafted - begin, passed - drafted, walked - passed, link_s / step_s)

    def _layer(self, index: int) -> None:
        case = self._case
        place = self._streamed.index(index) if case.streams[index] else -1
        if place >= 0:
            behind = place - (case.slots + 1)
            if behind >= 0:
                self._host = max(self._host, self._done[behind])
            self._device = max(self._device, self._filled[place])
        self._queue(case.layer)
        if place >= 0:
            self._done[place] = self._used[place % case.slots] = self._device
            after = place + case.slots
            self._copy_layer(after if after < len(self._streamed) else place % case.slots)

    def _copy_layer(self, place: int) -> None:
        begin = max(self._link, self._host, self._used[place % self._case.slots])
        self._link = self._filled[place] = begin + self._case.layer_s

    def _copy_small(self) -> None:
        """Copy a few bytes to the device after everything that is queued; the host waits."""
        begin = max(self._host, self._device)
        if self._case.waits_for_layers:
            begin = max(begin, self._link)
        self._host = self._device = begin + self._times.copy

    def _queue(self, work: Work, share: float = 1.0, *, by_graph: bool = False) -> None:
        times = self._times
        host_s = times.graph_launch if by_graph else work.kernels * times.host_kernel
        kernels_s = work.kernels * (times.graph_kernel if by_graph else times.device_kernel)
        first = self._host + (times.graph_launch if by_graph else times.host_kernel)
        self._host += share * host_s
        self._device = max(max(self._device, first) + share * (work.device_s + kernels_s), self._host)

    def _wait(self) -> None:
        self._host = max(self._host, self._device) + self._times.wait


def simulate(case: Case, times: Times = Times()) -> Simulated:
    """The mean of steps after the first ones."""
    timeline = Timeline(case, times)
    found = [timeline.step() for _ in range(2 * NUM_STEPS)][NUM_STEPS:]
    return Simulated(*(sum(values) / NUM_STEPS for values in zip(*map(_values, found), strict=True)))


def _values(found: Simulated) -> tuple[float, ...]:
    return found.step_s, found.draft_s, found.pass_s, found.walk_s, found.busy


# --- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model on a machine.

    Attributes:
        title: what is printed.
        model: id of the target.
        architecture: name of the small model that is counted.
        card: the GPU and its link.
        machine: the machine, as the planner knows it.
        most_s: seconds that a step is to take at most.
    """

    title: str
    model: str
    architecture: str
    card: Card
    machine: MachineFile
    most_s: float


def settings() -> list[Setting]:
    """The two machines that the project names."""
    large, small = read_machine("desktop-24gb-pcie4x16-64gb"), read_machine("desktop-12gb-pcie4x16-32gb")
    return [
        Setting("Llama-3.3-70B int4, RTX 4090", "meta-llama/Llama-3.3-70B-Instruct", "llama", RTX_4090, large, 0.75),
        Setting("Qwen3-32B int4, RTX 3060 with 8 lanes", "Qwen/Qwen3-32B", "qwen3", RTX_3060, _with_3060(small), 0.87),
    ]


def _with_3060(file: MachineFile) -> MachineFile:
    (gpu,) = file.hardware.survey.gpus
    card = replace(gpu, name="NVIDIA GeForce RTX 3060", compute_capability="8.6", pcie=PcieLink(4, 8, 4, 8))
    return replace(file, hardware=replace(file.hardware, survey=replace(file.hardware.survey, gpus=(card,))))


@dataclass(frozen=True)
class Planned:
    """A plan, the sizes of its models, and what the planner predicts while the chat is short."""

    plan: Plan
    target: ModelSpec
    draft: ModelSpec
    prediction: Prediction


def planned(setting: Setting) -> Planned:
    """Ask the planner, whose link is the assumed one."""
    file, config = setting.machine, known_models()[setting.model].config
    assert config
    draft_id = {"llama": "meta-llama/Llama-3.2-1B-Instruct", "qwen3": "Qwen/Qwen3-0.6B"}[setting.architecture]
    drafts = {quant: known_spec(draft_id, quant) for quant in ("none", *AUTO_QUANTS)}
    measured = replace(file.measured, links=replace(file.measured.links, h2d_pinned_bytes_per_s=setting.card.link))
    rates, typical = (rates_of(file.hardware, file.machine, each) for each in (measured, None))
    request = replace(
        asking(ANYTHING, quant="int4"),
        target=ModelSource(setting.model, Path()),
        draft=ModelSource(draft_id, Path()),
    )
    inputs = PlanInputs(
        machine=file.machine,
        rates=rates,
        typical=typical,
        target=lambda quant: known_spec(setting.model, quant),
        draft=drafts["none"],
        lower_drafts=tuple(drafts[quant] for quant in AUTO_QUANTS),
    )
    found = choose_plan(request, inputs)
    assert found.plan.draft == draft_id
    return Planned(found.plan, known_spec(setting.model, "int4"), drafts[found.plan.draft_quant], found.prediction)


def case_of(
    found: Planned, card: Card, target: PassCounts, draft: PassCounts, counts: StepCounts, demo: DemoCounts
) -> Case:
    """What a step of a plan does while the chat is short."""
    plan, spec, small = found.plan, found.target, found.draft
    resident, rows = set(plan.first_stage.resident), 1 + found.prediction.tree_nodes
    numbers = spec.num_layer_params / spec.num_layers
    layer_s = product_s(numbers, rows, card, "int4")
    scored = plan.work.head_rows * spec.vocab_size
    head_s = product_s(spec.vocab_size * spec.hidden_size, plan.work.head_rows, card, "int8")
    head_s += 4 * SCORE_SWEEPS * scored / card.memory
    width, head = max(8, plan.work.tree_budget // 8), small.vocab_size * small.hidden_size
    head_quant = "none" if small.quant == "none" else "int8"
    draft_s = product_s(small.num_layer_params, width, card, small.quant) + product_s(head, width, card, head_quant)
    grow_s = 4 * SCORE_SWEEPS * width * small.vocab_size / card.memory
    pieces = sum(num_pieces(*shape) - 1 for shape in _matrices(spec))
    sizes = layer_sizes(spec, plan.work.dtype)
    return Case(
        streams=tuple(index not in resident for index in range(spec.num_layers)),
        layer_s=max(sizes) / card.link,
        slots=plan.placement.slots,
        draft=Work(draft.of(small.num_layers) + draft.head, draft_s),
        grow=Work(counts.growing, grow_s),
        layer=Work(target.layer + pieces * target.piece, layer_s),
        around=Work(target.beside, 0.0),
        block=Work(target.head + counts.block, head_s),
        keep=Work(counts.kept, 0.0),
        passes=demo.passes,
        blocks=found.prediction.tokens_per_step / demo.visits,
        counts=counts,
    )


def product_s(numbers: float, rows: int, card: Card, quant: str) -> float:
    """Seconds of a GPU's products of rows with matrices of so many weights."""
    plain_s = max(2 * numbers * rows / card.flops, HALF * numbers / card.memory)
    if quant == "none":
        return plain_s
    expanded_s = plain_s + (STORED[quant] + HALF) * numbers / card.memory
    tiled = -(-rows // FUSED_TILE) * FUSED_TILE
    stored_s = STORED[quant] * numbers / (FUSED_MEMORY * card.memory)
    fused_s = max(stored_s, 2 * tiled * numbers / (FUSED_FLOPS * card.flops))
    return min(expanded_s, fused_s) if rows <= FUSED_ROWS else expanded_s


def _matrices(spec: ModelSpec) -> list[tuple[int, int]]:
    """Shapes of a layer's matrices."""
    (kv,) = set(spec.kv_shapes)
    wide, hidden, mlp = spec.num_heads * kv.key_dim, spec.hidden_size, spec.mlp_size
    keys = kv.heads * kv.key_dim
    return [(wide, hidden), (keys, hidden), (keys, hidden), (hidden, wide), (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def show(title: str, found: Simulated, most_s: float) -> None:
    """Print one line."""
    parts = f"draft {found.draft_s * 1e3:.0f}, pass {found.pass_s * 1e3:.0f}, walk {found.walk_s * 1e3:.0f} ms"
    mark = "" if found.step_s <= most_s else f", above {most_s * 1e3:.0f}"
    print(f"  {title:<44} {found.step_s * 1e3:4.0f} ms{mark} ({parts}), link busy {found.busy:.0%}")


def simulate_setting(setting: Setting) -> None:
    """Count, plan, simulate and print one machine."""
    found = planned(setting)
    with tempfile.TemporaryDirectory() as folder:
        target = count_pass(setting.architecture, "int4", Path(folder))
        draft = count_pass(setting.architecture, found.draft.quant, Path(folder), DRAFT_ROWS)
        counts = count_step(setting.architecture, "int4", Path(folder))
    demo = count_demo(found.plan)
    case = case_of(found, setting.card, target, draft, counts, demo)
    stage, prediction = found.plan.first_stage, found.prediction
    print(f"\n{setting.title}; {setting.card}")
    print(
        f"  planned: {len(stage.resident)} of {len(case.streams)} layers resident up to {stage.ctx:,} tokens,", end=" "
    )
    trees = f"trees of {prediction.tree_nodes} of at most {found.plan.work.tree_budget} nodes"
    print(f"{case.slots} slots, draft in {found.draft.quant}, {trees},", end=" ")
    print(f"{prediction.tokens_per_step:.1f} tokens a step; {case.layer_s * 1e3:.1f} ms of the link a layer")
    print(f"  counted: {target}, draft: {draft}, {counts}, {demo}")
    blocks = f"{case.blocks:.1f} blocks of {_shown(case.block)}"
    print(f"  a layer {_shown(case.layer)}, a draft pass {_shown(case.draft)}, {blocks}")
    for name, changes in VARIANTS.items():
        show(name, simulate(replace(case, **changes)), setting.most_s)
    now = simulate(case).step_s
    print(
        f"  the planner predicts {prediction.pass_s * 1e3:.0f} ms, {prediction.pass_s / now - 1:+.0%} of the first line"
    )


def _shown(work: Work) -> str:
    return f"{work.kernels:.0f} kernels and {work.device_s * 1e3:.1f} ms"


VARIANTS: dict[str, dict[str, Any]] = {
    "draft passes as graphs, as built": {},
    "and small copies wait for layers": {"waits_for_layers": True},
    "without graphs": {"by_graphs": False},
    "without graphs, and small copies wait": {"by_graphs": False, "waits_for_layers": True},
    "if half of the draft passes were hidden": {"hidden": 0.5},
}


def main() -> int:
    torch.set_num_threads(1)
    print("SIMULATED: no time below was measured")
    print(__doc__.partition("Assumptions, with their sources:\n")[2].strip())
    for setting in settings():
        simulate_setting(setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
