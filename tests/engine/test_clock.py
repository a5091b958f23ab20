"""The clock of a step: which part of drafting makes the step longer, and which part reads of layers hide."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specchat.chat.answer import Timings
from specchat.engine.stats import StepClock
from specchat.engine.streaming.base import LayerStreamer, NoStreamer, StreamCounters, total
from specchat.engine.streaming.slots import SlotQueue
from specchat.engine.tree import TokenTree
from specchat.records.generation import Step

CPU = torch.device("cpu")
SECONDS = st.floats(0, 10)


class World(NoStreamer):
    """A streamer and its clock, both of which move only when a test says so."""

    def __init__(self, num_links: int = 1) -> None:
        self.now = 0.0
        self.wait_s = 0.0
        self.links = [0.0] * num_links

    def counters(self) -> StreamCounters:
        each = tuple(StreamCounters(0, 0.0, link_s=busy) for busy in self.links)
        counted = replace(total(each), wait_s=self.wait_s)
        return replace(counted, by_device=each) if len(each) > 1 else counted

    def spend(self, seconds: float, *busy: float, wait_s: float = 0.0) -> None:
        """Let time pass, in which links are busy for a part of it."""
        self.now += seconds
        self.wait_s += wait_s
        self.links = [link + own for link, own in zip(self.links, busy or (0.0,) * len(self.links), strict=True)]

    def step(self, drafting: Callable[[], None], passing: Callable[[], None]) -> Step:
        with patch.object(time, "perf_counter", lambda: self.now):
            clock = StepClock(self, 1, CPU)
            with clock.drafting():
                drafting()
            with clock.verifying():
                passing()
            clock.stop()
            return clock.step((1,), None, 1, 0, TokenTree(), ())


@pytest.mark.parametrize(
    ("drafting_s", "busy_s", "wait_s", "hidden_s"),
    [
        (0.5, 0.5, 2.0, 0.5),  # the link was never idle, and the pass waited: without drafting it waits for longer
        (0.5, 0.2, 2.0, 0.2),  # all slots were full after a while
        (0.5, 0.5, 0.0, 0.0),  # the pass never waited: it could have begun earlier
        (0.5, 0.5, 0.1, 0.1),
        (0.5, 0.0, 2.0, 0.0),  # nothing was read: slots filled before, or layers that are mapped
    ],
)
def test_reads_hide_drafting_if_the_pass_waits_for_them(
    drafting_s: float, busy_s: float, wait_s: float, hidden_s: float
):
    world = World()
    step = world.step(lambda: world.spend(drafting_s, busy_s), lambda: world.spend(3.0, 2.5, wait_s=wait_s))
    assert (step.draft_s, step.draft_hidden_s) == pytest.approx((drafting_s, hidden_s))
    assert step.exposed_draft_s == pytest.approx(drafting_s - hidden_s)
    assert (step.pass_s, step.stream_wait_s) == pytest.approx((drafting_s + 3.0, wait_s))


def test_reads_before_drafting_hide_nothing():
    world = World()
    world.spend(5.0, 5.0, wait_s=5.0)
    step = world.step(lambda: world.spend(0.5), lambda: world.spend(1.0, 1.0, wait_s=1.0))
    assert step.draft_hidden_s == 0.0


def test_the_busiest_of_several_links_counts_alone():
    """Two links that are busy at the same time do not hide twice as much."""
    world = World(num_links=2)
    step = world.step(lambda: world.spend(1.0, 0.3, 0.4), lambda: world.spend(2.0, 2.0, 2.0, wait_s=2.0))
    assert step.draft_hidden_s == pytest.approx(0.4)


@given(SECONDS, SECONDS, SECONDS)
def test_hidden_drafting_never_exceeds_drafting_reading_or_waiting(drafting_s: float, busy_s: float, wait_s: float):
    world = World()
    step = world.step(lambda: world.spend(drafting_s, busy_s), lambda: world.spend(wait_s, busy_s, wait_s=wait_s))
    assert 0 <= step.draft_hidden_s <= min(step.draft_s, busy_s + 1e-9, step.stream_wait_s)
    assert 0 <= step.exposed_draft_s <= step.pass_s


def test_timings_of_an_answer_leave_out_hidden_drafting():
    world = World()
    step = world.step(lambda: world.spend(0.5, 0.4), lambda: world.spend(3.0, 2.5, wait_s=1.0))
    timings = Timings.of_steps([step, step], 2, load_s=0.0, ttft_s=3.5, decode_s=3.5)
    assert (timings.draft_s, timings.verify_s, timings.stream_wait_s) == pytest.approx((0.2, 6.0, 2.0))


def test_a_model_in_memory_hides_nothing():
    clock = StepClock(NoStreamer(), 1, CPU)
    with clock.drafting():
        time.sleep(0.001)
    clock.stop()
    step = clock.step((1,), None, 1, 0, TokenTree(), ())
    assert step.exposed_draft_s == step.draft_s > 0


class Queued(LayerStreamer):
    """The streamer of a queue of slots."""

    def __init__(self, queue: SlotQueue) -> None:
        self.queue = queue

    def acquire(self, index: int) -> None:
        self.queue.take(index)

    def release(self, index: int) -> None:
        self.queue.give_back(index)

    def restart(self) -> None:
        self.queue.restart()

    def counters(self) -> StreamCounters:
        return StreamCounters(0, self.queue.wait_s, link_s=self.queue.busy_s)

    def close(self) -> None:
        self.queue.close()


def test_reads_under_way_count_before_they_end():
    """The first layer is read from before drafting until after it, so no read ends within the drafting."""
    drafted, begun = threading.Event(), threading.Event()

    def read() -> None:
        begun.set()
        assert drafted.wait(10)
        time.sleep(0.02)

    streamer = Queued(SlotQueue([[read], [lambda: None]], [False, False], 1, 1))
    try:
        assert begun.wait(10)
        clock = StepClock(streamer, 1, CPU)
        with clock.drafting():
            time.sleep(0.01)
        drafted.set()
        with clock.verifying():
            streamer.acquire(0)
            streamer.release(0)
            streamer.acquire(1)
        clock.stop()
    finally:
        drafted.set()
        streamer.close()
    step = clock.step((1,), None, 1, 0, TokenTree(), ())
    assert step.stream_wait_s >= 0.02
    assert step.draft_hidden_s == pytest.approx(step.draft_s, rel=0.1) and step.draft_s >= 0.01


def test_a_queue_without_reads_is_idle():
    queue = SlotQueue([[lambda: None]], [False], 1, 1)
    try:
        queue.take(0)
        busy = queue.busy_s
        time.sleep(0.01)
        assert queue.busy_s == busy > 0
    finally:
        queue.close()
