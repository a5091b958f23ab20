"""Several MTP layers: scores equal transformers' generator and a slow count of the published equations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.engines import random_prompt
from support.heads import LAYOUTS, Follower, engine_with_stack, random_target, save_with_mtp
from support.targets import Targets, check_batch, check_head, check_interrupt_and_undo
from support.tiny_models import VOCAB

from specchat.engine.drafting.mtp_stack import MtpStackModel
from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.records.model import ModelSource

NUM_LAYERS, NUM_HEADS = 4, 3
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    root, made = tmp_path_factory.mktemp("stack"), dict[str, ModelSource]()

    def source(architecture: str) -> ModelSource:
        if architecture not in made:
            made[architecture] = saved(random_target(architecture), root / architecture, architecture)
        return made[architecture]

    return source


def saved(model: Any, folder: Path, architecture: str) -> ModelSource:
    return save_with_mtp(model, folder, LAYOUTS[architecture], num_layers=NUM_HEADS)


@torch.inference_mode()
def slow_outputs(model: MtpStackModel, target: TreeModel, text: list[int], states: torch.Tensor) -> torch.Tensor:
    """The outputs behind a text of the layer that guesses its next token, and of all layers, by the equations alone.

    The last tokens of the text have no states: with d of them, layer d guesses the next token. Layer k reads output t
    of layer k - 1 and token t + 1 + k, for all t from 0 on; beyond the last layer, that layer reads its own output.
    """
    stack, outputs = model.skeleton, states
    missing = len(text) - 1 - len(states)
    for index in range(min(missing + 1, len(stack.layers))):
        tokens = text[1 + index : 1 + index + len(outputs)]
        outputs = _alone(model, index, target.embed(tokens), outputs[: len(tokens)])
        last = outputs[-1:]
    return last


def _alone(model: MtpStackModel, index: int, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """One layer over a whole text, with an empty cache."""
    rows = model.skeleton.join_at(index, embeddings, states)
    layer = PassLayout.single(linear_layout(0, len(rows), torch.device("cpu")))
    found: list[torch.Tensor] = []
    plain = MtpStackModel._decode
    try:
        MtpStackModel._decode = lambda self, _, positions: found.append(  # type: ignore[assignment, method-assign]
            self.skeleton.hidden_at(index, rows, positions, self._hf_cache)
        )
        model._first_row = 0
        model.forward([0] * len(rows), layer)
    finally:
        MtpStackModel._decode = plain  # type: ignore[method-assign]
    for each in model.cache.layers:
        each.truncate(0, 0)
    return found[0]


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3"])
def test_scores_equal_the_equations(sources: Callable[[str], ModelSource], architecture: str):
    """Behind a text that was read in pieces, and behind each node of a chain of two: one layer for each."""
    source = sources(architecture)
    follower, text, chain = Follower(source, 8, NUM_HEADS), random_prompt(24, VOCAB), [5, 9]
    states = follower.target.append(text[:-1])
    follower.target.cache.truncate(0, 0)
    for begin, end in ((0, 11), (11, 12), (12, 15), (15, len(text) - 1)):
        follower.read(text[begin:end], text[end])
        found = follower.chain(text[end], chain)
    other = Follower(source, 512, NUM_HEADS)
    for depth in range(1 + len(chain)):
        known = [*text, *chain[:depth]]
        expected = _scores(other, known, states)
        assert (found[depth] - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())), depth
    first = _scores(other, text, states)
    assert (first - _scores(other, [*text, 5], states)).abs().max() > 0.1  # else anything is close


def _scores(follower: Follower, text: list[int], states: torch.Tensor) -> torch.Tensor:
    assert isinstance(follower.model, MtpStackModel)
    return follower.target.logits(slow_outputs(follower.model, follower.target, text, states))[0]


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_candidates_equal_transformers_generator(sources: Callable[[str], ModelSource], architecture: str):
    source = sources(architecture)
    candidates = pytest.importorskip("transformers.generation.candidate_generator")
    if not hasattr(candidates, "MTPCandidateGenerator"):
        pytest.skip("this version of transformers has no MTP")
    model = hf.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    last = model.config.num_hidden_layers
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{last + each}\." for each in range(NUM_HEADS)]
    generator = candidates.MTPCandidateGenerator(model, hf.GenerationConfig(do_sample=False), {})
    text = random_prompt(14, VOCAB)
    with torch.no_grad():
        states = model.model(torch.tensor([text[:-1]])).last_hidden_state
        outputs = type("Outputs", (), {"hidden_states": [states]})()
        # Up to transformers 5.17, the generator reads the mask, too.
        rows = {"position_ids": torch.arange(len(text))[None], "attention_mask": torch.ones(1, len(text))}
        ids, theirs = generator.get_candidates(torch.tensor([text]), rows, outputs, False, 0)
    chain = ids[0, len(text) :].tolist()
    follower = Follower(source, 512, NUM_HEADS)
    follower.read(text[:-1], text[-1])
    ours = follower.chain(text[-1], chain[:-1])
    assert len(chain) == NUM_HEADS
    assert (ours - theirs[0]).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


def test_a_text_that_goes_on_drafts_as_one_that_was_read_at_once(sources: Callable[[str], ModelSource]):
    """Trees, another last token and steps without drafts leave what a new head would have."""
    source, text, chain = sources("qwen3"), random_prompt(30, VOCAB), [4, 6, 8, 3]
    follower = Follower(source, 8, NUM_HEADS)
    follower.read(text[:10], text[10])
    follower.chain(text[10], [9, 9, 9, 9])  # dropped
    follower.read(text[10:13], 99)
    follower.chain(99, chain)
    follower.read([text[13]], text[14])  # instead of 99: the last row is computed anew
    for place in range(14, 20):
        follower.read([text[place]], text[place + 1])
    fresh = Follower(source, 512, NUM_HEADS)
    fresh.read(text[:20], text[20])
    ours, theirs = follower.chain(text[20], chain), fresh.chain(text[20], chain)
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    return Targets(tmp_path_factory.mktemp("stack texts"), random_target, saved)


@pytest.mark.parametrize(
    ("architecture", "sampling"),
    [("qwen3", "greedy"), pytest.param("glm4_moe", "t0.8", marks=pytest.mark.slow)],
)
def test_text_is_the_targets_own(targets: Targets, architecture: str, sampling: str):
    expected = targets.text(architecture, sampling)
    source = targets.source(architecture)
    with engine_with_stack(source, NUM_LAYERS, NUM_HEADS, budget=16, resident=(), chunk_rows=24) as engine:
        check_head(engine, expected, sampling, "mtp", streams=True, retrieval=False)


def test_batches_interrupts_and_undo(targets: Targets):
    source = targets.source("qwen3")
    with engine_with_stack(source, NUM_LAYERS, NUM_HEADS, budget=32, seats=3, chunk_rows=24) as engine:
        check_batch(engine, targets, "qwen3")
    with engine_with_stack(source, NUM_LAYERS, NUM_HEADS, budget=32) as engine:
        check_interrupt_and_undo(engine, targets.text("qwen3", "greedy"))
