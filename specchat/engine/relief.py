"""Giving kept layers back to the system while memory is short, before the system begins to swap.

Between two passes, layers in host memory are released until enough memory is free again, or none is left. They are read
from the disk in every later pass, so the text stays the same and passes take longer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from specchat.engine.model import TreeModel
from specchat.engine.streaming.kept import KeptLayers
from specchat.hardware.pressure import MemoryWatch
from specchat.records.limits import NUM_READERS, READ_WINDOW_BYTES
from specchat.records.plan import LedgerItem, Plan, Stage
from specchat.units import format_bytes

# Part of the kept layers that is given back at a time, while programs wait for memory and the need is unknown.
_SHARE = 4
_GOLDEN = 0.6180339887498949


class MemoryRelief:
    """Watches for a lack of memory, and gives back layers of one model.

    Args:
        model: model whose layers are given back.
        watch: tells whether memory is short; None gives nothing back.

    Attributes:
        layers: layers given back so far.
        num_bytes: bytes of these layers.
    """

    def __init__(self, model: TreeModel, watch: MemoryWatch | None) -> None:
        self._model = model
        self._watch = watch
        self._news: str | None = None
        self.layers: set[int] = set()
        self.num_bytes = 0

    def relieve(self, plan: Plan) -> Plan:
        """Give layers back if memory is short, and return the plan with the places of all layers; between passes only.

        Args:
            plan: plan of the engine so far.
        """
        kept = self._model.kept
        num_kept_bytes = sum(nbytes for group in kept.groups for nbytes in group.values())
        shortage = self._watch.look() if self._watch is not None and num_kept_bytes else None
        if shortage is None:
            return plan
        wanted = -(-num_kept_bytes // _SHARE) if shortage.missing_bytes is None else shortage.missing_bytes
        given = choose_layers(kept, wanted)
        if not given:
            return plan
        self._model.give_back(given)
        num_bytes = sum(given.values())
        if not self.layers:
            self._news = (
                f"memory is short ({shortage.reason}): gave {_layers(len(given))} ({format_bytes(num_bytes)}) back to "
                "the system, which are read from the disk from now on; the text stays the same, answers take longer"
            )
        self.layers |= given.keys()
        self.num_bytes += num_bytes
        return plan_without(plan, given, kept)

    def take_news(self) -> str | None:
        """Return the one warning about layers given back, in one line, once; else None."""
        news, self._news = self._news, None
        return news


def choose_layers(kept: KeptLayers, wanted: int) -> dict[int, int]:
    """Return the bytes of the layers to give back, by index; empty if that would free nothing.

    Args:
        kept: layers that can be given back.
        wanted: bytes to free, less those of new slots; all layers are chosen if they are too few.
    """
    chosen: dict[int, int] = {}
    for group in kept.groups:
        for index in _spread(group):
            if _freed(kept, chosen) >= wanted:
                return chosen
            chosen[index] = group[index]
    return chosen if _freed(kept, chosen) > 0 else {}


def plan_without(plan: Plan, given: Mapping[int, int], kept: KeptLayers) -> Plan:
    """Return the plan of an engine that has given layers back.

    Args:
        plan: plan before.
        given: bytes that the layers given back have taken, by index.
        kept: layers that are still kept, and the slots.
    """
    before, on_cpu = plan.placement, plan.work.device == "cpu"
    num_slots, slot_bytes = kept.num_slots(()), kept.slot_bytes(())
    from_device = sum(nbytes for index, nbytes in given.items() if index in before.resident)
    from_host = sum(nbytes for index, nbytes in given.items() if index in before.in_ram)
    more = sum(map(before.more_bytes, given))
    placement = replace(
        before,
        resident=tuple(index for index in before.resident if index not in given),
        in_ram=tuple(index for index in before.in_ram if index not in given),
        slots=num_slots if on_cpu else before.slots,
        expanded=tuple(index for index in before.expanded if index not in given),
        expanded_bytes=before.expanded_bytes - more,
    )
    host = {"layers in the page cache" if on_cpu else "pinned layers": -from_host}
    host_slots = 0 if on_cpu else slot_bytes - _bytes_of(plan.host_ledger, "pinned slots")
    if not on_cpu:
        host["pinned slots"] = host_slots
    host["reading"] = NUM_READERS * READ_WINDOW_BYTES - _bytes_of(plan.host_ledger, "reading")
    device = {"resident layers": -from_device}
    if on_cpu:
        device["slots"] = slot_bytes - _bytes_of(plan.ledger, "slots")
    return replace(
        plan,
        placement=placement,
        ledger=_changed(plan.ledger, device),
        host_ledger=_changed(plan.host_ledger, host),
        host_bytes=0 if on_cpu else plan.host_bytes - from_host + host_slots,
        streamed_bytes_per_step=plan.streamed_bytes_per_step + from_device - more,
        stages=tuple(_stage_without(stage, given if on_cpu else ()) for stage in plan.stages),
    )


def _stage_without(stage: Stage, given: Collection[int]) -> Stage:
    return replace(stage, resident=tuple(index for index in stage.resident if index not in given))


def _freed(kept: KeptLayers, given: Mapping[int, int]) -> int:
    """Return the bytes that are free after layers were given back and slots for them were made."""
    return sum(given.values()) - (kept.slot_bytes(given.keys()) - kept.slot_bytes(()))


def _spread(layers: Iterable[int]) -> list[int]:
    """Return layers in an order whose every beginning is spread evenly: the others are computed while these are read.

    Source: multiples of the golden ratio, the additive sequence of lowest discrepancy.
    """
    indices = list(layers)
    ranks = sorted(range(len(indices)), key=lambda rank: (rank + 1) * _GOLDEN % 1)
    return [indices[rank] for rank in ranks]


def _bytes_of(ledger: Sequence[LedgerItem], name: str) -> int:
    return sum(item.bytes for item in ledger if item.item == name)


def _changed(ledger: Sequence[LedgerItem], changes: Mapping[str, int]) -> tuple[LedgerItem, ...]:
    """Return a ledger with bytes added to items; items without bytes are left out. An empty ledger stays empty."""
    if not ledger:
        return ()
    names = dict.fromkeys([*(item.item for item in ledger), *changes])
    items = [LedgerItem(name, _bytes_of(ledger, name) + changes.get(name, 0)) for name in names]
    return tuple(item for item in items if item.bytes)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
