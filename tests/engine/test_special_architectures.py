"""Architectures with heads, decoders, windows or layer inputs of their own write what transformers writes, streamed."""

from __future__ import annotations

import pytest
from support import reference
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.tiny_models import SPECIAL, VOCAB, make_config, perturbed, random_model, save

from specchat.records.generation import Sampling

NUM_TOKENS = 30


@pytest.mark.parametrize("architecture", SPECIAL)
def test_text_is_the_targets_own(architecture: str, tmp_path):
    """Compare greedy texts with `generate`, with half or all of the layers streamed in turn, in several chunks."""
    model = random_model(make_config(architecture))
    target, draft = save(model, tmp_path / "target"), save(perturbed(model, 0.03), tmp_path / "draft")
    sampling = Sampling(repetition_penalty=1.3)
    expected = reference.generate(model, random_prompt(40, VOCAB), sampling, NUM_TOKENS)
    assert len(set(expected.tokens)) > 8
    num_layers = make_config(architecture).num_hidden_layers
    resident = range(0, num_layers, 2) if list(SPECIAL).index(architecture) % 2 else ()
    plan = make_plan(target, draft, num_layers=num_layers, resident=resident, chunk_rows=24)
    with load_engine(plan, target, draft) as engine:
        ours, steps = write(engine, expected.prompt, sampling, NUM_TOKENS)
    difference = expected.first_difference(ours)
    assert difference is None or expected.is_near_tie(difference), f"token {difference}: {ours}, {expected.tokens}"
    assert len(steps) < NUM_TOKENS  # some trees are accepted
