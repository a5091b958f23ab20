"""Deal layers to several devices, so that their links end together.

While layers stream, devices take layers in turn ("woven"). A device that had a range of layers could prefetch no more
than its slots hold, while the other ranges are computed: measured with two links of equal rate in one process, ranges
take 0.75 of one link's time, and woven layers half of it. Where nothing streams, each device has one range, which takes
the fewest hops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from specchat.planner.placement import Share, interleaved

_STEPS = (8, 4, 2, 1)
_MOST_COMBINED = 3


@dataclass(frozen=True)
class Room:
    """Memory of one device for layers.

    Attributes:
        num_bytes: bytes for resident layers, slots and caches.
        slots: most staging buffers that streaming takes, each as large as a layer.
        layer_bytes: bytes of a layer.
        cache_bytes: bytes of a layer's caches, which lie on the device whether the layer stays there or streams.
        streams: whether the device may stream layers.
    """

    num_bytes: int
    slots: int
    layer_bytes: int = 1
    cache_bytes: int = 0
    streams: bool = True

    def holds(self, share: Share) -> bool:
        """Return whether a share fits."""
        if share.num_streamed and not self.streams:
            return False
        held = share.num_resident + min(self.slots, share.num_streamed)
        return held * self.layer_bytes + share.num_layers * self.cache_bytes <= self.num_bytes


@dataclass(frozen=True)
class Deal:
    """The owner of each layer, and the layers that stay in the memory of their owner."""

    owner: tuple[int, ...]
    resident: tuple[int, ...]

    @property
    def num_hops(self) -> int:
        """Number of times that rows change the device in a pass, which begins and ends on the first one."""
        return sum(before != after for before, after in pairwise((0, *self.owner, 0)))


def deal(shares: Sequence[Share]) -> Deal:
    """Return the owners of layers: streamed ones in the order of their arrival, resident ones spread between them.

    Args:
        shares: numbers of layers of each device.
    """
    num_layers = sum(share.num_layers for share in shares)
    num_resident = sum(share.num_resident for share in shares)
    resident = interleaved(num_resident, num_layers)
    stays = set(resident)
    arriving = sorted(
        ((turn + 1) / share.num_streamed, number)
        for number, share in enumerate(shares)
        for turn in range(share.num_streamed)
    )
    streamed = iter([number for _, number in arriving])
    left = [share.num_resident for share in shares]
    owner = list[int]()
    for layer in range(num_layers):
        owner.append(_with_room(left, owner) if layer in stays else next(streamed))
        left[owner[-1]] -= layer in stays
    return Deal(tuple(owner), resident)


def _with_room(left: Sequence[int], owner: Sequence[int]) -> int:
    """Return the device of the next resident layer: that of the layer before, so that rows stay, or the first one."""
    before = owner[-1] if owner else 0
    return before if left[before] else next(number for number, count in enumerate(left) if count)


def best_shares(
    num_layers: int, rooms: Sequence[Room], links: Sequence[float], seconds: Callable[[Sequence[Share]], float]
) -> tuple[Share, ...] | None:
    """Return the shares that take least time; None if the layers do not fit.

    Every choice of the devices that stream is tried, or those with the fastest links if there are many devices. A local
    search follows.

    Args:
        num_layers: number of layers to deal.
        rooms: limits of each device.
        links: rate of the link of each device, in any unit.
        seconds: function from shares to the seconds of a pass.
    """

    def cost(shares: Sequence[Share]) -> tuple[float, float]:
        linked = sum(share.num_streamed / link for share, link in zip(shares, links, strict=True) if share.num_streamed)
        return round(seconds(shares), 9), linked  # of equal times, the one from which all links can go on to improve

    by_link = sorted((number for number, room in enumerate(rooms) if room.streams), key=lambda each: -links[each])
    counts = range(len(by_link) + 1)
    chosen = [by_link[:count] for count in counts]
    if len(by_link) <= _MOST_COMBINED:
        chosen = [list(each) for count in counts for each in combinations(by_link, count)]
    found = list[tuple[Share, ...]]()
    for streaming in chosen:
        limits = [replace(room, streams=number in streaming) for number, room in enumerate(rooms)]
        if (first := first_shares(num_layers, limits, links)) is not None:
            found.append(_improved(first, limits, cost))
    return min(found, key=cost, default=None)


def first_shares(num_layers: int, rooms: Sequence[Room], links: Sequence[float]) -> tuple[Share, ...] | None:
    """Return shares that fit: as many resident layers as there is room for, the others so that all links end together.

    Args:
        num_layers: number of layers to deal.
        rooms: limits of each device.
        links: rate of the link of each device, in any unit.
    """
    left, filled = num_layers, list[Share]()
    for room in rooms:
        count = min(left, max(room.num_bytes, 0) // (room.layer_bytes + room.cache_bytes))
        filled.append(Share(count))
        left -= count
    if not left:
        return tuple(filled)
    shares = [Share() if room.streams else share for room, share in zip(rooms, filled, strict=True)]
    for _ in range(num_layers - sum(share.num_layers for share in shares)):
        more = {number: _with_one_more(share) for number, share in enumerate(shares)}
        fits = [number for number, share in more.items() if rooms[number].holds(share)]
        if not fits:
            return None
        number = min(fits, key=lambda each: more[each].num_streamed / links[each])
        shares[number] = more[number]
    for number, room in enumerate(rooms):
        while shares[number].num_streamed and room.holds(kept := _with_one_kept(shares[number])):
            shares[number] = kept
    return tuple(shares)


def _with_one_more(share: Share) -> Share:
    return Share(share.num_resident, share.num_streamed + 1)


def _with_one_kept(share: Share) -> Share:
    return Share(share.num_resident + 1, share.num_streamed - 1)


def _improved(
    shares: tuple[Share, ...], rooms: Sequence[Room], cost: Callable[[Sequence[Share]], tuple[float, float]]
) -> tuple[Share, ...]:
    """Return better shares by moving few layers at a time, as long as that helps."""
    least = cost(shares)
    for step in _STEPS:
        tried: Iterator[tuple[Share, ...]] = _neighbours(shares, rooms, step)
        while (other := next(tried, None)) is not None:
            if (found := cost(other)) < least:
                shares, least = other, found
                tried = _neighbours(shares, rooms, step)
    return shares


def _neighbours(shares: tuple[Share, ...], rooms: Sequence[Room], step: int) -> Iterator[tuple[Share, ...]]:
    """Yield shares in which `step` layers have another place, and that fit."""
    places = [(number, name) for number in range(len(shares)) for name in ("num_resident", "num_streamed")]
    for source, name in places:
        count = min(step, getattr(shares[source], name))
        if not count:
            continue
        for target, other in places:
            if (target, other) == (source, name):
                continue
            changed = list(shares)
            changed[source] = replace(changed[source], **{name: getattr(changed[source], name) - count})
            changed[target] = replace(changed[target], **{other: getattr(changed[target], other) + count})
            if all(rooms[number].holds(changed[number]) for number in {source, target}):
                yield tuple(changed)
