"""Answers interrupted anywhere continue as if never interrupted; slots never provide wrong bytes."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.engines import NOTHING, make_plan, random_prompt, write
from support.interrupts import CancelAt
from support.loading import load_engine, load_model
from support.threads import at_most, watched_threads
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.model import PassCancelledError
from specchat.engine.streaming.cpu import ThreadStreamer
from specchat.engine.streaming.slots import SlotQueue
from specchat.records.generation import Sampling, Step
from specchat.records.model import ModelSource

NUM_TOKENS = 24
PROMPT = random_prompt(40, VOCAB)
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=8),
}


@dataclass
class Pair:
    """A mostly streamed target and a draft that is often right; all tests share one engine."""

    target: ModelSource
    draft: ModelSource
    engine: Engine = field(init=False)
    fresh_texts: dict[tuple[tuple[int, ...], Sampling, int], list[int]] = field(default_factory=dict)

    def load(self) -> Engine:
        plan = make_plan(self.target, self.draft, num_layers=4, resident=(2,), tree_budget=12, chunk_rows=16)
        return load_engine(plan, self.target, self.draft)

    def fresh_text(self, prompt: list[int], sampling: Sampling, num_tokens: int = NUM_TOKENS) -> list[int]:
        """Return the text of a newly loaded engine."""
        key = (tuple(prompt), sampling, num_tokens)
        if key not in self.fresh_texts:
            with self.load() as engine:
                self.fresh_texts[key] = write(engine, prompt, sampling, num_tokens)[0]
        return self.fresh_texts[key]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    model = random_model(make_config("mistral"))
    pair = Pair(save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft"))
    with pair.load() as engine:
        pair.engine = engine
        assert all(len(set(pair.fresh_text(PROMPT, s))) > NUM_TOKENS / 2 for s in SAMPLINGS.values()), "a dull text"
        yield pair


def steps_of(engine: Engine, context: list[int], sampling: Sampling, left: int, cancel: threading.Event) -> list[Step]:
    return list(engine.generate(context, sampling, stop_ids=NOTHING, max_tokens=left, cancel=cancel))


def write_interrupted(
    engine: Engine, sampling: Sampling, cancel_points: list[int], num_tokens: int = NUM_TOKENS
) -> list[int]:
    """Return the answer to PROMPT, cancelled and continued at each of the given checks of the event."""
    context = list(PROMPT)
    for n in [*cancel_points, float("inf")]:
        left = len(PROMPT) + num_tokens - len(context)
        steps = steps_of(engine, context, sampling, left, CancelAt(n))
        check_cached(steps, context)
        context += [token for step in steps for token in step.token_ids]
        if steps[-1].finish_reason != "interrupt":
            assert steps[-1].finish_reason == "length"
            break
        assert steps[-1].token_ids == () and all(step.finish_reason is None for step in steps[:-1])
        if n == 1:
            assert len(steps) == 1
    return context[len(PROMPT) :]


def check_cached(steps: list[Step], context: list[int]) -> None:
    """Check that committed work is never lost: a step computes only the tokens since the last finished step."""
    length = len(context)
    for i, step in enumerate(steps):
        if step.token_ids:
            assert step.cached_rows + step.new_rows == length
            assert step.new_rows == 1 or i == 0
        length += len(step.token_ids)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_cancelling_at_every_check_of_the_first_steps(pair: Pair, name: str):
    """Cancel while drafting, at every layer of the first pass over a long prompt, and in the second step."""
    sampling, cancel, num_tokens = SAMPLINGS[name], CancelAt(), 12
    expected = pair.fresh_text(PROMPT, sampling)[:num_tokens]
    steps = pair.engine.generate(PROMPT, sampling, stop_ids=NOTHING, max_tokens=NUM_TOKENS, cancel=cancel)
    next(steps), next(steps)
    for n in range(1, cancel.looks + 2, 1 if sampling.greedy else 9):
        pair.engine.truncate(0)
        assert write_interrupted(pair.engine, sampling, [n], num_tokens) == expected, n
    assert cancel.looks > 20


@given(
    name=st.sampled_from(sorted(SAMPLINGS)),
    cancel_points=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    start=st.sampled_from([0, 17, 40]),
)
@settings(deadline=None, max_examples=25)
def test_cancelling_anywhere_and_continuing(pair: Pair, name: str, cancel_points: list[int], start: int):
    pair.engine.truncate(start)
    text = write_interrupted(pair.engine, SAMPLINGS[name], cancel_points)
    assert text == pair.fresh_text(PROMPT, SAMPLINGS[name])


def test_a_set_event_stops_before_anything_is_computed(pair: Pair):
    pair.engine.truncate(0)
    cancel = threading.Event()
    cancel.set()
    (step,) = steps_of(pair.engine, PROMPT, SAMPLINGS["greedy"], NUM_TOKENS, cancel)
    assert step.finish_reason == "interrupt" and step.token_ids == () and step.streamed_bytes == 0


def test_cancelling_from_another_thread(pair: Pair):
    """Cancel at arbitrary moments, as Ctrl-C does."""
    expected = pair.fresh_text(PROMPT, SAMPLINGS["sampled"])
    for delay_s in (0.0, 0.003, 0.01, 0.02, 0.04):
        pair.engine.truncate(0)
        cancel = threading.Event()
        timer = threading.Timer(delay_s, cancel.set)
        timer.start()
        steps = steps_of(pair.engine, PROMPT, SAMPLINGS["sampled"], NUM_TOKENS, cancel)
        timer.join()
        text = [token for step in steps for token in step.token_ids]
        left = NUM_TOKENS - len(text)
        if left:
            assert steps[-1].finish_reason == "interrupt"
            text += write(pair.engine, PROMPT + text, SAMPLINGS["sampled"], left)[0]
        assert text == expected


@given(name=st.sampled_from(sorted(SAMPLINGS)), num_steps=st.lists(st.integers(1, 3), max_size=4))
@settings(deadline=None, max_examples=12)
def test_closing_the_iterator_early_and_continuing(pair: Pair, name: str, num_steps: list[int]):
    pair.engine.truncate(0)
    context, end = list(PROMPT), len(PROMPT) + NUM_TOKENS
    for count in num_steps:
        if len(context) < end:
            steps = pair.engine.generate(context, SAMPLINGS[name], stop_ids=NOTHING, max_tokens=end - len(context))
            for step in itertools.islice(steps, count):
                context += step.token_ids
            steps.close()  # type: ignore[attr-defined]
    if len(context) < end:
        context += write(pair.engine, context, SAMPLINGS[name], end - len(context))[0]
    assert context[len(PROMPT) :] == pair.fresh_text(PROMPT, SAMPLINGS[name])


def test_a_cancelled_pass_leaves_the_cache_as_it_was(pair: Pair):
    """Callers of `TreeModel.forward` need not clean up after a cancelled pass."""
    model = load_model(
        pair.target,
        dtype=torch.float32,
        device=torch.device("cpu"),
        resident=(2,),
        num_slots=2,
        cache_rows=96,
        chunk_rows=16,
    )
    try:
        model.append(PROMPT[:25])
        expected = model.append(PROMPT[25:])
        for layer in range(4):
            model.cache.truncate(0, 25)
            with pytest.raises(PassCancelledError):
                model.append(random_prompt(30, VOCAB, seed=9), CancelAt(layer + 1))
            assert [kv.length for kv in model.cache.layers] == [25] * 4
            assert torch.equal(model.append(PROMPT[25:]), expected)
    finally:
        model.close()


class RaisingIds(frozenset[int]):
    """Stop tokens whose n-th lookup, in the middle of the walk, raises an error."""

    left = 3

    def __contains__(self, token: object) -> bool:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return False


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("lookup", [1, 2, 3, 5])
def test_an_exception_between_pass_and_commit(pair: Pair, lookup: int, goes_on: bool):
    """Rows of a pass without a committed result must not count as committed, for example after a second Ctrl-C."""
    sampling = SAMPLINGS["greedy"]
    pair.engine.truncate(0)
    stop_ids = RaisingIds()
    stop_ids.left = lookup
    context = list(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        for step in pair.engine.generate(context, sampling, stop_ids=stop_ids, max_tokens=NUM_TOKENS):
            context += step.token_ids
    if not goes_on:  # something else is asked instead, behind what is committed
        context = [*context[:-1], *random_prompt(15, VOCAB, seed=5)]
    assert write(pair.engine, context, sampling, 12)[0] == pair.fresh_text(context, sampling, 12)


# --- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("length", [0, 25, 39, 40, 52, 1000])
def test_truncating_and_continuing(pair: Pair, name: str, length: int):
    """Truncate within the prompt, at its end, within the answer, or not at all."""
    sampling = SAMPLINGS[name]
    pair.engine.truncate(0)
    text, _ = write(pair.engine, PROMPT, sampling, NUM_TOKENS)
    held = len(PROMPT) + len(text) - 1  # the last token is drawn but not computed
    pair.engine.truncate(length)
    prompt = [*PROMPT, *text[:14]]
    again, steps = write(pair.engine, prompt, sampling, 10)
    assert again == pair.fresh_text(PROMPT, sampling)[14:]
    assert steps[0].cached_rows == min(length, held, len(prompt) - 1)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_second_turn_reuses_the_common_prefix(pair: Pair, name: str):
    sampling = SAMPLINGS[name]
    pair.engine.truncate(0)
    answer, steps = write(pair.engine, PROMPT, sampling, NUM_TOKENS)
    assert steps[0].cached_rows == 0 and steps[0].new_rows == len(PROMPT)

    question = random_prompt(12, VOCAB, seed=2)
    second = [*PROMPT, *answer, *question]
    text, steps = write(pair.engine, second, sampling, NUM_TOKENS)
    assert text == pair.fresh_text(second, sampling)
    assert steps[0].cached_rows == len(PROMPT) + len(answer) - 1
    assert steps[0].new_rows == len(question) + 1
    assert len(steps) < NUM_TOKENS  # the draft's cache went along

    # the template rewrote the end of the first answer: only what is common is kept
    edited = [*PROMPT, *answer[:10], (answer[10] + 1) % VOCAB, *question]
    text, steps = write(pair.engine, edited, sampling, NUM_TOKENS)
    assert text == pair.fresh_text(edited, sampling)
    assert steps[0].cached_rows == len(PROMPT) + 10

    # the same again: the last token is always computed anew, as its scores are not kept
    text, steps = write(pair.engine, edited, sampling, NUM_TOKENS)
    assert text == pair.fresh_text(edited, sampling)
    assert steps[0].cached_rows == len(edited) - 1

    # a chat of its own
    other = random_prompt(9, VOCAB, seed=3)
    text, steps = write(pair.engine, other, sampling, NUM_TOKENS)
    assert text == pair.fresh_text(other, sampling)
    assert steps[0].cached_rows == 0


def test_seeds_do_not_leak_between_answers(pair: Pair):
    """Neither the noise nor the tree of another seed affects the next answer."""
    one, two = SAMPLINGS["sampled"], replace(SAMPLINGS["sampled"], seed=9)
    texts = [write(pair.engine, PROMPT, sampling, NUM_TOKENS)[0] for sampling in (one, two, one)]
    assert texts[0] == texts[2] == pair.fresh_text(PROMPT, one)
    assert texts[1] == pair.fresh_text(PROMPT, two) != texts[0]


# --- the reader threads ----------------------------------------------------------------------------------------------

NUM_LAYERS = 7


def make_layers() -> list[torch.nn.Module]:
    """Return layers of different sizes: after a small layer, the slot's last bytes belong to another layer."""
    return [torch.nn.Linear(17 + index % 3, 50 * (1 + index % 2)) for index in range(NUM_LAYERS)]


class Disk:
    """A layer reader that writes the layer's index into every byte, in tasks with pauses, on one or more threads."""

    def __init__(self, seed: int, pause_s: float = 4e-4, num_workers: int = 1) -> None:
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self.num_workers = num_workers
        self.closed = 0

    def chunks(self, index: int, slot: torch.Tensor) -> list[Callable[[], None]]:
        return [partial(self.fill, index, piece) for piece in slot.chunk(3)]

    def fill(self, index: int, piece: torch.Tensor) -> None:
        assert threading.get_ident() != threading.main_thread().ident
        piece.fill_(255)  # what is under way must never be looked at
        self._pause()
        piece.fill_(index)

    def close(self) -> None:
        self.closed += 1

    def _pause(self) -> None:
        if self._random.random() < 0.5:
            time.sleep(self._random.random() * self._pause_s)


def holds(layer: torch.nn.Module, index: int) -> bool:
    return all(bool((p.data.view(torch.uint8) == index).all()) for p in layer.parameters())


@contextmanager
def streaming(
    disk: Disk, streamed: list[int], num_slots: int
) -> Iterator[tuple[ThreadStreamer, list[torch.nn.Module]]]:
    layers = make_layers()
    streamer = ThreadStreamer(layers, streamed, num_slots, disk)
    try:
        with at_most(60):
            yield streamer, layers
    finally:
        streamer.close()


@given(
    streamed=st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1).map(sorted),
    num_slots=st.integers(1, 4),
    passes=st.lists(st.tuples(st.integers(0, NUM_LAYERS), st.booleans(), st.booleans()), min_size=1, max_size=10),
    num_workers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # too slow to shrink
def test_slots_never_hold_wrong_bytes(streamed: list[int], num_slots: int, passes: list, num_workers: int, seed: int):
    """Passes complete, stop before a layer, or stop while a layer is in use; the disk is slow and irregular."""
    pauses = random.Random(seed)
    with streaming(Disk(seed, num_workers=num_workers), streamed, num_slots) as (streamer, layers):
        for stop_at, while_in_use, waits in passes:
            for j, index in enumerate(streamed):
                if j == stop_at and not while_in_use:
                    streamer.restart()
                    break
                streamer.acquire(index)
                assert holds(layers[index], index)
                if waits:
                    time.sleep(pauses.random() * 1e-3)
                    assert holds(layers[index], index), "a slot was filled while in use"
                if j == stop_at:
                    streamer.restart()
                    break
                streamer.release(index)


def test_first_layers_of_the_next_pass_are_read_ahead():
    """One layer per slot is read while the draft grows its tree."""
    disk = Disk(0, pause_s=0)
    with streaming(disk, [0, 2, 3, 5], 2) as (streamer, layers):
        for index in (0, 2, 3, 5):
            streamer.acquire(index)
            streamer.release(index)
        wait_until(lambda: streamer._queue._holds == [0, 1])
        assert holds(layers[0], 0) and holds(layers[2], 2)
        before = streamer.counters()
        streamer.acquire(0)
        after = streamer.counters()
        assert after.num_bytes - before.num_bytes >= sum(p.nbytes for p in layers[0].parameters())
        assert after.wait_s == before.wait_s


class AwaitedDisk(Disk):
    """A disk that needs one second from the first wait for a layer, and the clock that measures this second."""

    def __init__(self) -> None:
        super().__init__(0)
        self._waiting = threading.current_thread()
        self._is_awaited = threading.Event()
        self._now = 100.0

    def perf_counter(self) -> float:
        if threading.current_thread() is self._waiting:  # readers look at the clock, too
            self._is_awaited.set()
        return self._now

    def _pause(self) -> None:
        assert self._is_awaited.wait(60)
        self._now = 101.0


def test_waiting_for_the_disk_is_counted(monkeypatch: pytest.MonkeyPatch):
    disk = AwaitedDisk()
    monkeypatch.setattr("specchat.engine.streaming.slots.time", disk)
    with streaming(disk, [0, 1, 2], 1) as (streamer, _):
        streamer.acquire(0)
        assert streamer.counters().wait_s == 1.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class BrokenDisk(Disk):
    """A disk that fails the second time one task of one layer runs."""

    def __init__(self, broken_layer: int, broken_piece: int) -> None:
        super().__init__(0)
        self._broken = broken_layer, broken_piece
        self._reads = 0

    def chunks(self, index: int, slot: torch.Tensor) -> list[Callable[[], None]]:
        pieces = enumerate(slot.chunk(3))
        return [partial(self.fill_or_fail, index, piece, (index, i) == self._broken) for i, piece in pieces]

    def fill_or_fail(self, index: int, piece: torch.Tensor, broken: bool) -> None:
        self._reads += broken
        if broken and self._reads == 2:
            piece.fill_(255)
            raise OSError("the disk is gone")
        self.fill(index, piece)


@pytest.mark.parametrize("broken_piece", [0, 1, 2])
@pytest.mark.parametrize("broken_layer", [1, 3, 5])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_disk_errors_are_raised_by_acquire(num_slots: int, broken_layer: int, broken_piece: int):
    """The error is raised at the broken layer or before; the broken layer is never provided."""
    disk = BrokenDisk(broken_layer, broken_piece)
    with watched_threads() as threads, streaming(disk, [1, 3, 4, 5], num_slots) as (streamer, layers):
        for index in (1, 3, 4, 5):
            streamer.acquire(index)
            streamer.release(index)
        with pytest.raises(OSError, match="the disk is gone"):
            for index in (1, 3, 4, 5):
                streamer.acquire(index)
                assert holds(layers[index], index)
                streamer.release(index)
        streamer.restart()
        with pytest.raises(OSError, match="the disk is gone"):
            streamer.acquire(1)
    assert not threads.num_running and disk.closed == 1


@pytest.mark.parametrize("moment", ["at once", "all slots full", "in use", "waiting"])
def test_closing_a_streamer_ends_its_thread(moment: str):
    disk = Disk(1)
    layers = make_layers()
    with watched_threads() as threads:
        streamer = ThreadStreamer(layers, [0, 1, 2], 2, disk)
    assert threads.num_running == 1
    if moment == "all slots full":
        wait_until(lambda: holds(layers[1], 1))
    elif moment != "at once":
        streamer.acquire(0)
        if moment == "waiting":
            streamer.release(0)
    streamer.close()
    assert not threads.num_running and disk.closed == 1


def test_closing_an_engine_leaves_no_thread(pair: Pair):
    with watched_threads() as threads, pair.load() as engine:
        steps = engine.generate(PROMPT, SAMPLINGS["greedy"], stop_ids=NOTHING, max_tokens=NUM_TOKENS)
        next(steps)
        assert threads.num_running
    assert not threads.num_running


@pytest.mark.parametrize("failing", [1, 2, 7, 20])
def test_a_worker_that_fails_to_notify_is_noticed(failing: int, monkeypatch: pytest.MonkeyPatch):
    """The worker runs out of memory while it reports that a task has ended."""
    count, end = itertools.count(1), SlotQueue._end

    def fails(queue: SlotQueue, epoch: int, j: int) -> None:
        if next(count) >= failing:
            raise MemoryError
        end(queue, epoch, j)

    monkeypatch.setattr(SlotQueue, "_end", fails)
    monkeypatch.setattr("specchat.engine.streaming.slots._LOOK_S", 0.01)
    disk = Disk(0, num_workers=2)
    disk._pause = lambda: time.sleep(0.01)  # type: ignore[method-assign]  # by then, the layer is waited for
    with watched_threads() as threads, streaming(disk, [0, 2, 3, 5], 2) as (streamer, layers):
        with pytest.raises(MemoryError):
            for index in [0, 2, 3, 5] * 3:
                streamer.acquire(index)
                assert holds(layers[index], index)
                streamer.release(index)
        streamer.restart()
        with pytest.raises(MemoryError):
            streamer.acquire(0)
    assert not threads.num_running and disk.closed == 1
