"""Draft policies: decisions against brute force, learning and probing against a made-up machine with its own clock."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.plans import changed
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.drafting.drafter import NoDrafter
from specchat.engine.drafting.policy import (
    ONE_ROOT,
    AdaptivePolicy,
    DraftPolicy,
    FixedPolicy,
    Roots,
    _Acceptance,
)
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
    hides_s: float = 0.0  # drafting in which layers are read that the pass waits for

    def time_of(self, rows: int, draft_s: float = 0.0) -> tuple[float, float, float]:
        """A pass, the part of it that waits, and drafting before it that the pass is shorter by."""
        computing = self.pass_s + self.row_s * rows if rows > 1 else self.pass_s
        hidden_s = min(draft_s, self.hides_s, max(self.link_s - computing, 0.0))
        waiting_s = max(self.link_s - computing, 0.0) - hidden_s
        return max(computing, self.link_s) - hidden_s, waiting_s, hidden_s

    def step(self, policy: DraftPolicy) -> Step:
        weights: list[float] = []
        draft_s = 0.0
        if policy.should_draft():
            draft_s = self.draft_s
            policy.record_draft_pass(1, self.draft_s)
            weights = [math.log(self.hit)]
            while len(weights) < policy.tree_budget and policy.num_to_expand([len(weights) - 1], weights[-1:]):
                policy.record_draft_pass(1, self.draft_s)
                draft_s += self.draft_s
                weights.append(weights[-1] + math.log(self.hit))
            weights = weights[: policy.num_to_verify(weights)]
        accepted = 0
        while accepted < len(weights) and self.rng.random() < self.hit:
            accepted += 1
        verify_s, wait_s, hidden_s = self.time_of(1 + len(weights), draft_s)
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
            draft_hidden_s=hidden_s,
        )
        policy.record_pass([step], [tree], [range(accepted)])
        return step

    def expectation(self) -> Expectation:
        """Return the prediction of a planner that takes passes for 1.3 times as long, and nodes for 0.9 as costly."""
        alone_s = self.time_of(1)[0]
        passes = tuple(
            (rows, 1.3 * (alone_s + 0.7 * (self.time_of(rows)[0] - alone_s))) for rows in (1, 2, 3, 5, 9, 17, 33, 65)
        )
        return Expectation(passes, ((1, 2 * self.draft_s), (8, 2 * self.draft_s)), 16, 8.0, 3.0)

    def tok_per_s(self, nodes: int) -> float:
        """What chains of a fixed length come to."""
        tokens = sum(self.hit**depth for depth in range(nodes + 1))
        draft_s = nodes * self.draft_s
        return tokens / (self.time_of(1 + nodes, draft_s)[0] + draft_s)


MACHINES = {
    "nodes are free": Machine(0.1, 0.0005, 1.0, 0.002, 0.8, random.Random(1)),
    "resident and fast": Machine(0.02, 0.001, 0.0, 0.004, 0.7, random.Random(2)),
    "nodes cost": Machine(0.02, 0.01, 0.0, 0.002, 0.8, random.Random(3)),
    "computing takes over from the link": Machine(0.1, 0.05, 0.5, 0.002, 0.95, random.Random(4)),
    "a draft as slow as the target": Machine(0.01, 0.0, 0.0, 0.01, 0.6, random.Random(5)),
    "a useless draft": Machine(0.02, 0.001, 0.0, 0.01, 0.02, random.Random(6)),
    "reads hide all drafting": Machine(0.1, 0.0, 1.0, 0.02, 0.85, random.Random(7), hides_s=10.0),
    "reads hide some drafting": Machine(0.1, 0.0, 1.0, 0.05, 0.9, random.Random(8), hides_s=0.3),
}

# Where the slope changes tenfold at a size that the prediction misses, chains stay twice as long as pays best.
LEAST = {"computing takes over from the link": 0.84}


@pytest.mark.parametrize("name", MACHINES)
def test_it_comes_close_to_the_best_fixed_length(name: str):
    machine = MACHINES[name]
    policy = AdaptivePolicy(64, machine.expectation())
    steps = [machine.step(policy) for _ in range(3000)][1000:]
    best = max(machine.tok_per_s(nodes) for nodes in range(65))
    assert tok_per_s(steps) >= LEAST.get(name, 0.95) * best, (
        tok_per_s(steps),
        best,
        [step.tree_nodes for step in steps[-8:]],
    )


def test_it_follows_a_machine_that_gets_busy_and_calm_again():
    calm = replace(MACHINES["nodes cost"], rng=random.Random(1))
    busy = replace(calm, pass_s=5 * calm.pass_s, row_s=5 * calm.row_s, draft_s=5 * calm.draft_s)
    policy = AdaptivePolicy(64, calm.expectation())
    for machine in (calm, busy, calm):
        steps = [machine.step(policy) for _ in range(3000)][1000:]
        best = max(machine.tok_per_s(nodes) for nodes in range(65))
        assert tok_per_s(steps) >= 0.95 * best, (tok_per_s(steps), best)


def tok_per_s(steps: Sequence[Step]) -> float:
    return sum(len(step.token_ids) for step in steps) / sum(step.pass_s for step in steps)


# --- drafting or plain decoding --------------------------------------------------------------------------------------


def modes_of(policy: AdaptivePolicy, machine: Machine, num_steps: int) -> list[bool]:
    """Return whether each step drafted."""
    modes = []
    for _ in range(num_steps):
        modes.append(policy.should_draft())
        machine.step(policy)
    return modes


def test_it_leaves_a_draft_that_loses_after_four_steps_and_probes_it_less_and_less():
    machine = replace(MACHINES["a useless draft"], rng=random.Random(1))
    modes = modes_of(AdaptivePolicy(64, machine.expectation()), machine, 3000)
    probes = [step for step in range(1, 3000) if modes[step] and not modes[step - 1]]
    assert modes[:5] == [True] * 4 + [False]
    # A probe takes three steps, and one in which the draft catches up.
    apart = [after - before - 4 for before, after in pairwise([0, *probes])]
    assert apart[:4] == [4, 12, 36, 108]
    assert all(190 <= steps <= 210 for steps in apart[4:]), "half of three steps lost is half a percent of 200 or so"
    assert sum(modes) == 4 + 4 * len(probes)


def test_probes_lose_at_most_three_percent_of_the_time():
    machine = replace(MACHINES["a useless draft"], rng=random.Random(1))
    policy = AdaptivePolicy(64, machine.expectation())
    for num_steps in (500, 2500):
        steps = [machine.step(policy) for _ in range(num_steps)]
        assert tok_per_s(steps) >= 0.97 * machine.tok_per_s(0)


def test_plain_decoding_is_not_probed_where_drafting_is_far_faster():
    machine = replace(MACHINES["nodes are free"], rng=random.Random(1))
    modes = modes_of(AdaptivePolicy(64, machine.expectation()), machine, 4000)
    assert modes[:1000].count(False) == 1, "once, to learn what it takes"
    assert 2 <= modes.count(False) <= 5, "in the long run it is, should the estimate be wrong"


@pytest.mark.parametrize("stuck_at", [0, 3, 10, 100])
def test_one_step_that_hangs_does_not_end_drafting_that_is_far_faster(stuck_at: int):
    machine = replace(MACHINES["nodes are free"], rng=random.Random(1))
    policy = AdaptivePolicy(64, machine.expectation())
    modes = modes_of(policy, machine, stuck_at)
    modes += modes_of(policy, replace(machine, link_s=10 * machine.link_s), 1)
    modes += modes_of(policy, machine, 100)
    assert modes.count(True) >= 0.9 * len(modes)


def test_it_drafts_again_once_the_text_gets_easy():
    hard = Machine(0.02, 0.001, 0.0, 0.004, 0.1, random.Random(1))
    policy = AdaptivePolicy(64, hard.expectation())
    assert sum(modes_of(policy, hard, 200)[-100:]) <= 4
    assert sum(modes_of(policy, replace(hard, hit=0.95), 1500)[-100:]) > 90


def test_trees_grow_as_far_as_reads_hide_their_drafting():
    """Drafting that the next reads hide costs nothing, so all the nodes pay that their hits pay for."""
    exposed = Machine(0.1, 0.0005, 1.0, 0.03, 0.85, random.Random(1))
    sizes = []
    for hides_s in (0.0, 10.0):
        machine = replace(exposed, hides_s=hides_s, rng=random.Random(1))
        policy = AdaptivePolicy(32, machine.expectation())
        steps = [machine.step(policy) for _ in range(1500)][500:]
        best = max(range(33), key=machine.tok_per_s)
        sizes.append(median(step.tree_nodes for step in steps if step.tree_nodes))
        assert tok_per_s(steps) >= 0.95 * machine.tok_per_s(best)
    assert sizes[1] >= 1.4 * sizes[0], sizes


# --- sizes -----------------------------------------------------------------------------------------------------------


def learned(seed: int = 7) -> AdaptivePolicy:
    machine = replace(MACHINES["nodes cost"], rng=random.Random(seed))
    policy = AdaptivePolicy(64, machine.expectation())
    for _ in range(60):
        machine.step(policy)
    return policy


@given(st.lists(st.floats(-30.0, 0.0), min_size=1, max_size=64), st.integers(0, 5))
def test_the_cut_is_the_best_of_all_cuts(weights: list[float], seed: int):
    policy = learned(seed)
    weights.sort(reverse=True)
    values = [
        1.0
        + sum(policy._acceptance.of(weight) for weight in weights[:nodes])
        - policy._tokens_per_s() * policy._target_times.at(1 + nodes)
        for nodes in range(len(weights) + 1)
    ]
    assert values[policy.num_to_verify(weights)] == pytest.approx(max(values))


@given(st.lists(st.floats(-9.0, 0.0), min_size=1, max_size=16), st.integers(0, 5))
def test_a_pass_of_the_draft_is_made_if_it_pays(weights: list[float], seed: int):
    policy = learned(seed)
    weights.sort(reverse=True)
    ranks = range(0, 2 * len(weights), 2)
    times, tokens_per_s = policy._target_times, policy._tokens_per_s()

    def surplus(count: int) -> float:
        gains = sum(policy._acceptance.of_children(weight) for weight in weights[:count])
        nodes_s = sum(times.at(rank + 2) - times.at(rank + 1) for rank in ranks[:count])
        return gains - tokens_per_s * (policy._draft_times.at(count) + nodes_s if count else 0.0)

    best = max(range(len(weights) + 1), key=surplus)
    assert surplus(policy.num_to_expand(ranks, weights)) == pytest.approx(surplus(best))


@given(st.lists(st.floats(-12.0, 0.0), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_acceptance_is_a_probability_and_lower_for_the_lighter_of_two_bins(weights: list[float], rng: random.Random):
    acceptance = _Acceptance()
    tree = TokenTree((1,) * len(weights), (ROOT,) * len(weights), weights=tuple(weights))
    for _ in range(30):
        acceptance.add(tree, [node for node in range(len(weights)) if rng.random() < 0.3])
    for weight in (*weights, -math.inf):
        assert 0.0 <= acceptance.of(weight) <= 1.0
        centre = -math.floor(-2 * weight) / 2 - 0.25 if weight > -9.5 else -9.75
        assert acceptance.of(centre) >= acceptance.of(centre - 0.25)


def test_acceptance_follows_what_is_counted():
    acceptance, rng = _Acceptance(), random.Random(1)
    tree = TokenTree((1, 2, 3), (ROOT,) * 3, weights=(-0.25, -1.25, -2.25))
    for _ in range(400):
        acceptance.add(tree, [node for node, probability in enumerate((0.9, 0.5, 0.1)) if rng.random() < probability])
    assert [acceptance.of(weight) for weight in tree.weights] == pytest.approx([0.9, 0.5, 0.1], abs=0.1)


def test_few_sequences_accept_fewer_of_the_same_nodes():
    """Ten sequences are expected to have 20 nodes of 64 accepted: two of them have at most 64, but about 5."""
    expected = Expectation(((1, 0.4), (74, 0.4)), ((1, 0.005),), 64, 10.0, 30.0, num_sequences=10)
    policy = AdaptivePolicy(64, expected, 10)
    step_s = 0.4 + 10 * 0.005
    assert policy._predicted_per_s(10) * step_s == pytest.approx(30)
    speeds = [policy._predicted_per_s(num) * step_s for num in range(1, 11)]
    assert speeds == sorted(speeds) and all(num < speed < 5 * num for num, speed in enumerate(speeds, 1) if num > 1)
    assert speeds[1] == pytest.approx(9, rel=0.1)


# --- the text --------------------------------------------------------------------------------------------------------


class Moody:
    """Decides at random, also for nothing at all."""

    def __init__(self, seed: int) -> None:
        self.tree_budget, self.tokens_per_s = 16, 0.0
        self._rng = random.Random(seed)

    def may_join(self, prompt_rows: int, roots: Roots) -> bool:
        return self._rng.random() < 0.5

    def should_draft(self) -> bool:
        return self._rng.random() < 0.8

    def num_to_expand(self, ranks: Sequence[int], weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        return self._rng.randint(0, len(weights))

    def num_to_verify(self, weights: Sequence[float], roots: Roots = ONE_ROOT) -> int:
        return self._rng.randint(0, len(weights))

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        pass

    def record_pass(self, steps: Sequence[Step], trees: Sequence[TokenTree], paths: Sequence[Sequence[int]]) -> None:
        ((_, tree, _),) = zip(steps, trees, paths, strict=True)
        assert len(tree.tokens) == len(tree.parents) == len(tree.weights)
        assert list(tree.weights) == sorted(tree.weights, reverse=True)
        assert all(parent < node for node, parent in enumerate(tree.parents) if parent != ROOT)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("policy")
    model = random_model(make_config("llama"))
    target, draft = save(model, folder / "target"), save(perturbed(model, 0.05), folder / "draft")
    plan = make_plan(target, draft, num_layers=4)
    with (
        load_engine(plan, target, draft) as fixed,
        load_engine(changed(plan, adaptive=True, expected=expectation(row_s=0.1)), target, draft) as adaptive,
    ):
        yield fixed, adaptive


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)])
def test_the_text_does_not_depend_on_the_trees(engines: tuple[Engine, Engine], sampling: Sampling):
    fixed, adaptive = engines
    prompt = random_prompt(9, VOCAB)
    text, _ = write(fixed, prompt, sampling, 40)
    assert write(adaptive, prompt, sampling, 40)[0] == text
    for seed in range(4):
        fixed.truncate(0)
        fixed._policy = Moody(seed)
        moody, steps = write(fixed, prompt, sampling, 40)
        assert moody == text
        assert {step.tree_nodes == 0 for step in steps} == {True, False}
    fixed._policy = FixedPolicy(16)


def test_a_plan_says_which(engines: tuple[Engine, Engine]):
    assert [type(engine._policy) for engine in engines] == [FixedPolicy, AdaptivePolicy]


def test_trees_start_from_what_is_expected(engines: tuple[Engine, Engine]):
    _, adaptive = engines
    assert isinstance(adaptive._policy, AdaptivePolicy)
    dear = replace(adaptive.plan, expected=expectation(row_s=1.0))
    cheap = replace(adaptive.plan, expected=expectation(row_s=0.0))
    sizes = [
        Engine(plan, adaptive._target, adaptive._drafter)._policy.num_to_verify(
            [-0.5 - 0.2 * node for node in range(16)]
        )
        for plan in (dear, cheap)
    ]
    assert sizes[0] <= 4 < sizes[1] == 16


def test_what_was_learned_outlives_a_chat(engines: tuple[Engine, Engine]):
    _, adaptive = engines
    write(adaptive, random_prompt(9, VOCAB), Sampling(), 40)
    policy = adaptive._policy
    assert isinstance(policy, AdaptivePolicy)
    learned = [policy._target_times.at(rows) for rows in range(1, 17)]
    with adaptive.drafting_with(NoDrafter()):
        write(adaptive, random_prompt(9, VOCAB), Sampling(), 4)
    adaptive.forget()
    assert adaptive._policy is policy
    assert [policy._target_times.at(rows) for rows in range(1, 17)] == learned


def expectation(row_s: float) -> Expectation:
    return Expectation(((1, 1.0), (17, 1.0 + 16 * row_s)), ((1, 0.01), (8, 0.01)), 8, 4.0, 3.0)
