"""A model computes the same rows in one pass or several, in chunks, streamed or resident."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.engines import random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.model import ModelSource

CPU = torch.device("cpu")
PREFILL_ARCHITECTURES = ("llama", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss", "cohere2", "deepseek_v3")

# Relative to the largest score. Float32 rounding in other batch shapes; a wrong row, mask or position is near 1.
TOLERANCE = 2e-5


@dataclass
class Checkpoints:
    """Tiny models and their folders, created on first use."""

    root: Path
    made: dict[str, tuple[Any, ModelSource]] = field(default_factory=dict)

    def get(self, architecture: str) -> tuple[Any, ModelSource]:
        if architecture not in self.made:
            model = random_model(make_config(architecture))
            self.made[architecture] = model, save(model, self.root / architecture)
        return self.made[architecture]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("models"))


def load(
    source: ModelSource,
    *,
    chunk_rows: int = 512,
    resident: tuple[int, ...] | None = None,
    num_slots: int = 0,
) -> TreeModel:
    return load_model(
        source,
        dtype=torch.float32,
        device=CPU,
        resident=resident,
        num_slots=num_slots,
        cache_rows=96,
        chunk_rows=chunk_rows,
    )


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def plain_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return transformers' own scores of every row: [S, V]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


# --- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", PREFILL_ARCHITECTURES)
def test_one_pass_chunked_and_plain_prefill_agree(checkpoints: Checkpoints, architecture: str):
    """The prompt is long enough that the first chunks leave the sliding window."""
    plain, source = checkpoints.get(architecture)
    prompt = random_prompt(45, VOCAB)
    theirs = plain_logits(plain, prompt)

    models = {"single pass": load(source), "row chunks": load(source, chunk_rows=7), "appends": load(source)}
    ours = {name: models[name].logits(models[name].append(prompt)) for name in ("single pass", "row chunks")}
    parts = [models["appends"].append(prompt[begin:end]) for begin, end in itertools.pairwise((0, 13, 14, 33, 45))]
    ours["appends"] = models["appends"].logits(torch.cat(parts))
    for name, logits in ours.items():
        assert error(logits, theirs) < TOLERANCE, name
        rows = zip(models[name].cache.layers, models["single pass"].cache.layers, strict=True)
        for one, other in rows:
            assert error(one.keys[:, :, :45], other.keys[:, :, :45]) < TOLERANCE, name
            assert error(one.values[:, :, :45], other.values[:, :, :45]) < TOLERANCE, name


@pytest.mark.parametrize("chunk_rows", [1, 4, 10, 512])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_prompt_and_tree_in_one_pass(checkpoints: Checkpoints, architecture: str, chunk_rows: int):
    """Each path of a fused first pass, in chunks that end anywhere, scores as in transformers alone."""
    plain, source = checkpoints.get(architecture)
    model = load(source, chunk_rows=chunk_rows)
    cached, pending = random_prompt(6, VOCAB, 1), random_prompt(19, VOCAB, 2)
    tree = TokenTree((5, 9, 11, 7, 5, 13, 20), (ROOT, ROOT, 0, 0, 2, 4, 1))
    model.append(cached)
    root = len(cached) + len(pending) - 1
    positions = [*range(len(cached), root + 1), *(root + depth for depth in tree.depths)]
    layout = RowLayout(len(cached), len(pending), tree.ancestors, torch.tensor(positions))
    logits = model.logits(model.forward([*pending, *tree.tokens], PassLayout.single(layout)))
    for leaf in (3, 5, 6):
        path = tree.ancestors[leaf].nonzero()[:, 0].tolist()
        theirs = plain_logits(plain, [*cached, *pending, *(tree.tokens[node] for node in path)])[len(cached) :]
        ours = logits[[*range(len(pending)), *(len(pending) + node for node in path)]]
        assert error(ours, theirs) < TOLERANCE


# --- streaming -------------------------------------------------------------------------------------------------------

NUM_PASSES = 12


def passes(model: TreeModel) -> list[torch.Tensor]:
    """Return the scores of `NUM_PASSES` passes of 1 to 4 rows, with occasional truncation of the cache."""
    scores = []
    for i in range(NUM_PASSES):
        scores.append(model.logits(model.append(random_prompt(1 + i % 4, VOCAB, seed=i))))
        if i % 8 == 7:
            model.cache.truncate(0, 3)
    return scores


def check_bit_for_bit(source: ModelSource, num_slots: int, resident: tuple[int, ...], expected: list[torch.Tensor]):
    model = load(source, resident=resident, num_slots=num_slots)
    try:
        streamed = passes(model)
        moved = model.streamer.counters().num_bytes
    finally:
        model.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed, expected, strict=True))
    layers = model.skeleton.layers
    num_weights = [sum(p.numel() for p in layer.parameters()) for i, layer in enumerate(layers) if i not in resident]
    assert moved >= NUM_PASSES * 4 * sum(num_weights)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
def test_streamed_scores_are_resident_scores_bit_for_bit(checkpoints: Checkpoints, num_slots: int):
    """Streamed layers are adjacent, apart, first or last; there are fewer or more of them than slots."""
    _, source = checkpoints.get("llama")
    expected = passes(load(source))
    for resident in ((), (0,), (3,), (0, 2), (1, 2), (0, 1, 3)):
        check_bit_for_bit(source, num_slots, resident, expected)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "gemma3", "phi3", "deepseek_v3"])
def test_streamed_scores_are_resident_scores_on_other_architectures(checkpoints: Checkpoints, architecture: str):
    """Experts are merged from several tensors while reading; layers may differ in size."""
    _, source = checkpoints.get(architecture)
    expected = passes(load(source))
    for num_slots, resident in ((2, ()), (3, (1,))):
        check_bit_for_bit(source, num_slots, resident, expected)


def test_streamed_layers_take_no_memory_but_their_slots(checkpoints: Checkpoints):
    _, source = checkpoints.get("llama")
    everything = load(source)
    model = load(source, resident=(), num_slots=2)
    model.close()
    blobs = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.skeleton.layers.parameters()}
    assert len(blobs) == 2 and len(set(blobs.values())) == 1
    assert everything.nbytes - model.nbytes == 2 * next(iter(blobs.values()))  # 4 layers in 2 slots


# --- other dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_bf16_checkpoint_is_computed_in_fp32(tmp_path: Path, architecture: str):
    model = random_model(make_config(architecture)).to(torch.bfloat16)
    source = save(model, tmp_path / "half")
    plain = hf.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    ours = load(source)
    theirs = dict(plain.named_parameters())
    assert dict(ours.skeleton.model.named_parameters()).keys() == theirs.keys()
    for name, parameter in ours.skeleton.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, theirs[name]), name
    prompt = random_prompt(20, VOCAB)
    assert error(ours.logits(ours.append(prompt)), plain_logits(plain, prompt)) < TOLERANCE
    check_bit_for_bit(source, 2, (2,), passes(load(source)))
