"""Drafts without a model: texts stay the target's own, repeats are found, and their worth is learned."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.engines import make_plan, random_prompt, sequence_of, write
from support.loading import load_engine
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.drafting.calibration import Calibration, Setting, Worth
from specchat.engine.drafting.drafter import TreeDrafter, free_sources
from specchat.engine.drafting.frequent import FrequentTokens
from specchat.engine.drafting.policy import FixedPolicy
from specchat.engine.drafting.proposers import Proposers
from specchat.engine.drafting.recycling import Recycling
from specchat.engine.drafting.retrieval import Retrieval
from specchat.engine.drafting.sources import Priors, Proposal
from specchat.engine.drafting.suffix_index import SuffixIndex
from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler
from specchat.engine.sequence import TokenSequence
from specchat.records.generation import Request, Sampling
from specchat.records.limits import FREQUENT_TOKENS, RECYCLED_RUNS, RETRIEVAL_PAST_TOKENS
from specchat.records.model import ModelSource

CPU = torch.device("cpu")
NUM_TOKENS = 24
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_p=0.95, seed=5)}
SOURCES = ("retrieval", "model+retrieval")

# --- the text --------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    model: object
    target: ModelSource
    draft: ModelSource

    def load(self, sources: str, *, resident: Sequence[int] = (0, 1, 2, 3), seats: int = 1, budget: int = 24) -> Engine:
        draft = self.draft if "model" in sources else None
        plan = make_plan(
            self.target,
            draft,
            num_layers=4,
            resident=resident,
            tree_budget=budget,
            seats=seats,
            retrieval="retrieval" in sources,
        )
        return load_engine(plan, self.target, draft)

    def text(self, prompt: list[int], sampling: Sampling) -> list[int]:
        return reference.generate(self.model, prompt, sampling, NUM_TOKENS).tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    model = random_model(make_config("llama"))
    return Pair(model, save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft"))


PROMPT = random_prompt(30, VOCAB)


@pytest.mark.parametrize("resident", [(0, 1, 2, 3), (1,)], ids=["resident", "streamed"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("sources", SOURCES)
def test_repeated_answers_are_copied_and_stay_the_targets_own(
    pair: Pair, sources: str, sampling: Sampling, resident: tuple[int, ...]
):
    """The second time, the answer is among the earlier texts, so few passes write it."""
    expected, other = pair.text(PROMPT, sampling), random_prompt(20, VOCAB, 5)
    with pair.load(sources, resident=resident) as engine:
        first, steps = write(engine, PROMPT, sampling, NUM_TOKENS)
        between, _ = write(engine, other, sampling, NUM_TOKENS)
        again, fewer = write(engine, PROMPT, sampling, NUM_TOKENS)
    assert first == again == expected
    assert between == pair.text(other, sampling)
    for step in (*steps, *fewer):
        edges = [] if step.tree is None else list(zip(step.tree.parents, step.tree.tokens, strict=True))
        assert len(set(edges)) == len(edges) == step.tree_nodes, "a token is below its parent twice"
    assert len(fewer) <= 8
    assert "model" in sources or len(fewer) <= len(steps) / 2
    assert sum(each.accepted for step in fewer for each in step.guesses if each.source != "model") > 0


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("sources", SOURCES)
def test_answers_that_share_passes_are_the_targets_own(pair: Pair, sources: str, sampling: Sampling):
    prompts = [random_prompt(length, VOCAB, length) for length in (12, 25, 7, 12)]
    requests = [Request(tuple(each), sampling, max_tokens=NUM_TOKENS) for each in (*prompts, *prompts)]
    texts: dict[int, list[int]] = {}
    with pair.load(sources, seats=3) as engine:
        for index, step in engine.generate_many(requests):
            texts[index] = texts.get(index, []) + list(step.token_ids)
    assert texts == {index: pair.text(list(each.prompt_ids), sampling) for index, each in enumerate(requests)}


class _Stopping(Retrieval):
    """Sets an event when it is asked for the n-th time."""

    def __init__(self, cancel: threading.Event, asks: int) -> None:
        super().__init__(1)
        self._cancel, self._left = cancel, asks

    def propose(self, seat: int, tail: Sequence[int], luck: torch.Tensor | None) -> list[Proposal]:
        self._left -= 1
        if self._left == 0:
            self._cancel.set()
        return super().propose(seat, tail, luck)


@pytest.mark.parametrize("asks", [1, 5, 12])
def test_an_interrupted_answer_goes_on_as_if_never_interrupted(pair: Pair, asks: int):
    cancel, expected = threading.Event(), pair.text(PROMPT, SAMPLINGS["greedy"])
    with pair.load("retrieval") as engine, engine.drafting_with(TreeDrafter(None, [_Stopping(cancel, asks)])):
        steps = list(engine.generate(PROMPT, Sampling(), stop_ids=frozenset(), max_tokens=NUM_TOKENS, cancel=cancel))
        begun = [token for step in steps for token in step.token_ids]
        assert steps[-1].finish_reason == "interrupt" and len(begun) < NUM_TOKENS
        rest, _ = write(engine, [*PROMPT, *begun], Sampling(), NUM_TOKENS - len(begun))
    assert [*begun, *rest] == expected


def test_forgetting_drops_the_texts(pair: Pair):
    with pair.load("retrieval") as engine:
        _, before = write(engine, PROMPT, Sampling(), NUM_TOKENS)
        engine.forget()
        _, after = write(engine, PROMPT, Sampling(), NUM_TOKENS)
    assert sum(step.accepted for step in after) <= sum(step.accepted for step in before) + 2


# --- repeats ---------------------------------------------------------------------------------------------------------

TEXT = st.lists(st.integers(0, 2), max_size=40)


def common_suffix(text: list[int], tail: list[int]) -> int:
    length = 0
    while length < min(len(text), len(tail)) and text[-1 - length] == tail[-1 - length]:
        length += 1
    return length


@given(text=TEXT, tail=TEXT, cut=st.integers(0, 40), more=TEXT)
@settings(deadline=None)
def test_repeats_equal_brute_force(text: list[int], tail: list[int], cut: int, more: list[int]):
    """The latest places of the longest class of repeats, also after the text was cut and went on."""
    index = SuffixIndex()
    index.append(text)
    index.truncate(min(cut, len(text)))
    index.append(more)
    tokens = [*text[:cut], *more]
    assert index.tokens == tokens
    lengths = {place: common_suffix(tokens[:place], tail) for place in range(1, len(tokens))}
    order = next((order for order in (4, 2, 1) if any(length >= order for length in lengths.values())), None)
    places = [] if order is None else [place for place in lengths if lengths[place] >= order]
    found = list(index.matches(tail))
    # the end of the text itself takes one of the twelve places that are compared
    assert len(found) >= min(len(places), 11)
    assert found == [(place, lengths[place]) for place in reversed(places)][: len(found)]


def sequence(tokens: list[int], sampling: Sampling = SAMPLINGS["greedy"], seat: int = 0) -> TokenSequence:
    return sequence_of(tokens, Sampler(sampling, VOCAB, CPU), seat=seat)


def test_the_longest_repeat_comes_first_and_earlier_texts_count():
    retrieval = Retrieval(2)
    retrieval.begin([sequence([1, 2, 3, 4, 5, 9, 3, 4, 7, 1, 2, 3, 4])])
    assert [each.token for each in retrieval.propose(0, [1, 2, 3, 4], None)] == [5]
    assert [each.token for each in retrieval.propose(0, [6, 3, 4], None)] == [
        7,
        5,
    ]  # as long, so the latest place is first
    assert retrieval.propose(1, [1, 2, 3, 4], None) == []
    retrieval.begin([sequence([8, 8, 8])])  # the first text is now an earlier one, for all seats
    assert retrieval.propose(1, [1, 2, 3, 4], None)[0].token == 5


def test_earlier_texts_are_bounded():
    retrieval = Retrieval(1)
    for number in range(5):
        retrieval.begin([sequence([number, *random_prompt(RETRIEVAL_PAST_TOKENS // 3, VOCAB, number)])])
    assert len(retrieval._past.tokens) <= RETRIEVAL_PAST_TOKENS


def test_recycling_proposes_the_targets_best_tokens():
    recycling = Recycling()
    scores = torch.full((2, VOCAB), -10.0)
    scores[0, 7], scores[0, 8], scores[1, 9] = 5.0, 4.0, 3.0
    recycling.observe([[1, 2, 3], [4]], scores)
    assert [each.token for each in recycling.propose(0, [0, 1, 2, 3], None)][:2] == [7, 8]
    assert recycling.propose(0, [5, 2, 3], None)[0].token == recycling.propose(0, [5, 5, 3], None)[0].token == 7
    assert recycling.propose(0, [4], None)[0].token == 9
    assert recycling.propose(0, [6], None) == ()
    assert (
        recycling.propose(0, [1, 2, 3], None)[0].kind < recycling.propose(0, [5, 2, 3], None)[0].kind
    )  # longer runs say more


def test_recycled_runs_are_bounded():
    recycling = Recycling()
    scores = torch.zeros(RECYCLED_RUNS // 3 + 10, 4)
    recycling.observe([[number] for number in range(len(scores))], scores)
    assert recycling.propose(0, [3], None) == () and len(recycling.propose(0, [len(scores) - 1], None)) == 4


def lucky_of_scores(luck: torch.Tensor) -> tuple[Recycling, list[Proposal]]:
    """What a sampled answer is proposed after a token that nothing is known of."""
    recycling = Recycling()
    recycling.begin([sequence([1, 2, 2, 2, 3, 3])])
    scores = torch.full((1, VOCAB), -50.0)
    scores[0, 4], scores[0, 5] = math.log(0.75), math.log(0.25)
    recycling.observe([[1, 2]], scores)
    recycling.begin([sequence([1, 2, 2, 2, 3, 3, 9, 9, 9, 9])])
    return recycling, list(recycling.propose(0, [77], luck))


def test_lucky_frequent_tokens_equal_brute_force():
    luck = Sampler(SAMPLINGS["sampled"], VOCAB, CPU).noise.row(40)  # type: ignore[union-attr]
    recycling, found = lucky_of_scores(luck)
    counts = {1: 1, 2: 3, 3: 2, 9: 4, 4: 0.75, 5: 0.25}
    race = {token: math.log(count / 11) + float(luck[token]) for token, count in counts.items()}
    # tokens whose scores are nearly nothing are known as well, but rare
    assert [each.token for each in found if each.token in race] == sorted(race, key=race.__getitem__, reverse=True)
    kinds = {each.token: each.kind for each in found}
    assert kinds[9] == kinds[2] == kinds[4] > kinds[5]
    assert recycling.propose(0, [77], None) == (), "no guesses without luck"
    known = [each.token for each in recycling.propose(0, [1, 2], luck)]
    assert known[:2] == [4, 5] and len(set(known)) == len(known)


def test_frequent_tokens_are_bounded_and_skip_scores_that_are_none():
    frequent = FrequentTokens(0)
    frequent.count((token, 1.0 + token) for token in range(3 * FREQUENT_TOKENS))
    frequent.count([(1, math.nan), (2, 0.0)])
    frequent.begin([])
    assert len(frequent._tokens) <= FREQUENT_TOKENS and frequent._logs.isfinite().all()
    (best, *_) = frequent.lucky(torch.zeros(3 * FREQUENT_TOKENS))
    assert best.token == 3 * FREQUENT_TOKENS - 1
    frequent.reset()
    frequent.begin([])
    assert frequent.lucky(torch.zeros(4)) == []


# --- worth -----------------------------------------------------------------------------------------------------------


def probability(log_odds: float | None) -> float:
    assert log_odds is not None
    return 1 / (1 + math.exp(-log_odds))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.8, 1.0])
def test_worth_approaches_the_share_that_comes_true(share: float):
    calibration = Calibration(Priors((0.0,), (0.0,), (0.0,)))
    setting = Setting(beside_draft=False, is_sampled=False)
    draws = torch.rand(3000, generator=torch.Generator().manual_seed(1)).tolist()
    for draw in draws:
        expected = probability(calibration.weights(setting)[0])
        calibration.learn(setting, 0, expected, came=draw < share)
    assert abs(probability(calibration.weights(setting)[0]) - share) < 0.1
    assert calibration.weights(Setting(beside_draft=True, is_sampled=False))[0] == 0.0


def test_a_source_that_costs_more_than_it_brings_rests():
    """Ever longer, but trials go on: once the text copies, the source is asked all the time."""
    worth, asked = Worth(), []
    for step in range(6000):
        asked.append(worth.is_asked)
        worth.record(accepted=int(step >= 4000 and worth.is_asked), seconds=0.01, tokens_per_s=5.0)
    assert all(asked[:32]) and not any(asked[32:96]) and all(asked[96:104])
    assert sum(asked[2000:4000]) < 0.02 * 2000
    assert all(asked[5200:])


def test_a_source_is_always_asked_if_time_does_not_count():
    worth = Worth()
    for _ in range(500):
        worth.record(accepted=0, seconds=1.0, tokens_per_s=0.0)
        assert worth.is_asked


class Slow(Retrieval):
    """Finds nothing, and counts how often it is asked."""

    asks = 0

    def propose(self, seat: int, tail: Sequence[int], luck: torch.Tensor | None) -> list[Proposal]:
        self.asks += 1
        return []


def test_useless_sources_rest_only_beside_a_draft_model():
    source = Slow(1)
    proposers = Proposers([source], first=1)
    asks = []
    for alone in (False, True):  # the draft model was given up: the source that rests is asked again
        for _ in range(90):
            proposers.begin([sequence([1, 2, 3])], tokens_per_s=1e9, alone=alone)
            proposers.ask(sequence([1, 2, 3]), [1, 2, 3])
        asks.append(source.asks)
    assert asks == [32, 32 + 90]


@pytest.mark.parametrize(("held_up_s", "rests"), [(0.0, False), (0.02, True)])
def test_sources_must_be_worth_the_time_by_which_they_hold_up_trees(held_up_s: float, rests: bool):
    """A tenth of a node a step is worth 8 ms at 12 tokens per second."""
    source = Fixed({})
    proposers = Proposers([source], first=1)
    asked = []
    for step in range(60):
        proposers.begin([sequence([1, 2, 3])], tokens_per_s=12.0, alone=False, held_up_s=held_up_s)
        asked.append(proposers.are_asked)
        if step % 10 == 0:
            proposers.count_accepted(1)
    assert asked[0] and all(asked) != rests


class Fixed:
    """A source that proposes fixed tokens after the last one."""

    name = "fixed"
    priors = Priors(alone=(0.5, -1.0), beside=(1.5, -0.5), beside_sampled=(1.5, -0.5))

    def __init__(self, after: dict[int, list[Proposal]]) -> None:
        self.after = after

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        pass

    def propose(self, seat: int, tail: Sequence[int], luck: torch.Tensor | None) -> list[Proposal]:
        return self.after.get(tail[-1], [])

    def observe(self, tails: Sequence[Sequence[int]], scores: torch.Tensor) -> None:
        pass

    def reset(self) -> None:
        pass


def test_proposals_that_say_nothing_beside_a_draft_leave_its_scores():
    source = Fixed({4: [Proposal(7, 0)]})
    source.priors = Priors((0.5,), (None,), (None,))
    proposers, text = Proposers([source], first=1), sequence([3, 4])
    proposers.begin([text], alone=False)
    number, weights = proposers.ask(text, [3, 4]), torch.zeros(1, VOCAB).log_softmax(-1)
    before = weights.clone()
    assert proposers.beside([number], weights)[0, 7].weight == pytest.approx(float(before[0, 7]))
    torch.testing.assert_close(weights, before)
    proposers.learn(number, 7)
    assert proposers.alone(proposers.ask(text, [3, 4]), None)[0].token == 7


def test_merged_weights_are_a_distribution_and_follow_what_comes():
    proposers = Proposers([Fixed({4: [Proposal(7, 0), Proposal(9, 1)]})], first=1)
    text = sequence([3, 4])
    weights = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    before, told = weights.clone(), []
    for _ in range(300):
        proposers.begin([text], alone=False)
        number = proposers.ask(text, [3, 4])
        weights = before.clone()
        merged = proposers.beside([number], weights)
        assert weights.exp().sum() == pytest.approx(1, abs=1e-5)
        assert merged[0, 7].weight == pytest.approx(float(weights[0, 7]))
        told.append(float(weights[0, 7]))
        proposers.learn(number, 7)
    raised = before[0].clone()
    raised[7] += 1.5
    raised[9] -= 0.5
    assert told[0] == pytest.approx(float(raised.log_softmax(-1)[7]), abs=1e-5)  # the formula, before learning
    assert told[-1] > -0.5 > told[0]


def test_the_most_certain_of_equal_proposals_decides_and_learns():
    """Without a draft, two sources that propose a token are no surer of it than one: both read the same text."""
    after = {4: [Proposal(7, 0)]}, {4: [Proposal(7, 1), Proposal(9, 1)]}
    proposers, text = Proposers([Fixed(each) for each in after], first=0), sequence([3, 4])
    proposers.begin([text], alone=True)
    number = proposers.ask(text, [3, 4])
    weights = {child.token: math.exp(child.weight) for child in proposers.alone(number, None)}
    total = 1 + math.exp(0.5) + math.exp(-1.0)
    assert weights == pytest.approx({7: math.exp(0.5) / total, 9: math.exp(-1.0) / total})
    proposers.learn(number, 7)
    setting = Setting(beside_draft=False, is_sampled=False)
    first, second = (calibration.weights(setting) for calibration in proposers._calibrations)
    assert first[0] is not None and first[0] > 0.5
    assert second[1] is not None and second[1] < -1.0, "7 says nothing of this proposal, but 9 did not come"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_trees_without_a_model_are_the_likeliest_paths(sampling: Sampling):
    """Against all paths of proposals, weighed one by one."""
    after = {token: [Proposal((token * 7 + 3) % 11, 0), Proposal((token * 5 + 1) % 11, 1)] for token in range(11)}
    drafter = TreeDrafter(None, [Fixed(after)])
    text = sequence([1, 2, 3], sampling)
    (tree,) = drafter.grow([text], FixedPolicy(20), None)
    probe = Proposers([Fixed(after)], first=0)

    def paths_below(path: tuple[int, ...], weight: float) -> list[tuple[float, tuple[int, ...]]]:
        if len(path) == 9:
            return []
        number = probe.ask(text, [*text.tokens, *path])
        noise = text.sampler.noise
        row = None if noise is None else noise.row(len(text.tokens) + len(path))
        children = [(weight + child.weight, (*path, child.token)) for child in probe.alone(number, row)]
        return [each for child in children for each in (child, *paths_below(child[1], child[0]))]

    every = {path: weight for weight, path in paths_below((), 0.0)}
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    assert len(set(found)) == len(found) == 20
    assert list(tree.weights) == pytest.approx(sorted(every.values(), reverse=True)[:20])
    assert [every[path] for path in found] == pytest.approx(list(tree.weights))


def test_free_sources_have_a_prior_for_each_kind():
    for source in free_sources(1):
        assert len(source.priors.alone) == len(source.priors.beside) == len(source.priors.beside_sampled)
