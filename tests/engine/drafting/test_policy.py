"""Trees that grow for as long as their nodes pay: decisions against brute force, learning against a made-up machine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import make_plan, random_prompt, write
from support.loading import changed, load_engine
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.drafting.drafter import NoDrafter
from specchat.engine.drafting.policy import FixedGrowth, Growth, PayingGrowth
from specchat.engine.engine import Engine
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Sampling, Step
from specchat.records.plan import Expectation

EMPTY = Step((1,), None, 1, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


@dataclass
class Machine:
    """A target, a link and a draft whose times are known; and a text whose guesses hit with known probabilities.

    Behind every node there is one good guess of probability `hit`, and others that never come: trees are chains with
    decoys, so what any number of nodes brings can be written down.
    """

    pass_s: float
    row_s: float
    link_s: float
    draft_s: float
    hit: float
    rng: random.Random

    def time_of(self, rows: int) -> tuple[float, float]:
        """A pass, and the part of it that waits."""
        computing = self.pass_s + self.row_s * rows if rows > 1 else self.pass_s
        return max(computing, self.link_s), max(self.link_s - computing, 0.0)

    def step(self, growth: Growth) -> Step:
        weights: list[float] = []
        draft_s = 0.0
        if growth.begins():
            draft_s = self.draft_s
            growth.drafted(1, self.draft_s)
            weights = [math.log(self.hit)]
            while len(weights) < growth.max_nodes and growth.expand([len(weights) - 1], weights[-1:]):
                growth.drafted(1, self.draft_s)
                draft_s += self.draft_s
                weights.append(weights[-1] + math.log(self.hit))
            weights = weights[: growth.cut(weights)]
        accepted = 0
        while accepted < len(weights) and self.rng.random() < self.hit:
            accepted += 1
        verify_s, wait_s = self.time_of(1 + len(weights))
        tree = TokenTree(tuple(range(len(weights))), tuple(range(-1, len(weights) - 1)), weights=tuple(weights))
        step = replace(
            EMPTY,
            token_ids=tuple(range(accepted + 1)),
            tree_nodes=len(weights),
            accepted=accepted,
            pass_s=draft_s + verify_s,
            draft_s=draft_s,
            verify_s=verify_s,
            stream_wait_s=wait_s,
        )
        growth.verified(step, tree, range(accepted))
        return step

    def expectation(self) -> Expectation:
        """What a planner would say that thinks the machine slower than it is, and nodes cheaper."""
        passes = tuple((rows, 0.5 + self.time_of(rows)[0]) for rows in (1, 2, 3, 5, 9, 17, 33, 65))
        return Expectation(passes, ((1, 2 * self.draft_s), (8, 2 * self.draft_s)), 16, 8.0, 3.0)

    def tok_per_s(self, nodes: int) -> float:
        """What chains of a fixed length come to."""
        tokens = sum(self.hit**depth for depth in range(nodes + 1))
        return tokens / (self.time_of(1 + nodes)[0] + nodes * self.draft_s)


MACHINES = {
    "nodes are free": Machine(0.1, 0.0005, 1.0, 0.002, 0.8, random.Random(1)),
    "resident and fast": Machine(0.02, 0.001, 0.0, 0.004, 0.7, random.Random(2)),
    "nodes cost": Machine(0.02, 0.01, 0.0, 0.002, 0.8, random.Random(3)),
    "computing takes over from the link": Machine(0.1, 0.05, 0.5, 0.002, 0.95, random.Random(4)),
    "a draft as slow as the target": Machine(0.01, 0.0, 0.0, 0.01, 0.6, random.Random(5)),
    "a useless draft": Machine(0.02, 0.001, 0.0, 0.01, 0.02, random.Random(6)),
}


@pytest.mark.parametrize(("told", "least"), [(True, 0.95), (False, 0.94)])
@pytest.mark.parametrize("name", MACHINES)
def test_it_comes_close_to_the_best_fixed_length(name: str, told: bool, least: float):
    machine = MACHINES[name]
    growth = PayingGrowth(64, machine.expectation() if told else None)
    steps = [machine.step(growth) for _ in range(3000)][1000:]
    reached = sum(len(step.token_ids) for step in steps) / sum(step.pass_s for step in steps)
    best = max(machine.tok_per_s(nodes) for nodes in range(65))
    assert reached >= least * best, (reached, best, [step.tree_nodes for step in steps[-8:]])


def test_it_follows_a_machine_that_changes():
    growth = PayingGrowth(64)
    slow, fast = MACHINES["nodes are free"], MACHINES["nodes cost"]
    sizes = [[machine.step(growth).tree_nodes for _ in range(400)] for machine in (slow, fast, slow)]
    many, few, again = (sum(each[-50:]) / 50 for each in sizes)
    assert few < 8 < 12 < min(many, again)


def learned(seed: int = 7) -> PayingGrowth:
    growth = PayingGrowth(64)
    machine = replace(MACHINES["nodes cost"], rng=random.Random(seed))
    for _ in range(60):
        machine.step(growth)
    return growth


@given(st.lists(st.floats(-9.0, 0.0), min_size=1, max_size=64), st.integers(0, 5))
def test_the_cut_is_the_best_of_all_cuts(weights: list[float], seed: int):
    growth = learned(seed)
    weights.sort(reverse=True)
    rate = growth._rate()
    assert growth._num_steps % 4 == 0, "no step that tries another size"
    values = [0.0]
    for node, weight in enumerate(weights):
        values.append(values[-1] + growth._acceptance.of(weight) - rate * growth._node_s(node))
    assert values[growth.cut(weights)] == pytest.approx(max(values))


@given(st.lists(st.floats(-9.0, 0.0), min_size=1, max_size=16), st.integers(0, 5))
def test_a_pass_of_the_draft_is_made_if_it_pays(weights: list[float], seed: int):
    growth = learned(seed)
    weights.sort(reverse=True)
    ranks = range(0, 2 * len(weights), 2)
    rate, hit_rate = growth._rate(), growth._hit_rate()

    def surplus(count: int) -> float:
        gains = hit_rate * sum(growth._acceptance.of(weight) for weight in weights[:count])
        nodes_s = sum(growth._node_s(rank + 1) for rank in ranks[:count])
        return gains - rate * (growth._draft.at(count) + nodes_s if count else 0.0)

    best = max(range(len(weights) + 1), key=surplus)
    count = growth.expand(ranks, weights)
    assert surplus(count) == pytest.approx(surplus(best))


@given(st.lists(st.floats(-12.0, 0.0), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_heavier_node_is_never_the_less_likely_one(weights: list[float], rng: random.Random):
    growth = PayingGrowth(64)
    for _ in range(30):
        path = [node for node in range(len(weights)) if rng.random() < 0.3]
        growth._acceptance.add(weights, path)
    probabilities = [growth._acceptance.of(weight) for weight in sorted(weights, reverse=True)]
    assert probabilities == sorted(probabilities, reverse=True)
    acceptance = growth._acceptance
    promised = sum(o * p for o, p in zip(acceptance._offered, acceptance._probability, strict=True))
    assert promised == pytest.approx(sum(acceptance._accepted)), "no more is promised than was accepted"


# --- the text --------------------------------------------------------------------------------------------------------


class Moody:
    """Decides at random, also for nothing at all."""

    def __init__(self, seed: int) -> None:
        self.max_nodes = 16
        self._rng = random.Random(seed)

    def begins(self) -> bool:
        return self._rng.random() < 0.8

    def expand(self, ranks: Sequence[int], weights: Sequence[float]) -> int:
        return self._rng.randint(0, len(weights))

    def cut(self, weights: Sequence[float]) -> int:
        return self._rng.randint(0, len(weights))

    def drafted(self, rows: int, seconds: float) -> None:
        pass

    def verified(self, step: Step, tree: TokenTree, path: Sequence[int]) -> None:
        assert len(tree.tokens) == len(tree.parents) == len(tree.weights)
        assert list(tree.weights) == sorted(tree.weights, reverse=True)
        assert all(parent < node for node, parent in enumerate(tree.parents) if parent != ROOT)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("growth")
    model = random_model(make_config("llama"))
    target, draft = save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft")
    plan = make_plan(target, draft, num_layers=4)
    with load_engine(plan, target, draft) as fixed, load_engine(changed(plan, adaptive=True), target, draft) as paying:
        yield fixed, paying


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)])
def test_the_text_does_not_depend_on_the_trees(engines: tuple[Engine, Engine], sampling: Sampling):
    fixed, paying = engines
    prompt = random_prompt(9, VOCAB)
    text, _ = write(fixed, prompt, sampling, 40)
    assert write(paying, prompt, sampling, 40)[0] == text
    for seed in range(4):
        fixed.truncate(0)
        fixed._growth = Moody(seed)
        moody, steps = write(fixed, prompt, sampling, 40)
        assert moody == text
        assert {step.tree_nodes == 0 for step in steps} == {True, False}
    fixed._growth = FixedGrowth(16)


def test_a_plan_says_which(engines: tuple[Engine, Engine]):
    assert [type(engine._growth) for engine in engines] == [FixedGrowth, PayingGrowth]


def test_trees_start_from_what_is_expected(engines: tuple[Engine, Engine]):
    _, paying = engines
    assert isinstance(paying._growth, PayingGrowth)
    dear = replace(paying.plan, expected=expectation(row_s=1.0))
    cheap = replace(paying.plan, expected=expectation(row_s=0.0))
    sizes = [
        Engine(plan, paying._target, paying._drafter)._growth.cut([-0.5 - 0.2 * node for node in range(16)])
        for plan in (dear, cheap)
    ]
    assert sizes[0] <= 4 < sizes[1] == 16


def test_what_was_learned_outlives_a_chat(engines: tuple[Engine, Engine]):
    _, paying = engines
    write(paying, random_prompt(9, VOCAB), Sampling(), 40)
    growth = paying._growth
    assert isinstance(growth, PayingGrowth)
    learned = [growth._target.at(rows) for rows in range(1, 17)]
    with paying.drafting_with(NoDrafter()):
        write(paying, random_prompt(9, VOCAB), Sampling(), 4)
    paying.forget()
    assert paying._growth is growth
    assert [growth._target.at(rows) for rows in range(1, 17)] == learned


def expectation(row_s: float) -> Expectation:
    return Expectation(((1, 1.0), (17, 1.0 + 16 * row_s)), ((1, 0.01), (8, 0.01)), 8, 4.0, 3.0)
