"""DFlash2 heads: scores and trees equal a slow reference, and depend on the parent's token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dflash import BLOCK, Reader, load_pair, save_dflash
from support.dflash2 import TOP, Saved, save_dflash2, slow_levels, slow_scores
from support.engines import random_prompt
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting.drafter import TreeDrafter
from specchat.engine.drafting.policy import FixedPolicy
from specchat.engine.tree import last_tokens
from specchat.models.checkpoint.dflash import SecondConfig
from specchat.models.hf.dflash2 import BlockConvolution
from specchat.records.model import ModelSource

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelSource]:
    model = random_model(make_config("qwen3"))
    return model, save(model, tmp_path_factory.mktemp("target") / "qwen3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_dflash2(tmp_path_factory.mktemp("heads") / "head")


def check_level(ours: torch.Tensor, expected: dict[int, float]) -> None:
    """Compare the scores of candidates; all other tokens come last."""
    assert set(ours.topk(TOP).indices.tolist()) == expected.keys()
    assert all(abs(float(ours[token]) - score) < TOLERANCE * max(1, abs(score)) for token, score in expected.items())
    others = ours[[token for token in range(VOCAB) if token not in expected]]
    assert float(others.max()) < min(expected.values())


def test_scores_equal_a_slow_reference(target: tuple[Any, ModelSource], saved: Saved):
    """Below different parents, after the prompt and after two accepted tokens."""
    (model, source), text = target, random_prompt(30, VOCAB)
    reader = Reader(load_pair(source, saved.source, chunk_rows=8))
    for first, end in ((0, 20), (20, 23)):
        reader.read(text[first:end], text[end])
        slow = slow_levels(model, saved, text[: end + 1])
        for chain in ([7, 9, 11, 13], [8, 9, 2, 3]):
            scores = reader.levels(text[end], chain)
            for ours, level, parent in zip(scores, slow, [text[end], *chain], strict=True):
                check_level(ours, slow_scores(saved, level, parent))


def test_the_parents_token_matters(target: tuple[Any, ModelSource], saved: Saved):
    text = random_prompt(20, VOCAB)
    reader = Reader(load_pair(target[1], saved.source))
    reader.read(text[:-1], text[-1])
    ours, other = (reader.levels(text[-1], [first, 9, 9, 9]) for first in (7, 8))
    assert torch.equal(ours[0], other[0]) and torch.equal(ours[2:], other[2:])
    assert not torch.allclose(ours[1], other[1])


def test_rows_of_different_blocks_do_not_mix():
    convolution = BlockConvolution(32, SecondConfig(3, 8, 4, 4, 1.0, 1.0, 0.0), torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in convolution.parameters():
        parameter.data.normal_(generator=generator)
    convolution.block_rows = 5
    rows = torch.randn(1, 10, 32, generator=generator)
    together = convolution(rows, convolution.coefficients(rows)[1])
    apart = [convolution(each, convolution.coefficients(each)[1]) for each in rows.split(5, dim=1)]
    assert torch.allclose(together, torch.cat(apart, dim=1), atol=1e-5)


Level = Callable[[int, int], dict[int, float]]  # depth and parent's token -> scores


def best_paths(level: Level, last: int, budget: int) -> set[tuple[int, ...]]:
    """The best paths among all, by the product of the softmax of their tokens."""
    found: list[tuple[float, tuple[int, ...]]] = []
    open_paths: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for depth in range(BLOCK - 1):
        further = []
        for weight, path in open_paths:
            scores = level(depth, path[-1] if path else last)
            total = math.log(sum(math.exp(2 * score) for score in scores.values()))  # temperature 0.5
            further += [(weight + 2 * score - total, (*path, token)) for token, score in scores.items()]
        open_paths = sorted(further, reverse=True)[: 4 * budget]
        found += open_paths
    return {path for _, path in sorted(found, reverse=True)[:budget]}


@pytest.mark.parametrize("kind", ["DFlash", "DFlash2"])
def test_a_tree_holds_the_best_paths(target: tuple[Any, ModelSource], saved: Saved, tmp_path: Path, kind: str):
    """DDTree: the best products of all combinations of the levels, without a further pass."""
    (_, source), text, budget = target, random_prompt(20, VOCAB), 24
    head = saved.source if kind == "DFlash2" else save_dflash(tmp_path / "head").source
    reader = Reader(load_pair(source, head))
    reader.read(text[:-1], text[-1])
    skeleton, drafter = reader.head._model.skeleton, TreeDrafter(reader.head, branch=VOCAB)
    reader.head.begin([reader.sequence(text[-1])], None)
    logits, states = reader.head._levels[0], reader.head._states[0]

    def level(depth: int, parent: int) -> dict[int, float]:
        own = logits[depth : depth + 1].clone(), states[depth : depth + 1]
        scores = skeleton.scores(*own, torch.tensor([parent]))[0]
        best = scores.topk(TOP if kind == "DFlash2" else VOCAB)
        return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    expected = best_paths(level, text[-1], budget)
    (tree,) = drafter.grow([reader.sequence(text[-1])], FixedPolicy(budget), None)
    paths = [last_tokens([], tree.tokens, tree.parents, node, BLOCK) for node in range(budget)]
    assert set(map(tuple, paths)) == expected
    assert len({len(path) for path in expected}) >= 2 and drafter.work[0].draft_passes == 1
