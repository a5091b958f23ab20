"""Simulate layers that are dealt to several devices, where no machine here has several GPUs: figures, not measurements.

    PYTHONPATH=.:tests python tests/benchmarks/simulated_devices.py [--part specmemo,cards,machines]

A device has a link, a compute unit and a few slots. A pass runs through the layers in order, and each layer is computed
by the device that owns it. A streamed layer is loaded when one of its device's slots is free, in the order of use,
while other layers are computed. Rows hop where the device changes. A microbatch begins its next pass when its tokens
are drawn and its trees are drafted. Within a pass, a device works in a fixed order: with shared loads layer by layer,
where one load serves all microbatches, else microbatch by microbatch, and each loads for itself.

Layers are cut in ranges, or dealt in turn ("woven"), both so that all links would end together. Tokens of a pass follow
`tokens_per_pass`, seconds of a layer the roofline of `Device`. Nothing else is modelled: no attention over long
contexts, no lanes or host memory that links share, no jitter.

Part "specmemo" sets up the experiment of SpecMemo (arXiv 2506.01986, abstract and section on distributed decoding):
Llama-2-70B-Chat on eight MI250, where batched speculative decoding was 2 times as fast as batched plain decoding, and a
batch of 10 brought 8 times the throughput. Sizes of its trees and times of its kernels are not given in full, so they
are assumed here.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

GB = 1e9
NUM_PASSES = 8  # the second half is steady


@dataclass(frozen=True)
class Device:
    """A card, or a machine with one.

    Attributes:
        link: bytes per second from host memory to the device.
        flops: operations per second that its products reach.
        memory: bytes per second that it reads from its own memory.
        room: bytes for resident layers and slots.
        layer_s: fixed seconds of a layer, which the host takes to launch its kernels.
    """

    link: float
    flops: float
    memory: float
    room: float
    layer_s: float = 4e-5


@dataclass(frozen=True)
class Network:
    """What rows hop over from one device to the next."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Model:
    """A target, and the seconds of a pass besides its layers.

    Attributes:
        num_layers: number of layers, all alike.
        layer_params: weights of a layer.
        layer_bytes: bytes of a layer as it is stored.
        hidden: numbers of a row between two layers, in 16 bits each.
        head_s: seconds of the head, of the walk and of sampling, for a microbatch.
        draft_s: seconds of drafting that no load hides, for a microbatch.
    """

    num_layers: int
    layer_params: float
    layer_bytes: float
    hidden: int
    head_s: float
    draft_s: float


@dataclass(frozen=True)
class Deal:
    """The owner of each layer, the layers that stay in its memory, and slots for the others."""

    owner: tuple[int, ...]
    resident: frozenset[int]
    slots: int


def tokens_per_pass(nodes: int) -> float:
    """Return the tokens that a tree brings: 3.5 with 16 nodes, 4.6 with 64, as a good draft does in chats."""
    return 1 + 0.6 * math.log2(1 + nodes)


# --- dealing layers ----------------------------------------------------------------------------------------------


def shares(model: Model, devices: Sequence[Device], slots: int) -> list[float]:
    """Return the number of layers of each device: what it holds, and of the others a part as its link is fast."""
    held = [int(device.room // model.layer_bytes) for device in devices]
    if sum(held) >= model.num_layers:
        return [model.num_layers * each / sum(held) for each in held]
    stay = [max(each - slots, 0) for each in held]
    links = sum(device.link for device in devices)
    left = model.num_layers - sum(stay)
    return [each + left * device.link / links for each, device in zip(stay, devices, strict=True)]


def ranges(wanted: Sequence[float]) -> tuple[int, ...]:
    """Return owners such that each device has one range of layers."""
    owner, end = list[int](), 0.0
    for device, share in enumerate(wanted):
        end += share
        owner += [device] * (round(end) - len(owner))
    return tuple(owner)


def woven(wanted: Sequence[float], block: int = 1) -> tuple[int, ...]:
    """Return owners such that devices take blocks of layers in turn, each as often as its share is large."""
    num_layers, owner, taken = round(sum(wanted)), list[int](), [0.0] * len(wanted)
    while len(owner) < num_layers:
        device = min(range(len(wanted)), key=lambda each: (taken[each] + block / 2) / max(wanted[each], 1e-9))
        count = min(block, num_layers - len(owner))
        owner += [device] * count
        taken[device] += count
    return tuple(owner)


def deal(model: Model, devices: Sequence[Device], owner: tuple[int, ...], slots: int) -> Deal | None:
    """Return a deal whose resident layers are spread evenly among those of their device; None if it does not fit."""
    resident = set[int]()
    for number, device in enumerate(devices):
        own = [layer for layer, owned_by in enumerate(owner) if owned_by == number]
        held = int(device.room // model.layer_bytes)
        stay = len(own) if held >= len(own) else held - slots
        if stay < 0:
            return None
        resident |= {own[int((i + 0.5) * len(own) / stay)] for i in range(stay)}
    return Deal(owner, frozenset(resident), slots)


def deals(
    model: Model, devices: Sequence[Device], kinds: Iterable[str], slots: Iterable[int]
) -> Iterator[tuple[str, Deal]]:
    """Yield the deals of these kinds, "ranges" or "woven", that fit, with their names."""
    for kind, count in product(kinds, slots):
        wanted = shares(model, devices, count)
        for block in (1,) if kind == "ranges" else (1, 2):
            found = deal(model, devices, ranges(wanted) if kind == "ranges" else woven(wanted, block), count)
            if found is not None and (block == 1 or count > block):
                yield f"{kind}{'' if block == 1 else f' by {block}'}, {count} slots", found


# --- passes ------------------------------------------------------------------------------------------------------


class _Timeline:
    """The times at which one device is free: its compute unit, its link, and each of its loads."""

    def __init__(self, device: Device, load_s: float, slots: int) -> None:
        self._device, self._load_s, self._slots = device, load_s, slots
        self._free = self._link_free = 0.0
        self._arrived = list[float]()
        self._used = list[float]()

    def load(self) -> None:
        """Begin the next load as soon as the link and a slot are free."""
        before = len(self._arrived) - self._slots
        begin = max(self._link_free, self._used[before] if before >= 0 else 0.0)
        self._link_free = begin + self._load_s
        self._arrived.append(self._link_free)
        self._used.append(math.inf)

    def compute(self, ready: float, seconds: float, *, streamed: bool) -> float:
        """Return when a layer ends whose rows are ready; a streamed one also waits for the last load."""
        begin = max(ready, self._free, self._arrived[-1] if streamed else 0.0)
        self._free = begin + self._device.layer_s + seconds
        if streamed:
            self._used[-1] = self._free
        return self._free


def pass_s(
    model: Model,
    devices: Sequence[Device],
    network: Network,
    dealt: Deal,
    rows: Sequence[int],
    *,
    shares_loads: bool = True,
    drafts: bool = True,
) -> float:
    """Return the seconds in which every microbatch makes one pass, in the steady state.

    Args:
        model: target.
        devices: devices; the first one also drafts and draws.
        network: network between the devices.
        dealt: owner and place of each layer.
        rows: rows of each microbatch.
        shares_loads: whether one load of a layer serves all microbatches.
        drafts: whether trees are drafted.
    """
    timelines = [_Timeline(device, model.layer_bytes / device.link, dealt.slots) for device in devices]
    at = [0.0] * len(rows)  # when the rows of each microbatch are ready
    host, ends = 0.0, list[float]()
    for _ in range(NUM_PASSES):
        layers, batches = range(model.num_layers), range(len(rows))
        # Each device does its tasks in this order, and no task needs a later one.
        order = product(layers, batches) if shares_loads else ((each, batch) for batch in batches for each in layers)
        for layer, batch in order:
            number, timeline = dealt.owner[layer], timelines[dealt.owner[layer]]
            comes_from = dealt.owner[layer - 1] if layer else 0
            hop_s = 0.0 if comes_from == number else _hop_s(model, network, rows[batch])
            streamed = layer not in dealt.resident
            if streamed and (batch == 0 or not shares_loads):
                timeline.load()
            at[batch] = timeline.compute(
                at[batch] + hop_s, _layer_s(model, devices[number], rows[batch]), streamed=streamed
            )
            if layer == model.num_layers - 1:
                back = at[batch] + (0.0 if number == 0 else _hop_s(model, network, rows[batch]))
                host = at[batch] = max(host, back) + model.head_s + (model.draft_s if drafts else 0.0)
        ends.append(max(at))
    half = NUM_PASSES // 2
    return (ends[-1] - ends[half - 1]) / (NUM_PASSES - half)


def _layer_s(model: Model, device: Device, rows: int) -> float:
    """Return the seconds of a layer: its weights are read, and every row is multiplied with each of them."""
    return max(model.layer_bytes / device.memory, 2 * model.layer_params * rows / device.flops)


def _hop_s(model: Model, network: Network, rows: int) -> float:
    return network.latency_s + 2 * rows * model.hidden / network.bytes_per_s


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all answers together, and what brought them."""

    tok_per_s: float
    how: str


def speed(
    model: Model,
    devices: Sequence[Device],
    network: Network,
    named: tuple[str, Deal],
    *,
    batch: int,
    nodes: int,
    microbatches: int = 1,
    shares_loads: bool = True,
) -> Speed:
    """Return the speed of a batch with trees of some nodes each; 0 nodes are plain decoding."""
    rows = [(batch // microbatches + (i < batch % microbatches)) * (1 + nodes) for i in range(microbatches)]
    seconds = pass_s(model, devices, network, named[1], rows, shares_loads=shares_loads, drafts=nodes > 0)
    parts = "" if microbatches == 1 else f", {microbatches} microbatches{'' if shares_loads else ' that load anew'}"
    return Speed(batch * tokens_per_pass(nodes) / seconds, f"{nodes} nodes, {named[0]}{parts}")


def fastest(
    model: Model,
    devices: Sequence[Device],
    network: Network,
    *,
    batch: int,
    nodes: Iterable[int],
    kinds: Iterable[str] = ("ranges", "woven"),
    microbatches: Iterable[int] = (1,),
    shares_loads: Iterable[bool] = (True,),
    slots: Iterable[int] = (2, 3, 5),
) -> Speed:
    """Return the fastest of all combinations."""
    found = list(deals(model, devices, kinds, slots))
    tried = product(found, nodes, [count for count in microbatches if count <= batch], shares_loads)
    return max(
        (
            speed(model, devices, network, named, batch=batch, nodes=size, microbatches=count, shares_loads=shared)
            for named, size, count, shared in tried
        ),
        key=lambda each: each.tok_per_s,
    )


# --- what is simulated -------------------------------------------------------------------------------------------

ONE_PC = Network(10 * GB, 3e-5)
ETHERNET = {"1 GbE": Network(0.117 * GB, 4e-4), "10 GbE": Network(1.15 * GB, 1e-4)}
# SpecMemo: eight MI250 with everything resident, and transformers' host time of a layer.
LLAMA_70B = Model(80, 856e6, 1.712 * GB, 8192, head_s=0.004, draft_s=0.0)
MI250 = Device(25 * GB, 70e12, 1300 * GB, 60 * GB, layer_s=8e-4)
SERVER = Network(25 * GB, 2e-4)
# Four bits: 13 and 37 GB of layers. The first card also holds the head, the caches and the draft.
QWEN_27B_4BIT = Model(64, 380e6, 0.203 * GB, 5120, head_s=0.006, draft_s=0.02)
LLAMA_70B_4BIT = Model(80, 856e6, 0.465 * GB, 8192, head_s=0.008, draft_s=0.04)


def card(link: float = 12.5, *, first: bool = False) -> Device:
    """Return a card of 8 GB, whose link brings so many GB/s; the first one has less room for layers."""
    return Device(link * GB, 25e12, 250 * GB, (4.4 if first else 6.2) * GB)


def specmemo() -> None:
    """Print SpecMemo's setting: ratios of batched trees to batched plain decoding and to one answer with trees."""
    devices = [MI250] * 8
    (named,) = deals(LLAMA_70B, devices, ["ranges"], [2])
    plain = speed(LLAMA_70B, devices, SERVER, named, batch=10, nodes=0).tok_per_s
    print(f"SpecMemo's setting: 70B fp16, 8 devices, all resident; plain at batch 10: {plain:.0f} tok/s")
    for nodes in (4, 6, 8, 16, 64):
        one = speed(LLAMA_70B, devices, SERVER, named, batch=1, nodes=nodes).tok_per_s
        ten = speed(LLAMA_70B, devices, SERVER, named, batch=10, nodes=nodes).tok_per_s
        parts = max(
            speed(
                LLAMA_70B, devices, SERVER, named, batch=10, nodes=nodes, microbatches=m, shares_loads=False
            ).tok_per_s
            for m in (2, 5, 10)
        )
        print(
            f"  {nodes:2} nodes each: {ten:4.0f} tok/s, {ten / plain:.1f}x plain at batch 10, {ten / one:.1f}x one"
            f" answer; with microbatches {parts:4.0f}, {parts / plain:.1f}x plain"
        )


def _compare(name: str, model: Model, devices: Sequence[Device], network: Network) -> None:
    """Print one line for one answer, and one for ten."""
    for batch in (1, 10):
        nodes, parts = ((16, 64), (1,)) if batch == 1 else ((4, 16, 64), (1, 2, 4))
        plain = fastest(model, devices, network, batch=batch, nodes=[0], kinds=["ranges"])
        cut = fastest(model, devices, network, batch=batch, nodes=nodes, kinds=["ranges"])
        dealt = fastest(model, devices, network, batch=batch, nodes=nodes)
        both = fastest(model, devices, network, batch=batch, nodes=nodes, microbatches=parts)
        print(
            f"  {name}, batch {batch}: plain {plain.tok_per_s:.1f}, trees in ranges {cut.tok_per_s:.1f}, woven"
            f" {dealt.tok_per_s:.1f} ({dealt.tok_per_s / cut.tok_per_s:.1f}x ranges), with microbatches"
            f" {both.tok_per_s:.1f} ({both.how})"
        )


def cards() -> None:
    """Print a 27B model in four bits on cards of 8 GB in one machine."""
    print("27B 4-bit, cards of 8 GB in one PC, tok/s")
    _compare("one card, 12.5 GB/s", QWEN_27B_4BIT, [card(first=True)], ONE_PC)
    _compare("two cards, 12.5 GB/s each", QWEN_27B_4BIT, [card(first=True), card()], ONE_PC)
    _compare("two cards, 25 and 6.5 GB/s", QWEN_27B_4BIT, [card(25, first=True), card(6.5)], ONE_PC)


def machines() -> None:
    """Print a 70B model in four bits on four machines."""
    print("70B 4-bit, PCs with a card of 8 GB and 12.5 GB/s each, tok/s")
    _compare("one PC", LLAMA_70B_4BIT, [card(first=True)], ONE_PC)
    for name, network in ETHERNET.items():
        _compare(f"four PCs, {name}", LLAMA_70B_4BIT, [card(first=True), card(), card(), card()], network)


PARTS = {"specmemo": specmemo, "cards": cards, "machines": machines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated: specmemo, cards, machines")
    print("SIMULATED: no figure below was measured")
    for part in parser.parse_args().part.split(","):
        PARTS[part]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
