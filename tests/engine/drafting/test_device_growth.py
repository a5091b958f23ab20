"""Trees that grow on a device equal those of `Growth`, which reads the scores of every pass; both compute on a CPU."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting import device_growth
from specchat.engine.drafting.device_growth import DeviceGrowth, _Chosen, _Rule, _Tree
from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.drafter import TreeDrafter, grows_on_device
from specchat.engine.drafting.growth import Growth, Sources
from specchat.engine.drafting.paths import Paths
from specchat.engine.drafting.policy import AdaptivePolicy, DraftPolicy, FixedPolicy, Roots
from specchat.engine.drafting.proposers import Proposers
from specchat.engine.drafting.sources import Priors, Proposal
from specchat.engine.kv_cache import keep_together
from specchat.engine.model import PassCancelledError
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import TokenTree
from specchat.records.generation import Sampling
from specchat.records.limits import DRAFT_BRANCH
from specchat.records.plan import Expectation

CPU = torch.device("cpu")
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, seed=5)
MOST_ROWS = 256


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> DraftModel:
    source = save(random_model(make_config("llama")), tmp_path_factory.mktemp("draft") / "model")
    model = load_model(source, cache_rows=80 + MOST_ROWS, chunk_rows=128)
    return DraftModel(model, max_rows=MOST_ROWS, max_context=400)


class Frozen(AdaptivePolicy):
    """A policy that learns nothing of draft passes, so that both growths decide alike."""

    def record_draft_pass(self, rows: int, seconds: float) -> None:
        pass


def learned(tree_budget: int, draft_s: float, row_s: float, seed: int) -> Frozen:
    """A policy that has seen trees in which some nodes were accepted."""
    passes = tuple((rows, 0.1 + row_s * rows) for rows in (1, 2, 5, 17, 65, 129))
    policy = Frozen(tree_budget, Expectation(passes, ((1, draft_s), (16, 1.5 * draft_s)), 16, 4.0, 3.0))
    rng = random.Random(seed)
    for _ in range(5):
        weights = sorted((-8 * rng.random() for _ in range(20)), reverse=True)
        tree = TokenTree(tuple(range(20)), tuple(range(-1, 19)), weights=tuple(weights))
        policy._acceptance.add(tree, range(rng.randrange(6)))
    return policy


def sequence_of(length: int, sampling: Sampling, max_length: int = 400, vocab_size: int = VOCAB) -> TokenSequence:
    sampler = Sampler(sampling, vocab_size, CPU)
    return TokenSequence(
        0, 0, random_prompt(length, VOCAB, seed=length), length - 1, sampler, frozenset(), max_length, "length"
    )


def grown(
    scorer: DraftModel,
    sequence: TokenSequence,
    policy: DraftPolicy,
    *,
    shared_noise: bool = True,
    branch: int = DRAFT_BRANCH,
    num_passes: int = 3,
) -> tuple[Paths, Paths, DeviceGrowth]:
    """The tree of the slow reference, and the one of a device."""
    sources = Sources(scorer, Proposers((), first=1), branch, shared_noise)
    expected = Growth(sources, [sequence], policy, Roots(), None).run()
    growth = DeviceGrowth(
        scorer,
        sequence,
        policy,
        Roots(),
        branch=branch,
        shared_noise=shared_noise,
        num_passes=num_passes,
        cancel=None,
    )
    return expected, growth.run(), growth


def check_equal(expected: Paths, found: Paths) -> None:
    for name in ("token", "parent", "depth", "tree", "source", "asked"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert ((found.row >= 0) == (expected.row >= 0)).all()
    assert torch.allclose(found.score, expected.score, atol=1e-4)
    assert torch.allclose(found.edge, expected.edge, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree_budget", [1, 4, 16, 64, 100])
def test_the_tree_is_that_of_the_reference(tree_budget: int, sampling: Sampling, scorer: DraftModel):
    for length, num_passes in ((20, 1), (33, 30), (47, 8)):
        expected, found, growth = grown(
            scorer, sequence_of(length, sampling), FixedPolicy(tree_budget), num_passes=num_passes
        )
        check_equal(expected, found)
        assert len(found) == tree_budget
        assert growth.passes > growth.useful_passes


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("draft_s", "row_s"), [(0.001, 0.0), (0.01, 0.001), (0.03, 0.01), (0.2, 0.03)])
def test_a_tree_ends_when_another_pass_is_not_worth_its_time(
    draft_s: float, row_s: float, sampling: Sampling, scorer: DraftModel
):
    sizes = set[int]()
    for seed in range(4):
        policy = learned(64, draft_s, row_s, seed)
        expected, found, _ = grown(scorer, sequence_of(20 + seed, sampling), policy)
        check_equal(expected, found)
        sizes.add(len(found))
    assert draft_s < 0.03 or max(sizes) < 64


@pytest.mark.parametrize(
    "changes",
    [{"max_length": 24}, {"vocab_size": VOCAB - 9}, {"vocab_size": 5}],
    ids=lambda each: "-".join(map(str, each.items())),
)
def test_limits_of_depth_and_vocabulary(changes: dict[str, int], scorer: DraftModel):
    for sampling in (GREEDY, SAMPLED):
        check_equal(*grown(scorer, sequence_of(20, sampling, **changes), FixedPolicy(64))[:2])


def test_noise_that_is_not_shared_and_few_children(scorer: DraftModel):
    check_equal(*grown(scorer, sequence_of(21, SAMPLED), FixedPolicy(48), shared_noise=False, branch=3)[:2])


def test_accepted_rows_are_those_of_the_nodes(scorer: DraftModel):
    """The draft reads the accepted path from its cache in the next tree; a fresh cache gives the same tree."""
    sequence = sequence_of(20, GREEDY)
    _, found, _ = grown(scorer, sequence, FixedPolicy(64))
    path = [int(found.row.nonzero()[-1, 0])]
    path = path if found.row[path[0]] >= 0 else [int((found.row >= 0).nonzero()[-1, 0])]
    while found.parent[path[0]] >= 0:
        path.insert(0, int(found.parent[path[0]]))
    keep_together(scorer.commit(0, found.row[path].tolist(), found.token[path].tolist()))
    sequence.tokens += [*found.token[path].tolist(), 7]
    following = grown(scorer, sequence, FixedPolicy(64))[1]
    scorer.reset()
    check_equal(grown(scorer, sequence, FixedPolicy(64))[0], following)


def test_useless_scores_are_told(scorer: DraftModel, monkeypatch: pytest.MonkeyPatch):
    compute = DraftModel.compute
    monkeypatch.setattr(DraftModel, "compute", lambda *args: compute(*args).index_fill(1, torch.tensor([3]), math.nan))
    with pytest.raises(ScoresNotFiniteError):
        grown(scorer, sequence_of(20, GREEDY), FixedPolicy(64))


def test_growth_reads_the_tree_again_only_while_it_grows(scorer: DraftModel, monkeypatch: pytest.MonkeyPatch):
    reads = list[int]()
    read = _Tree.read
    monkeypatch.setattr(_Tree, "read", lambda tree: reads.append(1) or read(tree))
    *_, growth = grown(scorer, sequence_of(20, GREEDY), FixedPolicy(64), num_passes=30)
    needed, reads[:] = growth.useful_passes, []
    grown(scorer, sequence_of(20, GREEDY), FixedPolicy(64), num_passes=needed)
    assert len(reads) == 1
    grown(scorer, sequence_of(20, GREEDY), FixedPolicy(64), num_passes=needed - device_growth._MORE_PASSES)
    assert len(reads) == 3


@given(
    weights=st.lists(st.floats(-12, -1e-9), max_size=8),
    seed=st.integers(0, 99),
    draft_s=st.floats(1e-4, 0.3),
    row_s=st.floats(0, 0.03),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_the_rule_of_a_device_is_that_of_the_policy(
    weights: list[float], seed: int, draft_s: float, row_s: float, data: st.DataObject
):
    policy, roots = learned(64, draft_s, row_s, seed), Roots(1, data.draw(st.integers(1, 40)))
    weights.sort(reverse=True)
    ranks = sorted(data.draw(st.sets(st.integers(0, 62), min_size=len(weights), max_size=len(weights))))
    missing = 8 - len(ranks)
    nodes = torch.tensor([*ranks, *[63] * missing])
    scores = torch.tensor([*weights, *[-math.inf] * missing], dtype=torch.float64)
    chosen = _Chosen(nodes, torch.arange(8) < len(ranks), scores, torch.zeros(4, 8, dtype=torch.int64))
    tables = policy.expansion_tables(8, roots)
    found = _Rule(tables, tables.packed()).worth_their_time(chosen)
    expected = policy.num_to_expand(ranks, weights, roots)
    assert found.are_chosen.tolist() == [place < expected for place in range(8)]


def test_a_cancelled_growth_stops(scorer: DraftModel):
    cancel = threading.Event()
    growth = DeviceGrowth(
        scorer,
        sequence_of(20, GREEDY),
        FixedPolicy(16),
        Roots(),
        branch=DRAFT_BRANCH,
        shared_noise=True,
        num_passes=2,
        cancel=cancel,
    )
    cancel.set()
    with pytest.raises(PassCancelledError):
        growth.run()


class Useless:
    """A source whose proposals never come."""

    name = "useless"
    priors = Priors(alone=(0.0,), beside=(-3.0,), beside_sampled=(-3.0,))

    def begin(self, sequences: Sequence[TokenSequence]) -> None:
        pass

    def propose(self, seat: int, tail: Sequence[int], luck: torch.Tensor | None) -> list[Proposal]:
        return [Proposal(7, 0)]

    def observe(self, tails: Sequence[Sequence[int]], scores: torch.Tensor) -> None:
        pass

    def reset(self) -> None:
        pass


def test_trees_grow_on_the_device_while_no_other_source_is_asked(scorer: DraftModel, monkeypatch: pytest.MonkeyPatch):
    grown_there = list[bool]()
    monkeypatch.setattr(DraftModel, "grows_on_device", True)
    run = DeviceGrowth.run
    monkeypatch.setattr(DeviceGrowth, "run", lambda growth: grown_there.append(True) or run(growth))
    policy, sequence = FixedPolicy(8, tokens_per_s=5.0), sequence_of(20, GREEDY)
    for proposers in ([], [Useless()]):
        drafter = TreeDrafter(scorer, proposers)
        found = []
        for _ in range(40):
            before = len(grown_there)
            (tree,) = drafter.grow([sequence], policy, None)
            found.append(len(grown_there) > before)
            assert len(tree) == 8 and all(found) == (not proposers)
            keep_together(drafter.commit(0, [], []))
        assert found[-1]
    two = [sequence, replace(sequence, seat=0)]
    assert not grows_on_device(scorer, two) and grows_on_device(scorer, two[:1])
