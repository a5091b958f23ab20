"""Draft trees: relations against brute force, and growth against an exact best-first search."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import grow, random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting.drafter import ModelDrafter
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.policy import FixedPolicy
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.engine.kv_cache import keep_together
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Noise, Sampler
from specchat.engine.tree import ROOT, TokenTree, common_prefix
from specchat.records.generation import Guesses, Sampling, SourceWork, Step, guesses_of
from specchat.records.model import ModelSource

CPU = torch.device("cpu")
Path = tuple[int, ...]

# --- relations in a tree ---------------------------------------------------------------------------------------------


@st.composite
def token_trees(draw: st.DrawFn, tree_budget: int = 40) -> TokenTree:
    """Draw a tree whose parents precede their children and whose siblings differ."""
    num_nodes = draw(st.integers(0, tree_budget))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(num_nodes)]
    first_token = draw(st.integers(0, 5))
    tokens = [first_token + parents[:node].count(parents[node]) for node in range(num_nodes)]
    return TokenTree(tuple(tokens), tuple(parents))


def path_to(tree: TokenTree, node: int) -> list[int]:
    """Return the nodes from the root's child down to `node`."""
    return [] if node == ROOT else [*path_to(tree, tree.parents[node]), node]


@given(tree=token_trees())
@settings(deadline=None, max_examples=100)
def test_relations_equal_brute_force(tree: TokenTree):
    nodes = range(len(tree))
    assert tree.ancestors.shape == (len(tree), len(tree)) and tree.ancestors.dtype == torch.bool
    for node in nodes:
        path = path_to(tree, node)
        assert tree.depths[node] == len(path)
        assert tree.ancestors[node].nonzero()[:, 0].tolist() == path
        assert tree.children[tree.parents[node], tree.tokens[node]] == node
    assert len(tree.children) == len(tree)


@given(tree=token_trees(), limit=st.integers(0, 12), data=st.data())
@settings(deadline=None, max_examples=100)
def test_likely_descendants_equal_brute_force(tree: TokenTree, limit: int, data: st.DataObject):
    top = data.draw(st.integers(ROOT, len(tree) - 1))
    below = [node for node in range(len(tree)) if node != top and (top == ROOT or top in path_to(tree, node))]
    assert tree.likely_descendants(top, limit) == below[:limit]


@given(a=st.lists(st.integers(0, 2)), b=st.lists(st.integers(0, 2)))
@settings(deadline=None)
def test_common_prefix(a: list[int], b: list[int]):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
    assert common_prefix(a, tuple(b)) == n


# --- the best paths so far -------------------------------------------------------------------------------------------


def paths_of(candidates: Paths) -> list[Path]:
    paths: list[Path] = []
    for token, parent in zip(candidates.token.tolist(), candidates.parent.tolist(), strict=True):
        assert parent < len(paths), "a parent comes first"
        paths.append((*(() if parent == ROOT else paths[parent]), token))
    return paths


# 0 is what a float32 softmax gives that is sure of itself.
LOG_WEIGHTS = st.one_of(st.just(0.0), st.floats(-30.0, -1e-6))


@given(data=st.data(), budget=st.integers(1, 20), branch=st.integers(1, 4), rounds=st.integers(1, 5))
@settings(deadline=None, max_examples=100)
def test_candidates_keep_exactly_the_best(data: st.DataObject, budget: int, branch: int, rounds: int):
    candidates = Paths.empty()
    scores: dict[Path, float] = {}
    expanded: dict[Path, int] = {}
    parents, num_rows = [ROOT], 0
    for _ in range(rounds):
        children = torch.tensor(data.draw(weight_rows(len(parents), branch)), dtype=torch.float64)
        tokens = torch.arange(branch).repeat(len(parents), 1)
        before = paths_of(candidates)
        trees = torch.zeros(len(parents), dtype=torch.int64)
        candidates = candidates.with_children(trees, torch.tensor(parents), children, tokens, budget)
        for parent, row in zip(parents, children.tolist(), strict=True):
            path = () if parent == ROOT else before[parent]
            for token, weight in enumerate(row):
                scores[(*path, token)] = (scores[path] if path else 0.0) + min(weight, -1e-9)

        kept = paths_of(candidates)
        assert len(set(kept)) == len(kept) == min(budget, len(scores))
        assert candidates.score.tolist() == sorted((scores[path] for path in kept), reverse=True)
        dropped = scores.keys() - set(kept)
        assert all(scores[path] <= float(candidates.score[-1]) for path in dropped)
        assert candidates.depth.tolist() == [len(path) for path in kept]
        assert candidates.row.tolist() == [expanded.get(path, -1) for path in kept]
        scores = {path: scores[path] for path in kept}  # what was dropped once can never come back

        open_ = [node for node in range(len(kept)) if candidates.row[node] < 0]
        parents = data.draw(st.lists(st.sampled_from(open_), unique=True, max_size=3)) if open_ else []
        if not parents:
            return
        for node in parents:
            candidates.row[node] = expanded[kept[node]] = num_rows
            num_rows += 1


def weight_rows(num_rows: int, branch: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(LOG_WEIGHTS, min_size=branch, max_size=branch), min_size=num_rows, max_size=num_rows)


@given(data=st.data(), budget=st.integers(1, 12), width=st.integers(1, 6), max_depth=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_frontier_is_the_best_nodes_that_can_still_enter(data: st.DataObject, budget: int, width: int, max_depth: int):
    """The nodes are unexpanded, above the last level and, with a full budget, better than the worst kept path."""
    scores = sorted(data.draw(st.lists(st.floats(-9, 0), min_size=1, max_size=budget, unique=True)), reverse=True)
    n = len(scores)
    depths = [data.draw(st.integers(1, max_depth)) for _ in range(n)]
    rows = [data.draw(st.integers(-1, 1)) for _ in range(n)]
    none, weights = [0] * n, torch.tensor(scores, dtype=torch.float64)
    ints = [torch.tensor(x, dtype=torch.int64) for x in (none, [ROOT] * n, depths, none, none, rows, none)]
    candidates = Paths(torch.stack([weights, weights]), torch.stack(ints))
    expected = [i for i in range(n) if rows[i] < 0 and depths[i] < max_depth and (n < budget or scores[i] > scores[-1])]
    assert candidates.frontier(width, budget, torch.tensor([max_depth])).tolist() == expected[:width]


# --- growth ----------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    plain: Any
    source: ModelSource


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    config = make_config("llama")
    config.num_hidden_layers = 2
    model = random_model(config, seed=8)
    return Draft(model, save(model, tmp_path_factory.mktemp("growth") / "draft"))


def load(draft: Draft, rows: int) -> TreeModel:
    return load_model(
        draft.source, dtype=torch.float32, device=CPU, resident=None, num_slots=0, cache_rows=rows, chunk_rows=512
    )


GREEDY = Sampling()
WARM = Sampling(temperature=0.4, seed=21)


def log_weights(logits: torch.Tensor, position: int, sampling: Sampling, shared_noise: bool) -> torch.Tensor:
    """Return the weights that rank children at `position`, by the design's formula."""
    if sampling.greedy:
        return torch.log_softmax(logits / SMALL_DRAFT.greedy, -1)
    scores = logits / sampling.temperature
    if not shared_noise:
        return torch.log_softmax(scores, -1)
    return torch.log_softmax((scores + Noise(sampling.seed, VOCAB, CPU).row(position)) / SMALL_DRAFT.noise, -1)


@torch.inference_mode()
def best_paths(
    draft: Draft, context: list[int], num_paths: int, max_depth: int, weigh: Callable[[torch.Tensor, int], torch.Tensor]
) -> dict[Path, float]:
    """Return the likeliest paths with their scores, best first, by one transformers forward pass per path."""
    found: dict[Path, float] = {}
    queue: list[tuple[float, Path]] = [(0.0, ())]
    while len(found) <= num_paths and queue:
        cost, path = heapq.heappop(queue)
        found[path] = -cost
        if len(path) < max_depth:
            tokens = [*context, *path]
            weights = weigh(draft.plain(torch.tensor([tokens])).logits[0, -1], len(tokens)).double().tolist()
            for token, weight in enumerate(weights):
                heapq.heappush(queue, (cost - weight, (*path, token)))
    del found[()]
    return found


def check_growth(tree: TokenTree, best: dict[Path, float], budget: int) -> None:
    """Check that both hold the same paths in the same order, except for near-ties at the threshold."""
    paths: list[Path] = [tuple(tree.tokens[n] for n in path_to(tree, node)) for node in range(len(tree))]
    assert len(set(paths)) == len(paths) == min(budget, len(best))
    threshold = min(best.values())
    different = set(paths) ^ set(best)
    assert all(abs(best.get(path, threshold) - threshold) < 1e-4 for path in different), different
    assert len(different) <= 2
    scores = [best.get(path, threshold) for path in paths]
    assert all(after < before + 1e-4 for before, after in itertools.pairwise(scores))


@pytest.mark.parametrize("max_depth", [2, 100])
@pytest.mark.parametrize("budget", [1, 7, 40])
@pytest.mark.parametrize("kind", ["greedy", "shared noise", "own guesses"])
def test_tree_is_the_likeliest_paths(draft: Draft, kind: str, budget: int, max_depth: int):
    sampling, shared = GREEDY if kind == "greedy" else WARM, kind == "shared noise"
    drafter = ModelDrafter(
        load(draft, 600), max_rows=500, max_context=512, branch=min(budget, VOCAB), shared_noise=shared
    )
    sampler = Sampler(sampling, VOCAB, CPU)
    for seed in (1, 2):
        context = random_prompt(9, VOCAB, seed)
        tree = grow(drafter, context, FixedPolicy(budget), max_depth, sampler, None)
        best = best_paths(
            draft, context, budget, max_depth, lambda logits, position: log_weights(logits, position, sampling, shared)
        )
        check_growth(tree, best, budget)
        if budget == 40:
            assert max(tree.depths) == 2 if max_depth == 2 else max(tree.depths) > 2


@given(data=st.data(), sampled=st.booleans(), max_rows=st.sampled_from([3, 48]))
@settings(deadline=None, max_examples=8)
def test_growth_continues_from_the_accepted_path(draft: Draft, data: st.DataObject, sampled: bool, max_rows: int):
    """The draft's cache after commit() is worth as much as a fresh one, whichever path was accepted.

    With few rows most nodes were never expanded, so that an accepted path's end is not in the cache.
    """
    sampler = Sampler(WARM if sampled else GREEDY, VOCAB, CPU)
    drafter = ModelDrafter(load(draft, 160), max_rows=max_rows, max_context=512)
    context = random_prompt(6, VOCAB, data.draw(st.integers(0, 50)))
    for _ in range(4):
        tree = grow(drafter, context, FixedPolicy(16), 20, sampler, None)
        fresh = ModelDrafter(load(draft, 160), max_rows=max_rows, max_context=512)
        expected = grow(fresh, context, FixedPolicy(16), 20, sampler, None)
        assert set(named(tree)) == set(named(expected))
        path = path_to(tree, data.draw(st.integers(ROOT, len(tree) - 1)))
        keep_together(drafter.commit(0, path, []))
        context = [*context, *(tree.tokens[node] for node in path), data.draw(st.integers(3, VOCAB - 1))]
        if data.draw(st.booleans()):  # the text goes back, as after /undo or a shorter answer
            context = context[: data.draw(st.integers(1, len(context)))]


def named(tree: TokenTree) -> list[Path]:
    return [tuple(tree.tokens[n] for n in path_to(tree, node)) for node in range(len(tree))]


@pytest.mark.parametrize("max_rows", [1, 5, 11])
def test_few_rows_shrink_the_search_but_keep_it_correct(draft: Draft, max_rows: int):
    drafter = ModelDrafter(load(draft, 60), max_rows=max_rows, max_context=512)
    context = random_prompt(9, VOCAB)
    tree = grow(drafter, context, FixedPolicy(24), 50, Sampler(GREEDY, VOCAB, CPU), None)
    assert len(tree) <= 24
    assert len({parent for parent in tree.parents if parent != ROOT}) <= max_rows
    best = best_paths(draft, context, 24, 50, lambda logits, position: log_weights(logits, position, GREEDY, False))
    assert named(tree)[0] == next(iter(best))  # the first guess costs no row


@pytest.mark.parametrize("left", [0, 1, 3])
def test_tree_ends_where_the_drafts_positions_end(draft: Draft, left: int):
    """A draft with a shorter context than the target drafts up to its last position."""
    context = random_prompt(12, VOCAB)
    drafter = ModelDrafter(load(draft, 60), max_rows=32, max_context=len(context) + left, branch=1)
    tree = grow(drafter, context, FixedPolicy(16), 50, Sampler(GREEDY, VOCAB, CPU), None)
    assert tree.depths == tuple(range(1, left + 1))  # a chain, as nodes have one child here
    keep_together(drafter.commit(0, path_to(tree, len(tree) - 1), []))
    assert len(grow(drafter, [*context, *[4] * 60], FixedPolicy(16), 50, Sampler(GREEDY, VOCAB, CPU), None)) == 0


def test_no_depth_or_budget_gives_an_empty_tree(draft: Draft):
    drafter = ModelDrafter(load(draft, 60), max_rows=32, max_context=512)
    for budget, max_depth in ((0, 5), (5, 0)):
        assert len(grow(drafter, [3, 4], FixedPolicy(budget), max_depth, Sampler(GREEDY, VOCAB, CPU), None)) == 0
        keep_together(drafter.commit(0, [], []))
    assert len(grow(drafter, [3, 4], FixedPolicy(5), 5, Sampler(GREEDY, VOCAB, CPU), None)) == 5


def test_by_source_counts_nodes_per_drafter():
    tree = TokenTree((5, 6, 7, 8), (ROOT, 0, ROOT, 2), ("model", "context", "context", "context"))
    assert tree.by_source([0, 1]) == (Guesses("context", 3, 1, (1, 2), (0, 1)), Guesses("model", 1, 1, (1,), (1,)))
    assert tree.by_source([]) == (Guesses("context", 3, 0, (1, 2)), Guesses("model", 1, 0, (1,)))
    assert TokenTree((5,), (ROOT,)).by_source([0]) == TokenTree().by_source([]) == ()
    work = [SourceWork("model", 0.5, 3), SourceWork("other", 0.1)]
    model, other = TokenTree((5,), (ROOT,), ("model",)).by_source([], work)
    assert (model, other) == (Guesses("model", 1, 0, (1,), (), 0.5, 3), Guesses("other", 0, 0, draft_s=0.1))


def test_guesses_are_summed_over_steps_and_sharing_answers():
    step = replace(Step.without_pass("stop"), guesses=(Guesses("model", 2, 1, (1, 1), (1,), 0.5, 4),), num_sharing=2)
    more = replace(step, guesses=(Guesses("a", 1, 0, (0, 0, 1)), *step.guesses), num_sharing=1)
    assert guesses_of([step, more]) == (Guesses("a", 1, 0, (0, 0, 1)), Guesses("model", 4, 2, (2, 2), (2,), 0.75, 6))
