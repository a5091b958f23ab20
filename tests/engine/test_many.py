"""Many answers in one pass: each text is the one that its request gets alone, whatever shares the passes with it."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import make_plan, random_prompt, sequence_of, write
from support.loading import load_engine, load_model
from support.plans import changed
from support.tiny_models import ARCHITECTURES, SPECIAL, VOCAB, make_config, perturbed, random_model, save

from specchat.engine.drafting.drafter import ModelDrafter, NoDrafter
from specchat.engine.drafting.policy import AdaptivePolicy, FixedPolicy, Roots
from specchat.engine.engine import Engine
from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.sampling import Sampler
from specchat.errors import BrokenScoresError, PromptTooLongError
from specchat.records.generation import Request, Sampling, Step
from specchat.records.model import ModelSource
from specchat.records.plan import Expectation

NUM_TOKENS = 16
LENGTHS = (5, 33, 17, 40, 9, 2)
SEATS = 3
CPU = torch.device("cpu")


def sampling_of(index: int, *, drawn: bool) -> Sampling:
    if not drawn:
        return Sampling(repetition_penalty=1.0 if index % 2 else 1.2)
    return Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=index)


def make_requests(*, drawn: bool, lengths: Iterable[int] = LENGTHS, num_tokens: int = NUM_TOKENS) -> list[Request]:
    """Requests of different lengths, so that prompts join passes under way."""
    return [
        Request(
            tuple(random_prompt(length, VOCAB, seed=length)),
            sampling_of(index, drawn=drawn),
            max_tokens=num_tokens + index % 3 * 3,
        )
        for index, length in enumerate(lengths)
    ]


def answer_all(engine: Engine, requests: Iterable[Request]) -> tuple[dict[int, list[int]], list[tuple[int, Step]]]:
    """Return the texts by request, and all steps in order."""
    steps, texts = list(engine.generate_many(requests)), dict[int, list[int]]()
    for index, step in steps:
        texts[index] = texts.get(index, []) + list(step.token_ids)
    return texts, steps


def alone(engine: Engine, requests: Iterable[Request]) -> dict[int, list[int]]:
    """Return the text of each request by itself, decoded plainly from an empty cache."""
    texts = {}
    with engine.drafting_with(NoDrafter()):
        for index, each in enumerate(requests):
            engine.forget()
            assert each.max_tokens is not None
            texts[index] = write(engine, list(each.prompt_ids), each.sampling, each.max_tokens, each.stop_ids)[0]
    return texts


def passes_of(steps: Iterable[tuple[int, Step]]) -> Iterator[list[tuple[int, Step]]]:
    """Yield the steps of each pass."""
    rest = iter(steps)
    for first in rest:
        yield [first, *itertools.islice(rest, first[1].num_sharing - 1)]


# --- every architecture ----------------------------------------------------------------------------------------------

# Windows and caps, attention sinks, experts, latent attention, shared keys, another norm and layout: one of each.
DEFAULT = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "gemma4_shared")


@dataclass
class Zoo:
    """Models and the texts of each request alone, created on first use."""

    folder: Path
    pairs: dict[str, tuple[ModelSource, ModelSource]] = field(default_factory=dict)
    texts: dict[tuple[str, str, bool], dict[int, list[int]]] = field(default_factory=dict)

    def pair(self, architecture: str) -> tuple[ModelSource, ModelSource]:
        if architecture not in self.pairs:
            model, folder = random_model(make_config(architecture)), self.folder / architecture
            self.pairs[architecture] = save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft")
        return self.pairs[architecture]

    def expected(self, architecture: str, quant: str, *, drawn: bool) -> dict[int, list[int]]:
        """Return the texts of plain decoding with all layers resident, one request at a time."""
        key = architecture, quant, drawn
        if key not in self.texts:
            target, _ = self.pair(architecture)
            plan = make_plan(target, None, num_layers=make_config(architecture).num_hidden_layers)
            with load_engine(replace(plan, quant=quant), target, None) as engine:
                self.texts[key] = alone(engine, make_requests(drawn=drawn))
        return self.texts[key]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def check(zoo: Zoo, architecture: str, quant: str, *, drawn: bool, chunk_rows: int, budget: int) -> None:
    """Check the texts of six requests in three seats, with half of the layers streamed."""
    target, draft = zoo.pair(architecture)
    num_layers = make_config(architecture).num_hidden_layers
    plan = make_plan(
        target,
        draft if budget else None,
        num_layers=num_layers,
        resident=range(0, num_layers, 2),
        tree_budget=budget,
        chunk_rows=chunk_rows,
        seats=SEATS,
    )
    expected = zoo.expected(architecture, quant, drawn=drawn)
    with load_engine(replace(plan, quant=quant), target, draft if budget else None) as engine:
        texts, steps = answer_all(engine, make_requests(drawn=drawn))
    assert texts == expected
    assert max(step.num_sharing for _, step in steps) == SEATS
    assert {index for index, step in steps if step.finish_reason == "length"} == set(expected)
    joined = [each for each in passes_of(steps) if {step.new_rows > 1 for _, step in each} == {True, False}]
    assert joined, "no prompt joined a pass under way"
    if budget:
        assert any(step.accepted for _, step in steps)


@pytest.mark.parametrize(
    ("architecture", "drawn"),
    [
        pytest.param(name, drawn, marks=() if (number + drawn) % 2 else pytest.mark.slow)
        for number, name in enumerate(DEFAULT)
        for drawn in (False, True)
    ],
)
def test_texts_are_those_of_each_request_alone(zoo: Zoo, architecture: str, drawn: bool):
    check(zoo, architecture, "none", drawn=drawn, chunk_rows=7, budget=12)


def test_texts_of_a_quantized_model(zoo: Zoo):
    check(zoo, "llama_tied", "int4", drawn=True, chunk_rows=7, budget=12)


# Chunks that cut parts, one chunk, trees that take turns, and none.
SHAPES = [(7, 12), (512, 40), (7, 0)]
FULL_CROSS = [
    *itertools.product([*ARCHITECTURES, *SPECIAL], ["none"], SHAPES),
    *itertools.product(ARCHITECTURES, ["int8", "int4"], SHAPES[:1]),
]


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("architecture", "quant", "shape"), FULL_CROSS, ids=str)
def test_texts_in_the_full_cross(zoo: Zoo, architecture: str, quant: str, shape: tuple[int, int], drawn: bool):
    chunk_rows, budget = shape
    check(zoo, architecture, quant, drawn=drawn, chunk_rows=chunk_rows, budget=budget)


# --- one pair, loaded once -------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A mostly streamed target and a draft that is often right, with three seats; all tests share one engine."""

    target: ModelSource
    draft: ModelSource
    engine: Engine = field(init=False)
    texts: dict[Request, list[int]] = field(default_factory=dict)

    def load(self, seats: int = SEATS, **changes) -> Engine:
        plan = make_plan(
            self.target, self.draft, num_layers=4, resident=(2,), tree_budget=12, chunk_rows=16, seats=seats, ctx=96
        )
        return load_engine(changed(plan, **changes), self.target, self.draft)

    def expected(self, requests: Iterable[Request]) -> dict[int, list[int]]:
        """Return the text of each request alone."""
        requests = list(requests)
        missing = [each for each in requests if each not in self.texts]
        if missing:
            with self.load(seats=1) as engine:
                self.texts |= {missing[index]: text for index, text in alone(engine, missing).items()}
        return {index: self.texts[each] for index, each in enumerate(requests)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("many")
    model = random_model(make_config("mistral"))
    pair = Pair(save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft"))
    with pair.load() as engine:
        pair.engine = engine
        yield pair


def test_one_request_takes_the_same_steps_as_generate(pair: Pair):
    for drawn in (False, True):
        (request,) = make_requests(drawn=drawn, lengths=[30])
        pair.engine.forget()
        _, expected = write(pair.engine, list(request.prompt_ids), request.sampling, request.max_tokens or 0)
        pair.engine.forget()
        _, steps = answer_all(pair.engine, [request])
        kept = ("token_ids", "finish_reason", "new_rows", "cached_rows", "tree_nodes", "accepted", "depth", "tree")
        for ours, theirs in zip((step for _, step in steps), expected, strict=True):
            assert [getattr(ours, name) for name in kept] == [getattr(theirs, name) for name in kept]
            assert ours.num_sharing == 1


def test_seeds_belong_to_requests(pair: Pair):
    """Equal prompts with equal seeds give equal texts in one pass, and different ones with different seeds."""
    sampling = Sampling(temperature=1.0, seed=3)
    prompt = tuple(random_prompt(12, VOCAB))
    requests = [Request(prompt, replace(sampling, seed=seed), max_tokens=NUM_TOKENS) for seed in (3, 4, 3)]
    texts, _ = answer_all(pair.engine, requests)
    assert texts == pair.expected(requests)
    assert texts[0] == texts[2] != texts[1]


def test_stop_tokens_and_limits_are_each_requests_own(pair: Pair):
    texts = pair.expected(requests := make_requests(drawn=True))
    stops = [replace(each, stop_ids=frozenset({texts[i][4 + i], VOCAB + 1})) for i, each in enumerate(requests)]
    limits = [replace(each, max_tokens=1 + 2 * i) for i, each in enumerate(requests)]
    ends = {"stop": stops, "length": limits, "context": [replace(each, max_tokens=None) for each in requests[:2]]}
    for reason, asked in ends.items():
        found, steps = answer_all(pair.engine, asked)
        last = {index: step.finish_reason for index, step in steps}
        assert set(last.values()) == {reason}
        for i, each in enumerate(asked):
            if reason == "stop":
                assert found[i] == texts[i][: texts[i].index(next(iter(each.stop_ids & set(texts[i])))) + 1]
            elif reason == "length":
                assert found[i] == texts[i][: each.max_tokens]
            else:
                assert found[i][:NUM_TOKENS] == texts[i][:NUM_TOKENS] and len(found[i]) == 96 - len(each.prompt_ids)


def test_more_requests_than_seats_are_answered_in_order(pair: Pair):
    lengths = [2 + i % 5 for i in range(20)]
    requests = [
        replace(each, max_tokens=1 + i % 7) for i, each in enumerate(make_requests(drawn=True, lengths=lengths))
    ]
    texts, steps = answer_all(pair.engine, iter(requests))
    assert texts == pair.expected(requests)
    first_steps = list(dict.fromkeys(index for index, _ in steps))
    assert first_steps == list(range(20))
    for each in passes_of(steps):
        assert len({index for index, _ in each}) == len(each) == each[0][1].num_sharing <= SEATS
        shared = {(step.pass_s, step.draft_s, step.streamed_bytes, step.num_sharing) for _, step in each}
        assert len(shared) == 1, "times and bytes are the pass's"


def test_requests_are_taken_when_a_seat_is_free(pair: Pair):
    taken = []

    def requests() -> Iterator[Request]:
        for i, each in enumerate(make_requests(drawn=False)):
            taken.append(i)
            yield each

    steps = pair.engine.generate_many(requests())
    next(steps)
    assert len(taken) <= SEATS + 1
    steps.close()  # type: ignore[attr-defined]
    assert list(pair.engine.generate_many([])) == []


def test_a_seat_reuses_what_prompts_share(pair: Pair):
    pair.engine.forget()
    system = random_prompt(30, VOCAB, seed=50)
    requests = [
        Request((*system, *random_prompt(4 + i, VOCAB, seed=i)), sampling_of(i, drawn=True), max_tokens=8)
        for i in range(8)
    ]
    texts, steps = answer_all(pair.engine, requests)
    assert texts == pair.expected(requests)
    cached = [next(step.cached_rows for index, step in steps if index == i) for i in range(8)]
    assert cached[0] == 0 and 0 < cached.count(0) <= SEATS
    assert all(rows >= len(system) for rows in cached if rows)


def test_a_chat_goes_on_in_the_first_seat_after_others_were_answered(pair: Pair):
    (request,) = make_requests(drawn=True, lengths=[25])
    pair.engine.forget()
    answer_all(pair.engine, [request])
    text = pair.expected([request])[0]
    prompt = [*request.prompt_ids, *text[:6]]
    again, steps = write(pair.engine, prompt, request.sampling, len(text) - 6)
    assert again == text[6:] and steps[0].cached_rows == len(prompt) - 1


# --- admission -------------------------------------------------------------------------------------------------------


def joins(steps: Iterable[tuple[int, Step]]) -> list[int]:
    """Return how many prompts each pass reads."""
    return [sum(step.new_rows > 1 for _, step in each) for each in passes_of(steps)]


@pytest.mark.parametrize(("free_rows", "expected"), [(1, [1, 1, 1]), (20, [2, 1]), (30, [3]), (500, [3])])
def test_prompts_join_while_their_rows_are_free(pair: Pair, free_rows: int, expected: list[int]):
    requests = make_requests(drawn=False, lengths=[10, 10, 10])
    pair.engine.forget()
    with pair.engine.drafting_with(NoDrafter()):
        pair.engine._policy = FixedPolicy(0, free_rows)
        _, steps = answer_all(pair.engine, requests)
    assert joins(steps)[: len(expected)] == expected


def test_prompts_join_if_waiting_saves_less_than_an_empty_seat_loses():
    """A pass takes 1 s up to 65 rows, and 1/64 s more with each further row: the third seat's share is 1/3 s.

    A pass without other prompts has 47 free rows beside two roots and 16 nodes, which is what waiting saves at most,
    however long the prompt is.
    """
    policy = AdaptivePolicy(16, Expectation(((1, 1.0), (65, 1.0), (129, 2.0)), ((1, 0.1),), 16, 4.0, 3.0), 10)
    assert policy.may_join(26, Roots(2, 65)) and not policy.may_join(27, Roots(2, 65))
    assert not policy.may_join(1000, Roots(2, 65)) and policy.may_join(1000, Roots(2, 2))
    assert policy.may_join(8, Roots(9, 65)) and not policy.may_join(9, Roots(9, 65))
    assert policy.may_join(40, Roots(70, 100)), "no rows are free in the next pass either"
    assert policy.may_join(60, Roots(2, 400)), "the pass is so long that an empty seat loses more"


# --- refusals and broken requests ------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_fails_alone(pair: Pair):
    good = make_requests(drawn=True)
    requests = [good[0], Request(tuple(random_prompt(96, VOCAB))), *good[1:], Request(tuple(random_prompt(200, VOCAB)))]
    texts, steps = answer_all(pair.engine, requests)
    failed = {index: step for index, step in steps if step.finish_reason == "error"}
    assert set(failed) == {1, 7}
    assert all(isinstance(step.error, PromptTooLongError) and not step.token_ids for step in failed.values())
    assert "200" in failed[7].error.message and "96" in failed[7].error.message
    expected = pair.expected(good)
    assert texts == {0: expected[0], 1: [], **{i + 1: expected[i] for i in range(1, 6)}, 7: []}


def test_a_broken_sequence_fails_alone(pair: Pair, tmp_path: Path):
    """One token's embedding is NaN: the sequence that has it ends with an error, and the others go on."""
    from safetensors.torch import load_file, save_file

    requests = make_requests(drawn=False)
    expected = pair.expected(requests)
    used = {token for i, each in enumerate(requests) for token in (*each.prompt_ids, *expected[i])}
    spoilt = next(token for token in range(3, VOCAB) if token not in used)
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for file in pair.target.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][spoilt] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource("spoilt", folder)
    plan = make_plan(source, pair.draft, num_layers=4, resident=(2,), tree_budget=12, chunk_rows=16, seats=3, ctx=96)
    asked = [*requests[:2], Request((7, spoilt, 9), max_tokens=8), *requests[2:]]
    with load_engine(plan, source, pair.draft) as engine:
        texts, steps = answer_all(engine, asked)
        again, _ = answer_all(engine, requests)
    (failed,) = [(index, step) for index, step in steps if step.error is not None]
    assert failed[0] == 2 and isinstance(failed[1].error, BrokenScoresError) and failed[1].finish_reason == "error"
    assert texts == {0: expected[0], 1: expected[1], 2: [], **{i + 1: expected[i] for i in range(2, 6)}}
    assert again == expected


# --- cancelling and failing passes -----------------------------------------------------------------------------------


class FailAt(threading.Event):
    """An event that cancels, or raises an error, at the n-th check."""

    def __init__(self, n: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.left = n
        self._error = error

    def is_set(self) -> bool:
        self.left -= 1
        if self.left <= 0 and self._error is not None:
            raise self._error
        return self.left <= 0


def write_interrupted(engine: Engine, requests: list[Request], events: Iterable[FailAt]) -> dict[int, list[int]]:
    """Answer all requests, stopped at each event and continued from the tokens that were yielded."""
    texts: dict[int, list[int]] = {index: [] for index in range(len(requests))}
    for event in [*events, None]:
        left = {i: each for i, each in enumerate(requests) if len(texts[i]) < (each.max_tokens or 0)}
        numbers = list(left)
        asked = [
            replace(
                each,
                prompt_ids=(*each.prompt_ids, *texts[i]),
                max_tokens=(each.max_tokens or 0) - len(texts[i]),
            )
            for i, each in left.items()
        ]
        try:
            for number, step in engine.generate_many(asked, cancel=event):
                texts[numbers[number]] += step.token_ids
                assert event is not None or step.finish_reason != "interrupt"
        except OSError:
            assert event is not None
    return texts


def test_an_interrupt_ends_all_answers(pair: Pair):
    pair.engine.forget()
    steps = list(pair.engine.generate_many(make_requests(drawn=False), cancel=FailAt(40)))
    last = [step for _, step in steps if step.finish_reason == "interrupt"]
    assert len(last) == last[0].num_sharing and [step for _, step in steps[-len(last) :]] == last
    assert all(step.token_ids == () and step.tree is None for step in last)


def test_one_answer_is_cancelled_alone(pair: Pair):
    """The seat is free for the next request, and the other texts do not change."""
    requests = make_requests(drawn=True)
    expected = pair.expected(requests)
    event = threading.Event()
    asked = [requests[0], replace(requests[1], cancel=event), *requests[2:]]
    texts: dict[int, list[int]] = {index: [] for index in range(len(asked))}
    ends = {}
    for index, step in pair.engine.generate_many(asked):
        texts[index] += step.token_ids
        ends[index] = step.finish_reason
        if index == 1:
            event.set()
    assert ends == {0: "length", 1: "interrupt", 2: "length", 3: "length", 4: "length", 5: "length"}
    assert 0 < len(texts[1]) < len(expected[1]) and texts[1] == expected[1][: len(texts[1])]
    assert {**texts, 1: []} == {**expected, 1: []}


@given(
    drawn=st.booleans(),
    points=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=5),
    order=st.permutations(range(5)),
)
@settings(deadline=None, max_examples=8)
def test_cancelled_and_failed_passes_leave_all_seats_right(pair: Pair, drawn: bool, points: list, order: list[int]):
    requests = [make_requests(drawn=drawn)[i] for i in order]
    events = [FailAt(n, OSError("the disk is gone") if fails else None) for n, fails in points]
    assert write_interrupted(pair.engine, requests, events) == pair.expected(requests)


def test_200_cancelled_and_failed_passes_leave_all_seats_as_they_were(pair: Pair):
    """Random passes over random seats, of which most stop at some layer; against a cache that never saw those."""
    models = [
        load_model(pair.target, resident=(2,), num_slots=2, cache_rows=160, chunk_rows=11, seats=SEATS)
        for _ in range(2)
    ]
    rng, texts = random.Random(4), [list[int]() for _ in range(SEATS)]
    stopped = 0
    try:
        for number in range(240):
            seats = rng.sample(range(SEATS), rng.randint(1, SEATS))
            new = {seat: random_prompt(rng.randint(1, 9), VOCAB, seed=number * 3 + seat) for seat in seats}
            error = rng.choice([None, OSError("the disk is gone"), KeyboardInterrupt()])
            if stops := number % 6 != 5:
                with pytest.raises((PassCancelledError, OSError, KeyboardInterrupt)):
                    run(models[0], texts, new, FailAt(rng.randint(1, 4), error))
                stopped += 1
            assert models[0].cache.lengths == [len(text) for text in texts]
            if not stops:
                ours, theirs = (run(model, texts, new, None) for model in models)
                assert torch.equal(ours, theirs)
                for seat, tokens in new.items():
                    texts[seat] += tokens
                    if len(texts[seat]) > 100:
                        texts[seat] = texts[seat][:30]
                        for model in models:
                            model.cache.truncate(seat, 30)
    finally:
        for model in models:
            model.close()
    assert stopped == 200


def run(model: TreeModel, texts: list[list[int]], new: dict[int, list[int]], cancel: FailAt | None) -> torch.Tensor:
    """Run a pass that appends new tokens to some seats."""
    layout = PassLayout((seat, linear_layout(len(texts[seat]), len(tokens), CPU)) for seat, tokens in new.items())
    return model.forward([token for tokens in new.values() for token in tokens], layout, cancel)


# --- drafting together -----------------------------------------------------------------------------------------------


def drafter_of(pair: Pair, seats: int, budget: int) -> ModelDrafter:
    model = load_model(pair.draft, cache_rows=96 + 4 * budget, seats=seats)
    return ModelDrafter(model, max_rows=4 * budget, max_context=96)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("budget", [3, 12, 40])
def test_joint_trees_are_the_likeliest_paths_of_all(pair: Pair, budget: int, drawn: bool):
    """Against trees that were grown one at a time, of which the best `budget` nodes are taken."""
    sequences = []
    for seat, each in enumerate(make_requests(drawn=drawn, lengths=[20, 9, 31])):
        sequences.append(sequence_of(each.prompt_ids, Sampler(each.sampling, VOCAB, CPU), 12, seat))
    trees = drafter_of(pair, 3, budget).grow(sequences, FixedPolicy(budget), None)
    paths = {}
    for number, sequence in enumerate(sequences):
        (tree,) = drafter_of(pair, 1, 2 * budget).grow([replace(sequence, seat=0)], FixedPolicy(budget), None)
        paths |= {(number, *path): weight for path, weight in weighted_paths(tree).items()}
    best = sorted(paths, key=lambda path: -paths[path])[:budget]
    found = {
        (number, *path): weight for number, tree in enumerate(trees) for path, weight in weighted_paths(tree).items()
    }
    least = paths[best[-1]]
    assert len(found) == budget
    assert all(abs(paths.get(path, least) - least) < 1e-4 for path in set(best) ^ set(found))
    assert all(abs(weight - paths[path]) < 1e-4 for path, weight in found.items() if path in paths)
    if budget == 40:
        assert all(len(tree) for tree in trees)


def weighted_paths(tree) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(() if parent < 0 else paths[parent]), token))
    return dict(zip(paths, tree.weights, strict=True))


def test_draft_passes_hardly_grow_with_the_sequences(pair: Pair):
    counts = []
    for seats in (1, 3):
        drafter, count = drafter_of(pair, seats, 24), 0
        (model,) = drafter.models
        forward = model.forward

        def counted(*args, forward=forward):
            nonlocal count
            count += 1
            return forward(*args)

        model.forward = counted
        samplers = [Sampler(Sampling(), VOCAB, CPU) for _ in range(seats)]
        sequences = [sequence_of(random_prompt(9, VOCAB, i), each, 12, i) for i, each in enumerate(samplers)]
        drafter.grow(sequences, FixedPolicy(24), None)
        counts.append(count)
    assert counts[1] <= counts[0] + 4


def test_the_head_scores_all_roots_in_one_call(pair: Pair):
    with load_engine(changed(pair.engine.plan, head_rows=8), pair.target, pair.draft) as engine:
        calls, logits = [], engine.target.logits
        engine.target.logits = lambda hidden: calls.append(len(hidden)) or logits(hidden)
        _, steps = answer_all(engine, make_requests(drawn=False, lengths=[9, 9, 9]))
    assert calls[0] >= SEATS
    assert len(calls) <= 3 * len(list(passes_of(steps)))


# --- adaptive trees --------------------------------------------------------------------------------------------------


def expectation(row_s: float) -> Expectation:
    return Expectation(((1, 1.0), (17, 1.0 + 16 * row_s)), ((1, 0.01), (8, 0.01)), 8, 4.0, 3.0)


def test_adaptive_trees_shrink_as_the_batch_grows():
    """Where every row costs, nodes must beat the speed of many sequences that share a pass."""
    policy = AdaptivePolicy(16, expectation(row_s=0.12), 10)
    weights = [-0.15 * node for node in range(16)]
    sizes = [policy.num_to_verify(weights, Roots(num, num)) for num in (1, 2, 4, 10)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_trees_leave_the_free_rows_to_prompts():
    """Rows are free up to 40 here: beside a prompt of 35 rows, only likely nodes pay."""
    policy = AdaptivePolicy(32, Expectation(((1, 1.0), (40, 1.0), (80, 3.0)), ((1, 0.01),), 16, 4.0, 6.0), 4)
    weights = [-0.1 * node for node in range(32)]
    alone, beside, after = (policy.num_to_verify(weights, Roots(4, rows)) for rows in (4, 39, 10**6))
    assert alone == 32 > beside >= after
    assert policy.num_to_expand(range(16), weights[:16], Roots(4, 4)) == 16
    assert policy.num_to_expand(range(16), weights[:16], Roots(4, 39)) < 16


def test_texts_do_not_depend_on_adaptive_trees(pair: Pair):
    requests = make_requests(drawn=True)
    for row_s in (0.0, 0.1):
        with pair.load(adaptive=True, expected=expectation(row_s)) as engine:
            assert isinstance(engine._policy, AdaptivePolicy)
            assert answer_all(engine, requests)[0] == pair.expected(requests)
            assert answer_all(engine, requests)[0] == pair.expected(requests)


def test_nothing_is_left_of_a_call_that_was_given_up(pair: Pair):
    requests = make_requests(drawn=True)
    for num_steps in (1, 4, 9):
        steps = pair.engine.generate_many(requests)
        assert len(list(itertools.islice(steps, num_steps))) == num_steps
        steps.close()  # type: ignore[attr-defined]
    assert answer_all(pair.engine, requests)[0] == pair.expected(requests)
