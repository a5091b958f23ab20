"""Made-up machines and texts in which trees grow as `ModelDrafter` grows them, in a time of their own.

What the target writes does not depend on the trees, so a text is settled beforehand: at every position how sure the
draft is, and which of its guesses comes, if any. Growths are compared on the same text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from specchat.engine.drafting.policy import DraftPolicy, FixedPolicy, Roots
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
        preempted_for_s: seconds after which preemptions cease, and then begin again, and so on; they begin at once.
    """

    pass_s: Callable[[int], float]
    draft_s: Callable[[int], float]
    sureness: tuple[float, float] = (2.0, 1.0)
    skill: float = 0.9
    noise: float = 0.1
    preempted: tuple[float, float] | None = None
    preempted_for_s: float = math.inf

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
class Forest:
    """Growing trees of one or more texts: columns by node, and the order of all nodes by weight."""

    weight: list[float] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    is_true: list[bool] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=list)

    def add_children(self, node: int, number: int, text: Text, position: int, rng: random.Random) -> None:
        """Adds the children of a node of text `number`, ROOT for its root, whose guesses are those of `position`."""
        depth = 0 if node == ROOT else self.depth[node]
        above = 0.0 if node == ROOT else self.weight[node]
        if node == ROOT or self.is_true[node]:
            guesses, taken = text.at(position + depth)
        else:
            guesses, taken = text.elsewhere(rng), -1
        if node != ROOT:
            self.expanded.add(node)
        for rank, weight in enumerate(guesses):
            self.order.append(len(self.weight))
            self.weight.append(above + weight)
            self.parent.append(node)
            self.depth.append(depth + 1)
            self.is_true.append(rank == taken)
            self.text.append(number)

    def keep_best(self, budget: int) -> None:
        """Keeps the best nodes of all trees."""
        self.order.sort(key=self.weight.__getitem__, reverse=True)
        del self.order[budget:]

    def frontier(self, width: int, budget: int) -> list[tuple[int, int]]:
        """(rank, node) of the best nodes whose children could still enter."""
        last = self.weight[self.order[-1]] if len(self.order) >= budget else -math.inf
        open_ = [
            (rank, node)
            for rank, node in enumerate(self.order)
            if node not in self.expanded and self.weight[node] > last
        ]
        return open_[:width]

    def tree_of(self, number: int) -> tuple[TokenTree, list[int]]:
        """The tree of a text, and its nodes that come."""
        nodes = [node for node in self.order if self.text[node] == number]
        place = {node: index for index, node in enumerate(nodes)}
        tree = TokenTree(
            tuple(range(len(nodes))),
            tuple(place.get(self.parent[node], ROOT) for node in nodes),
            weights=tuple(self.weight[node] for node in nodes),
        )
        return tree, sorted(place[node] for node in nodes if self.is_true[node])


class Simulation:
    """Writes texts with a policy, each token by token in passes that all share; counts tokens and seconds."""

    def __init__(self, world: World, policy: DraftPolicy, seed: int, num_texts: int = 1) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.sizes: list[int] = []
        self._world, self._policy = world, policy
        self._texts = [Text(world, seed + 1000 * number) for number in range(num_texts)]
        self._positions = [0] * num_texts
        self._rng = random.Random(f"{seed} luck")

    def write(self, num_tokens: int) -> float:
        """Goes on until there are so many tokens of all texts; tokens per second since the beginning."""
        while self.tokens < num_tokens:
            self._step()
        return self.tokens / self.seconds

    def write_for(self, seconds: float) -> int:
        """Goes on for so many seconds; tokens of all texts."""
        while self.seconds < seconds:
            self._step()
        return self.tokens

    def _step(self) -> None:
        forest, true_draft_s, draft_s = self._grow()
        num_texts, num_nodes = len(self._texts), len(forest.order)
        true_verify_s = self._taken(self._world.pass_s(num_texts + num_nodes))
        verify_s = self._told(true_verify_s)
        self.seconds += true_draft_s + true_verify_s
        self.sizes.append(num_nodes)
        trees, paths = zip(*(forest.tree_of(number) for number in range(num_texts)), strict=True)
        times = draft_s + verify_s, draft_s, verify_s, 0.0, 0.0, 0
        steps = []
        for number, (tree, path) in enumerate(zip(trees, paths, strict=True)):
            tokens, position = tuple(range(len(path) + 1)), self._positions[number]
            steps.append(Step(tokens, None, 1, position, len(tree), len(path), 0, *times, num_sharing=num_texts))
            self._positions[number] += len(tokens)
            self.tokens += len(tokens)
        if not isinstance(self._policy, FixedPolicy):  # which learns nothing
            self._policy.record_pass(steps, trees, paths)

    def _grow(self) -> tuple[Forest, float, float]:
        """As `ModelDrafter.grow`: the policy decides, a pass at a time; its seconds, and those that it was told."""
        policy, forest, num_texts = self._policy, Forest(), len(self._texts)
        if not policy.should_draft():
            return forest, 0.0, 0.0
        true_s, draft_s = self._draft(num_texts)
        budget, width = policy.tree_budget, draft_width(policy.tree_budget, num_texts)
        roots = Roots(num_texts, num_texts)
        for number in range(num_texts):
            self._expand(forest, ROOT, number)
        forest.keep_best(budget)
        room = 2 * budget
        while True:
            found = forest.frontier(min(width, room), budget)
            ranks, weights = [rank for rank, _ in found], [forest.weight[node] for _, node in found]
            found = found[: policy.num_to_expand(ranks, weights, roots)]
            if not found:
                break
            room -= len(found)
            for _, node in found:
                self._expand(forest, node, forest.text[node])
            forest.keep_best(budget)
            more_true_s, more_s = self._draft(len(found))
            true_s, draft_s = true_s + more_true_s, draft_s + more_s
        del forest.order[policy.num_to_verify([forest.weight[node] for node in forest.order], roots) :]
        return forest, true_s, draft_s

    def _expand(self, forest: Forest, node: int, number: int) -> None:
        forest.add_children(node, number, self._texts[number], self._positions[number], self._rng)

    def _draft(self, rows: int) -> tuple[float, float]:
        seconds = self._taken(self._world.draft_s(rows))
        told_s = self._told(seconds)
        self._policy.record_draft_pass(rows, told_s)
        return seconds, told_s

    def _taken(self, seconds: float) -> float:
        """Return the seconds of a pass that computes for so many, preemptions included."""
        if self._world.preempted is None or self.seconds // self._world.preempted_for_s % 2:
            return seconds
        every_s, away_s = self._world.preempted
        taken_s, left_s = seconds, seconds - self._rng.expovariate(1 / every_s)
        while left_s > 0:
            taken_s += self._rng.expovariate(1 / away_s)
            left_s -= self._rng.expovariate(1 / every_s)
        return taken_s

    def _told(self, seconds: float) -> float:
        return seconds * math.exp(self._rng.gauss(0.0, self._world.noise))
