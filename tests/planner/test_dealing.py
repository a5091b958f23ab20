"""Layers dealt to several devices: everything is dealt, nothing exceeds its room, and links end together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specchat.planner.dealing import Deal, Room, best_shares, deal, first_shares
from specchat.planner.placement import Share


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4))
def test_every_layer_has_an_owner_and_every_device_its_numbers(counts: list[tuple[int, int]]):
    shares = [Share(*each) for each in counts]
    found = deal(shares)
    assert len(found.owner) == sum(share.num_layers for share in shares)
    for number, share in enumerate(shares):
        owned = {layer for layer, owner in enumerate(found.owner) if owner == number}
        assert len(owned & set(found.resident)) == share.num_resident
        assert len(owned - set(found.resident)) == share.num_streamed


@pytest.mark.parametrize("num_streamed", [(8, 8), (4, 4, 4, 4), (12, 3), (9, 3, 4)])
def test_streamed_layers_come_in_the_order_of_their_arrival(num_streamed: tuple[int, ...]):
    """At any layer, each device has had its part of the layers, up to one or so."""
    found = deal([Share(0, count) for count in num_streamed])
    total = sum(num_streamed)
    for layer in range(total + 1):
        for number, count in enumerate(num_streamed):
            assert abs(found.owner[:layer].count(number) - layer * count / total) < 1.5


def test_resident_layers_are_ranges():
    found = deal([Share(5), Share(3)])
    assert found == Deal((0,) * 5 + (1,) * 3, tuple(range(8))) and found.num_hops == 2
    assert deal([Share(4)]).num_hops == 0


def test_the_last_layer_streams_so_that_no_link_idles():
    found = deal([Share(3, 4), Share(5, 4)])
    assert found.owner[-1] in (0, 1) and len(found.owner) - 1 not in found.resident


@pytest.mark.parametrize(
    ("rooms", "links", "expected"),
    [
        ([Room(4, 2), Room(4, 2)], [1, 1], [Share(2, 6), Share(2, 6)]),
        ([Room(4, 2), Room(4, 2)], [5, 1], [Share(2, 10), Share(2, 2)]),
        ([Room(12, 2), Room(8, 2)], [1, 1], [Share(12), Share(4)]),
        ([Room(1, 2), Room(4, 2)], [1, 1], [Share(1), Share(2, 13)]),
        ([Room(4, 2), Room(6, 2, streams=False)], [1, 0], [Share(2, 8), Share(6)]),
        ([Room(39, 2, 4, 1), Room(39, 2, 4, 1)], [1, 1], [Share(5, 3), Share(5, 3)]),
    ],
)
def test_links_end_together_where_only_links_count(rooms: list[Room], links: list[float], expected: list[Share]):
    """Caches of streamed layers take memory, too: 4 bytes for each of 8 layers or slots, and 1 for each of 8 layers."""

    def seconds(shares) -> float:
        return max(share.num_streamed / link for share, link in zip(shares, links, strict=True) if share.num_streamed)

    if any(share.num_streamed for share in expected):
        found = best_shares(16, rooms, links, seconds)
        assert found is not None and seconds(found) == seconds(expected)
        assert all(room.holds(share) for room, share in zip(rooms, found, strict=True))
    else:
        assert first_shares(16, rooms, links) == tuple(expected)


def test_nothing_fits_without_room_for_slots():
    assert first_shares(16, [Room(1, 2), Room(4, 2, streams=False)], [1, 1]) is None
    assert best_shares(16, [Room(1, 2)], [1], lambda _: 0.0) is None


@pytest.mark.parametrize("rooms", [(6, 3), (3, 3), (2, 7), (10, 2)])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (4.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("computing", [(0.0, 0.0), (0.5, 2.0), (2.0, 0.1)])
def test_the_search_finds_what_trying_everything_finds(
    rooms: tuple[int, int], rates: tuple[float, float], computing: tuple[float, float]
):
    limits = [Room(count, 2) for count in rooms]

    def seconds(shares) -> float:
        links = max(share.num_streamed / rate for share, rate in zip(shares, rates, strict=True))
        return max(links, sum(share.num_layers * each for share, each in zip(shares, computing, strict=True)))

    every = itertools.product(range(11), repeat=3)
    tried = [(Share(a, b), Share(c, 10 - a - b - c)) for a, b, c in every if a + b + c <= 10]
    fitting = [each for each in tried if all(room.holds(s) for room, s in zip(limits, each, strict=True))]
    found = best_shares(10, limits, rates, seconds)
    assert found is not None and seconds(found) == pytest.approx(min(map(seconds, fitting)), rel=0.02)
