"""Gemma 4's assistants: scores equal transformers' own generator, and only committed rows of the target are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.assistants import WINDOW, Reader, load_assistant, save_assistant
from support.dflash import Saved
from support.engines import random_prompt
from support.tiny_models import VOCAB, make_config, random_model, save
from support.versions import newest_only

from specchat.engine.drafting.head_check import HeadCheck
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.assistant import assistant_config, is_assistant
from specchat.models.drafts import as_draft
from specchat.models.hf.assistant import shared_layers
from specchat.records.model import ModelSource

TOLERANCE = 1e-4  # each output is the next input, and attention is sharp: its scores are not scaled down
Target = tuple[Any, ModelSource]


beside_transformers = newest_only("older generators of transformers take other arguments")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    model = random_model(make_config("gemma4_shared"))
    return model, save(model, tmp_path_factory.mktemp("target") / "gemma4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_assistant(tmp_path_factory.mktemp("heads") / "assistant")


@torch.no_grad()
def theirs(model: Any, saved: Saved, text: list[int], depth: int) -> tuple[list[int], torch.Tensor]:
    """Guesses and scores of transformers' generator after a text, whose last token the target has not read."""
    module = pytest.importorskip("transformers.generation.candidate_generator")
    outputs = model(torch.tensor([text[:-1]]), output_hidden_states=True, return_shared_kv_states=True)
    saved.module.generation_config.num_assistant_tokens = depth
    generator = module.SinglePositionMultiTokenCandidateGenerator(
        saved.module, model.get_input_embeddings(), hf.GenerationConfig(do_sample=False, max_length=200)
    )
    ids = torch.tensor([text])
    found, scores = generator.get_candidates(ids, {"attention_mask": torch.ones_like(ids)}, outputs, False, 0)
    return found[0, len(text) :].tolist(), scores[0]


def check(reader: Reader, model: Any, saved: Saved, text: list[int], *, clusters: bool = False) -> None:
    """Compare scores; those of tokens in clusters that are left out only come last."""
    guesses, expected = theirs(model, saved, text, 5)
    ours = reader.chain(text[-1], guesses[:-1])
    assert ours.shape == expected.shape == (5, VOCAB)
    scored = expected > (expected.amin(-1, keepdim=True) if clusters else -torch.inf)
    assert (ours - expected)[scored].abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))
    for row, known in zip(ours, scored, strict=True):
        assert known.all() or row[~known].max() < row[known].min()
    assert expected.std() > 0.1 and not torch.allclose(expected[0], expected[1])


@beside_transformers
def test_scores_equal_transformers_generator(target: Target, saved: Saved):
    """After a prompt, and after accepted tokens, beyond the assistant's window."""
    (model, source), text = target, random_prompt(40, VOCAB)
    assert is_assistant(saved.source.path) and as_draft(ModelSource("x", saved.source.path)).part == "assistant"
    reader = Reader(source, saved.source, chunk_rows=8)
    reader.read(text[:3], text[3])
    check(reader, model, saved, text[:4])
    reader.read(text[3:30], text[30])
    check(reader, model, saved, text[:31])
    assert WINDOW < 30
    reader.read(text[30:33], text[33])
    check(reader, model, saved, text[:34])


@beside_transformers
@pytest.mark.skipif(
    not hasattr(hf, "Gemma4UnifiedConfig"), reason="this transformers does not know the unified Gemma 4"
)
def test_the_assistant_of_the_unified_gemma_4_scores_like_transformers(tmp_path: Path):
    """The kind of the 12B, whose target reads images and sound without encoders."""
    config = make_config("gemma4_shared")
    values = {key: value for key, value in config.to_diff_dict().items() if key not in ("model_type", "dtype")}
    model = random_model(hf.Gemma4UnifiedTextConfig(**values))
    source = save(model, tmp_path / "target")
    saved, text = save_assistant(tmp_path / "assistant", unified=True), random_prompt(30, VOCAB)
    assert is_assistant(saved.source.path) and model.config.model_type == "gemma4_unified_text"
    reader = Reader(source, saved.source, chunk_rows=8)
    reader.read(text[:20], text[20])
    check(reader, model, saved, text[:21])


@beside_transformers
@torch.no_grad()
def test_scores_of_clusters_equal_transformers_generator(target: Target, tmp_path: Path):
    (model, source), text = target, random_prompt(30, VOCAB)
    clustered = save_assistant(tmp_path / "one", clusters=VOCAB)  # of one token each: the vocabulary is a prime
    reader = Reader(source, clustered.source)
    reader.read(text[:20], text[20])
    check(reader, model, clustered, text[:21], clusters=True)
    larger = save_assistant(tmp_path / "larger", clusters=16, vocab_size=208)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    ours = load_assistant(larger.source, cache_rows=16).scores(hidden)
    for row, state in zip(ours, hidden, strict=True):  # theirs takes the least score of all rows
        expected = larger.module.masked_embedding(state[None, None], larger.module.lm_head.weight)[0, 0]
        scored = expected > expected.min() + 0.5
        assert int(scored.sum()) == 4 * 13
        assert (row - expected)[scored].abs().max() <= TOLERANCE * float(expected.abs().max())
        assert row[~scored].max() < row[scored].min() - 5


def test_nothing_but_committed_rows_is_read(target: Target, saved: Saved):
    """Rows behind the committed ones, which a rejected tree leaves there, change no guess."""
    source, text = target[1], random_prompt(30, VOCAB)
    reader, fresh = Reader(source, saved.source), Reader(source, saved.source)
    assert reader.head.max_depth(reader.sequence(5)) == 0
    reader.read(text[:20], text[20])
    reader.chain(text[20], text[:3])  # leaves nothing behind
    for layer in reader.target.cache.layers:
        for rows in (layer.keys, layer.values):
            rows[:, :, 20:] = 100.0
    fresh.read(text[:20], text[20])
    assert torch.equal(reader.chain(text[20], text[:3]), fresh.chain(text[20], text[:3]))
    assert reader.head.max_depth(reader.sequence(99)) > 0
    reader.tokens = reader.tokens[:10]
    assert reader.head.max_depth(reader.sequence(text[10])) == 0


class Heard(HeadCheck):
    """A check that keeps what it is told."""

    pairs: tuple[list[int], list[int]] | None = None

    def count(self, ours: Any, theirs: Any) -> None:
        self.pairs = list(ours), list(theirs)


@beside_transformers
@torch.no_grad()
def test_the_check_compares_guesses_of_the_same_token(target: Target, saved: Saved):
    (model, source), text, heard = target, random_prompt(60, VOCAB), Heard()
    reader = Reader(source, saved.source, check=heard)
    reader.read(text[:40], text[40])
    reader.chain(text[40], [])
    assert heard.pairs is None, "too few rows to tell"
    reader.read(text[40:59], text[59])
    reader.chain(text[59], [])
    assert heard.pairs is not None
    ours, their_choices = heard.pairs
    assert their_choices == model(torch.tensor([text[:59]])).logits[0, 1:].argmax(-1).tolist()
    for row in (0, 20, 57):
        guesses, _ = theirs(model, saved, text[: row + 2], 1)
        assert ours[row] == guesses[0]


def test_the_layers_that_are_read(target: Target):
    kinds = ["sliding_attention", "full_attention"]
    assert shared_layers(make_config("gemma4_shared")) == dict(zip(kinds, (2, 3), strict=True))
    assert shared_layers(make_config("gemma4")) == dict(zip(kinds, (4, 5), strict=True))
    assert shared_layers(make_config("llama")) == {}


def test_configurations_that_are_refused(tmp_path: Path):
    folder = save_assistant(tmp_path / "head").source.path
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert is_assistant(folder) and not is_assistant(tmp_path)
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "backbone_hidden_size"}))
    with pytest.raises(CorruptCheckpointError, match="backbone_hidden_size"):
        assistant_config(folder)
