"""Made-up machines and texts in which trees grow as `ModelDrafter` grows them, in a time of their own.

What the target writes does not depend on the trees, so a text is settled beforehand: at every position how sure the
draft is, and which of its guesses comes, if any. Growths are compared on the same text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specchat.engine.drafting.policy import DraftPolicy, FixedPolicy
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Step
from specchat.records.limits import draft_width
from specchat.records.plan import Expectation

BRANCH = 4
_NUM_GUESSES = 2000


@dataclass(frozen=True)
class World:
    """A machine and a pair of models.

    Attributes:
        pass_s: seconds of a pass over the target, by its rows.
        draft_s: likewise over the draft.
        sureness: of the draft's best guess: the parameters of a beta distribution.
        skill: how often what comes is as the draft thinks; otherwise it is none of its guesses.
        noise: standard deviation of the logarithm of the times that a policy is told; what counts are times without.
        preempted: Seconds of computing between two preemptions, and seconds that each takes; both are means of
            exponential distributions. Unlike noise, these seconds count.
    """

    pass_s: Callable[[int], float]
    draft_s: Callable[[int], float]
    sureness: tuple[float, float] = (2.0, 1.0)
    skill: float = 0.9
    noise: float = 0.1
    preempted: tuple[float, float] | None = None

    def expectation(self, level: float = 1.0, slope: float = 1.0) -> Expectation:
        """What a planner would have said: true times, all `level` times too long and `slope` times too steep."""

        def expected(true: Callable[[int], float], rows: int) -> float:
            return level * (true(1) + slope * (true(rows) - true(1)))

        return Expectation(
            pass_s=tuple((rows, expected(self.pass_s, rows)) for rows in (1, 2, 3, 5, 9, 17, 33, 65, 129)),
            draft_s=tuple((rows, expected(self.draft_s, rows)) for rows in (1, 2, 4, 8, 16)),
            tree_nodes=32,
            draft_passes=8.0,
            tokens_per_step=4.0,
        )


@dataclass
class Text:
    """What comes, from the first token on; made as far as it is looked at."""

    world: World
    seed: int
    _spots: list[tuple[list[float], int]] = field(default_factory=list)
    _guesses: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(f"{self.seed} guesses")
        self._guesses = [guesses_of(self.world, rng) for _ in range(_NUM_GUESSES)]

    def at(self, position: int) -> tuple[list[float], int]:
        """The draft's log weights of its guesses, and which of them comes; -1 for none."""
        while len(self._spots) <= position:
            rng = random.Random(f"{self.seed} {len(self._spots)}")
            guesses = rng.choice(self._guesses)
            luck, hit = rng.random(), rng.random() < self.world.skill
            taken = -1
            for rank, weight in enumerate(guesses):
                luck -= math.exp(weight)
                if luck < 0:
                    taken = rank
                    break
            self._spots.append((guesses, taken if hit else -1))
        return self._spots[position]

    def elsewhere(self, rng: random.Random) -> list[float]:
        """The draft's log weights behind something that does not come."""
        return self._guesses[int(rng.random() * _NUM_GUESSES)]


def guesses_of(world: World, rng: random.Random) -> list[float]:
    """Log weights of the guesses behind a node: the best one's is as sure as that, the others halve."""
    sure = min(max(rng.betavariate(*world.sureness), 0.02), 0.98)
    return [math.log(sure), *(math.log(max((1 - sure) / 2**rank, 1e-6)) for rank in range(1, BRANCH))]


@dataclass
class Tree:
    """A growing tree: columns by node, and the nodes' order by weight."""

    weight: list[float] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    is_true: list[bool] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=list)

    def expand(self, nodes: Sequence[int], text: Text, position: int, rng: random.Random, budget: int) -> None:
        """Adds the children of nodes, ROOT for the first ones, and keeps the best of all."""
        for node in nodes:
            self._add_children(node, text, position, rng)
        self.order.sort(key=self.weight.__getitem__, reverse=True)
        del self.order[budget:]

    def _add_children(self, node: int, text: Text, position: int, rng: random.Random) -> None:
        depth = 0 if node == ROOT else self.depth[node]
        above = 0.0 if node == ROOT else self.weight[node]
        if node == ROOT or self.is_true[node]:
            guesses, taken = text.at(position + depth)
        else:
            guesses, taken = text.elsewhere(rng), -1
        self.expanded.add(node)
        for rank, weight in enumerate(guesses):
            self.order.append(len(self.weight))
            self.weight.append(above + weight)
            self.parent.append(node)
            self.depth.append(depth + 1)
            self.is_true.append(rank == taken)

    def frontier(self, width: int, budget: int) -> list[tuple[int, int]]:
        """(rank, node) of the best nodes whose children could still enter."""
        last = self.weight[self.order[-1]] if len(self.order) >= budget else -math.inf
        open_ = [
            (rank, node)
            for rank, node in enumerate(self.order)
            if node not in self.expanded and self.weight[node] > last
        ]
        return open_[:width]


class Simulation:
    """Writes a text with a policy; counts tokens and seconds."""

    def __init__(self, world: World, policy: DraftPolicy, seed: int) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.sizes: list[int] = []
        self._world, self._policy = world, policy
        self._text = Text(world, seed)
        self._rng = random.Random(f"{seed} luck")

    def write(self, num_tokens: int) -> float:
        """Goes on until there are so many tokens; tokens per second since the beginning."""
        while self.tokens < num_tokens:
            self._step()
        return self.tokens / self.seconds

    def _step(self) -> None:
        tree, true_draft_s, draft_s = self._grow()
        nodes = tree.order
        place = {node: index for index, node in enumerate(nodes)}
        path = sorted(place[node] for node in nodes if tree.is_true[node])
        true_verify_s = self._taken(self._world.pass_s(1 + len(nodes)))
        verify_s = self._told(true_verify_s)
        self.tokens += len(path) + 1
        self.seconds += true_draft_s + true_verify_s
        self.sizes.append(len(nodes))
        if isinstance(self._policy, FixedPolicy):
            return  # which learns nothing
        verified = TokenTree(
            tuple(range(len(nodes))),
            tuple(place.get(tree.parent[node], ROOT) for node in nodes),
            weights=tuple(tree.weight[node] for node in nodes),
        )
        step = Step(
            *(tuple(range(len(path) + 1)), None, 1, self.tokens, len(nodes), len(path), 0),
            *(draft_s + verify_s, draft_s, verify_s, 0.0, 0.0, 0),
        )
        self._policy.record_pass([step], [verified], [path])

    def _grow(self) -> tuple[Tree, float, float]:
        """As `ModelDrafter.grow`: the policy decides, a pass at a time; its seconds, and those that it was told."""
        policy, tree = self._policy, Tree()
        if not policy.should_draft():
            return tree, 0.0, 0.0
        true_s, draft_s = self._draft(1)
        budget, width, position = policy.tree_budget, draft_width(policy.tree_budget), self.tokens
        tree.expand([ROOT], self._text, position, self._rng, budget)
        room = 2 * budget
        while True:
            found = tree.frontier(min(width, room), budget)
            found = found[: policy.num_to_expand([rank for rank, _ in found], [tree.weight[node] for _, node in found])]
            if not found:
                break
            room -= len(found)
            tree.expand([node for _, node in found], self._text, position, self._rng, budget)
            more_true_s, more_s = self._draft(len(found))
            true_s, draft_s = true_s + more_true_s, draft_s + more_s
        del tree.order[policy.num_to_verify([tree.weight[node] for node in tree.order]) :]
        return tree, true_s, draft_s

    def _draft(self, rows: int) -> tuple[float, float]:
        seconds = self._taken(self._world.draft_s(rows))
        told_s = self._told(seconds)
        self._policy.record_draft_pass(rows, told_s)
        return seconds, told_s

    def _taken(self, seconds: float) -> float:
        """Return the seconds of a pass that computes for so many, preemptions included."""
        if self._world.preempted is None:
            return seconds
        every_s, away_s = self._world.preempted
        taken_s, left_s = seconds, seconds - self._rng.expovariate(1 / every_s)
        while left_s > 0:
            taken_s += self._rng.expovariate(1 / away_s)
            left_s -= self._rng.expovariate(1 / every_s)
        return taken_s

    def _told(self, seconds: float) -> float:
        return seconds * math.exp(self._rng.gauss(0.0, self._world.noise))
