"""Draft passes of fixed sizes and their graphs: the trees and texts of passes that are computed one by one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import load_engine, load_model
from support.plans import changed
from support.pretended_gpu import PretendedGpu, move_in
from support.pretended_graphs import CaptureError, StaleGraphError
from support.tiny_models import ARCHITECTURES, VOCAB, make_config, perturbed, random_model, save

from specchat.engine import attention, kv_cache
from specchat.engine.drafting import pass_graphs
from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.pass_graphs import PassGraphs
from specchat.engine.engine import Engine
from specchat.engine.kv_cache import TreeCache
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

CPU = torch.device("cpu")
SAMPLED = Sampling(temperature=0.8, seed=5)
BUDGET, ROWS = 64, 8
Pair = tuple[ModelSource, ModelSource]


def pair_of(architecture: str, folder: Path) -> Pair:
    model = random_model(make_config(architecture))
    return save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of("llama", tmp_path_factory.mktemp("pair"))


def tree_rows(prefix: int, number: int) -> RowLayout:
    """Rows of pass `number`: each sees the prefix, one row of every pass before, and itself."""
    end = (number + 1) * ROWS
    seen = torch.eye(end, dtype=torch.bool)[-ROWS:]
    for earlier in range(number):
        seen[torch.arange(ROWS), earlier * ROWS + (torch.arange(ROWS) * 3 + number) % ROWS] = True
    positions = prefix - 1 + torch.arange(1, number + 2).repeat_interleave(ROWS)
    return RowLayout(prefix, 0, seen, positions)


@contextmanager
def as_many_keys(num_keys: int) -> Iterator[None]:
    """Let passes whose sizes follow the text see as many keys as fixed ones: rows past the end are masked."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv_cache, attention):
            patch.setattr(module, "padded_rows", lambda _: num_keys)
        yield


# --- fixed sizes, on the CPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_scores_have_the_bits_of_other_passes_with_as_many_keys(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beyond a window, too, and after the number of keys has changed."""
    monkeypatch.setattr(pass_graphs, "_LEAST_KEYS", 32)
    source = save(random_model(make_config(architecture)), tmp_path / "model")
    for prefix in (9, 20, 45):
        models = [load_model(source, cache_rows=128) for _ in range(2)]
        graphs = PassGraphs(models[0], records=False)
        for model in models:
            model.append(random_prompt(prefix, VOCAB))
        for number in range(5):
            tokens = torch.tensor(random_prompt(ROWS, VOCAB, seed=number))
            found = graphs.compute(0, tokens, tree_rows(prefix, number))
            keys = 1 << (max(prefix + (number + 1) * ROWS, 32) - 1).bit_length()
            with as_many_keys(keys):
                hidden = models[1].forward(tokens, PassLayout.single(tree_rows(prefix, number)))
            assert torch.equal(found, models[1].logits(hidden))
            assert models[0].cache.lengths == models[1].cache.lengths
            held = slice(0, models[0].cache.lengths[0])
            for mine, other in zip(models[0].cache.layers, models[1].cache.layers, strict=True):
                assert torch.equal(mine.keys[:, :, held], other.keys[:, :, held])
                assert torch.equal(mine.values[:, :, held], other.values[:, :, held])


def text_of(pair: Pair, sampling: Sampling, num_tokens: int = 24) -> tuple[list[int], list[Any]]:
    plan = make_plan(*pair, num_layers=4, tree_budget=BUDGET)
    with load_engine(plan, *pair) as engine:
        text, steps = write(engine, random_prompt(20, VOCAB), sampling, num_tokens)
    return text, [step.tree for step in steps]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_texts_and_trees_are_those_of_other_passes(sampling: Sampling, pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DraftModel, "grows_on_device", True)
    monkeypatch.setattr(pass_graphs, "_LEAST_KEYS", 32)
    expected = text_of(pair, sampling)
    init, passes = PassGraphs.__init__, list[int]()
    monkeypatch.setattr(PassGraphs, "serves", staticmethod(lambda _: True))
    monkeypatch.setattr(PassGraphs, "__init__", lambda self, model: init(self, model, records=False))
    score = TreeModel.score_fixed
    monkeypatch.setattr(TreeModel, "score_fixed", lambda *args: passes.append(1) or score(*args))
    found = text_of(pair, sampling)
    assert passes and found == expected


def test_models_whose_kernels_depend_on_values_are_computed_as_before(tmp_path: Path):
    config = make_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    pair = (save(random_model(config), tmp_path / "target"),) * 2
    with PretendedGpu(), engine_of(pair) as engine:
        assert engine._drafter._scorer._graphs is None


# --- graphs, on a pretended GPU --------------------------------------------------------------------------------------


def engine_of(pair: Pair, **changes: Any) -> Engine:
    num_layers = changes.pop("num_layers", 4)
    plan = make_plan(*pair, num_layers=num_layers, resident=(), tree_budget=BUDGET)
    return load_engine(changed(plan, **{"device": "cuda:0", "in_ram": range(num_layers), **changes}), *pair)


def drawn(pair: Pair, num_tokens: int = 30, **changes: Any) -> tuple[list[int], list[Any], list[int], int]:
    """Text, trees, kernels of drafting by step, and number of recorded passes."""
    with PretendedGpu() as gpu, engine_of(pair, **changes) as engine:
        text, trees, kernels = list[int](), list[Any](), list[int]()
        for step in engine.generate(random_prompt(20, VOCAB), SAMPLED, stop_ids=NOTHING, max_tokens=num_tokens):
            text += step.token_ids
            trees.append(step.tree and (step.tree.tokens, step.tree.parents))
            kernels.append(gpu.counts("drafting")["kernel"])
            gpu.events.clear()
        return text, trees, kernels, engine._drafter._scorer.num_recorded


def check_graphs(pair: Pair, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassGraphs, "serves", staticmethod(lambda _: False))
        expected = drawn(pair, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_graphs, "_LEAST_KEYS", 64)  # the text grows into further sizes
        found = drawn(pair, **changes)
    assert found[:2] == expected[:2]
    assert expected[3] == 0 and found[3] >= 2
    assert 2 * sum(found[2][2:]) < sum(expected[2][2:])


def test_graphs_grow_the_same_trees_in_fewer_launches(pair: Pair):
    check_graphs(pair)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_graphs_of_every_architecture(architecture: str, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        num_layers = make_config(architecture).num_hidden_layers
        check_graphs(pair_of(architecture, tmp_path), num_layers=num_layers)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_graphs_of_quantized_drafts(quant: str, pair: Pair):
    check_graphs(pair, draft_quant=quant)


def test_a_draft_pass_is_one_launch(pair: Pair):
    with PretendedGpu() as gpu:
        model = load_model(pair[1], cache_rows=600, device=torch.device("cuda:0"))
        graphs = PassGraphs(model)
        model.append(random_prompt(20, VOCAB))
        scores, counts = list[torch.Tensor](), list[int]()
        for _ in range(4):
            model.cache.truncate(0, 20)
            rows = tree_rows(20, 0)
            move_in(rows.ancestors, torch.device("cuda:0"))
            move_in(rows.positions, torch.device("cuda:0"))
            tokens = torch.tensor(random_prompt(ROWS, VOCAB), device="cuda:0")
            gpu.events.clear()
            scores.append(graphs.compute(0, tokens, rows).clone())
            counts.append(gpu.counts()["kernel"])
        assert graphs.num_recorded == 1 and all(torch.equal(each, scores[0]) for each in scores)
        assert counts[1] == counts[2] == counts[3] <= 15 and counts[0] > 150


@pytest.mark.slow
def test_what_cannot_be_recorded_is_computed_and_said_once(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    score = TreeModel.score_fixed

    def looking(model: TreeModel, layout: Any) -> torch.Tensor:
        assert layout.rows.ids[0].item() >= 0
        return score(model, layout)

    expected = drawn(pair, num_tokens=12)
    monkeypatch.setattr(TreeModel, "score_fixed", looking)
    with PretendedGpu(), engine_of(pair) as engine:
        texts = [write(engine, random_prompt(20, VOCAB), SAMPLED, 12) for _ in range(2)]
    assert texts[0][0] == texts[1][0] == expected[0]
    (told,) = [step.warning for _, steps in texts for step in steps if step.warning is not None]
    assert told.startswith("draft passes cannot be recorded as CUDA graphs") and "\n" not in told


# --- planted faults --------------------------------------------------------------------------------------------------


def test_a_graph_of_a_cache_that_has_moved_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """And without the fault, recordings are dropped together with the cache that they belong to."""
    monkeypatch.setattr(pass_graphs, "_LEAST_KEYS", 64)

    def answer() -> list[int]:
        with PretendedGpu(), engine_of(pair, ctx=200) as engine:
            text, _ = write(engine, random_prompt(20, VOCAB), SAMPLED, 10)
            draft = engine._drafter.models[0]
            draft.cache.resize(draft.cache.capacity + 64)
            return text + write(engine, random_prompt(20, VOCAB, seed=3), SAMPLED, 6)[0]

    assert answer()
    monkeypatch.setattr(TreeCache, "addresses", ())
    with pytest.raises(StaleGraphError):
        answer()


def test_a_new_tensor_in_place_of_a_recorded_one_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """A graph reads the old tensor, which is freed."""
    compute = PassGraphs.compute

    def replacing(graphs: PassGraphs, seat: int, tokens: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        for recording in graphs._passes.values():
            recording.layout.rows.ids = tokens.clone()
        return compute(graphs, seat, tokens, layout)

    monkeypatch.setattr(PassGraphs, "compute", replacing)
    with pytest.raises(StaleGraphError):
        drawn(pair)


def test_recording_computes_nothing_and_refuses_waits():
    with PretendedGpu() as gpu, torch.inference_mode():
        there, out = torch.ones(3, device="cuda:0"), torch.zeros(3, device="cuda:0")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = there * 2
            out.add_(made)
        assert out.tolist() == [0, 0, 0] and made.isnan().all()
        there.fill_(3)
        gpu.events.clear()
        graph.replay()
        assert gpu.counts() == {"kernel": 1} and out.tolist() == [6, 6, 6]
        with pytest.raises(CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            there.sum().item()
        del there
        with pytest.raises(StaleGraphError):
            graph.replay()
