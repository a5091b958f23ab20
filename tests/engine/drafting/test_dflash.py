"""DFlash heads: scores equal transformers' own generator, and the cache follows what the target has committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.dflash import BLOCK, Reader, Saved, load_pair, random_muse, save_dflash, save_muse
from support.engines import random_prompt
from support.tiny_models import VOCAB, make_config, random_model, save
from support.versions import newest_only

from specchat.engine.drafting.head_check import HeadCheck
from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.dflash import dflash_config, is_dflash
from specchat.records.model import ModelSource

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelSource]:
    model = random_model(make_config("qwen3"))
    return model, save(model, tmp_path_factory.mktemp("target") / "qwen3")


@pytest.fixture(scope="module", params=["full", "sliding"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_dflash(tmp_path_factory.mktemp("heads") / request.param, sliding=request.param == "sliding")


class Theirs:
    """transformers' generator for the same target and head."""

    def __init__(self, model: Any, saved: Saved) -> None:
        module = pytest.importorskip("transformers.generation.candidate_generator")
        self.model = model
        self.generator = module.DFlashTokenCandidateGenerator(
            saved.module,
            model.get_input_embeddings(),
            model.lm_head,
            hf.GenerationConfig(do_sample=False, max_length=200),
        )

    @torch.no_grad()
    def levels(self, text: list[int], num_new: int) -> torch.Tensor:
        """Scores after a text whose last pass has read `num_new` tokens."""
        ids = torch.tensor([text])
        decoder = getattr(self.model.model, "language_model", self.model.model)
        states = decoder(ids[:, :-1], output_hidden_states=True).hidden_states
        first = len(text) - 1 - num_new
        outputs = type("Outputs", (), {"hidden_states": [each[:, first:] for each in states]})()
        named = {"position_ids": torch.arange(len(text))[None], "attention_mask": torch.ones_like(ids)}
        _, scores = self.generator.get_candidates(ids, named, outputs, False, num_new - 1)
        return scores[0]


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape == (BLOCK - 1, VOCAB)
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))
    assert theirs.std() > 0.1 and not torch.allclose(theirs[0], theirs[1])


@newest_only("older ones count the target's layers from the embeddings")
def test_scores_equal_transformers_generator(target: tuple[Any, ModelSource], saved: Saved):
    """Two steps: after the prompt, and after two accepted tokens."""
    (model, source), text = target, random_prompt(30, VOCAB)
    reader, theirs = Reader(load_pair(source, saved.source, chunk_rows=8)), Theirs(model, saved)
    reader.read(text[:20], text[20])
    check_close(reader.levels(text[20]), theirs.levels(text[:21], 20))
    reader.read(text[20:23], text[23])
    check_close(reader.levels(text[23]), theirs.levels(text[:24], 3))


@pytest.mark.slow
def test_muses_assistant_reads_muse(tmp_path: Path):
    """The files of transformers' class are read as a DFlash head, and its blocks have plain embeddings."""
    saved, model, text = save_muse(tmp_path / "assistant"), random_muse(), random_prompt(30, VOCAB)
    assert is_dflash(saved.source.path) and dflash_config(saved.source.path).plain_embeddings
    reader = Reader(load_pair(save(model, tmp_path / "muse"), saved.source))
    theirs = Theirs(model, saved)
    reader.read(text[:20], text[20])
    ours = reader.levels(text[20])
    scale, cap = model.config.text_config.output_multiplier, model.config.text_config.final_logit_softcapping
    expected = cap * torch.tanh(theirs.levels(text[:21], 20) * scale / cap)  # their generator leaves these out
    check_close(ours, expected)


@pytest.mark.slow
def test_muses_assistant_is_read_like_a_dflash_head(target: tuple[Any, ModelSource], tmp_path: Path):
    (model, source), text, saved = target, random_prompt(30, VOCAB), save_muse(tmp_path / "assistant")
    reader = Reader(load_pair(source, saved.source))
    reader.read(text[:20], text[20])
    check_close(reader.levels(text[20]), Theirs(model, saved).levels(text[:21], 20))


def fresh(target: ModelSource, saved: Saved, text: list[int]) -> torch.Tensor:
    reader = Reader(load_pair(target, saved.source))
    reader.read(text[:-1], text[-1])
    return reader.levels(text[-1])


def test_rows_follow_the_committed_text(target: tuple[Any, ModelSource], tmp_path: Path):
    """Blocks, steps without drafts, another last token and a text that goes back leave the rows of a new head."""
    source, text, saved = target[1], random_prompt(30, VOCAB), save_dflash(tmp_path / "head")
    reader = Reader(load_pair(source, saved.source))
    assert reader.head.max_depth(reader.sequence(5)) == 0
    reader.read(text[:10], text[10])
    assert reader.head.max_depth(reader.sequence(text[10])) == BLOCK - 1
    reader.levels(text[10])  # dropped
    reader.read(text[10:13], 99)
    check_close(reader.levels(99), fresh(source, saved, [*text[:13], 99]))
    for place in range(13, 18):
        reader.read([text[place]], text[place + 1])  # without drafts
    check_close(reader.levels(text[18]), fresh(source, saved, text[:19]))
    reader.head._target.cache.truncate(0, 8)
    reader.tokens = reader.tokens[:8]
    assert reader.head.max_depth(reader.sequence(text[8])) == 0
    reader.read([*text[8:10], 7, 7], 5)
    check_close(reader.levels(5), fresh(source, saved, [*text[:10], 7, 7, 5]))


@pytest.mark.slow
def test_a_head_that_missed_rows_goes_on_with_the_next_ones(target: tuple[Any, ModelSource], tmp_path: Path):
    source, text, saved = target[1], random_prompt(30, VOCAB), save_dflash(tmp_path / "head")
    reader = Reader(load_pair(source, saved.source))
    reader.head._target.append(text[:6])  # read while another drafter was in use
    reader.tokens = text[:6]
    reader.read(text[6:12], text[12])
    assert reader.head.max_depth(reader.sequence(text[12])) == BLOCK - 1
    scores = reader.levels(text[12])
    reader.read(text[12:15], text[15])
    assert scores.isfinite().all() and not torch.allclose(scores, reader.levels(text[15]))


class Heard(HeadCheck):
    """A check that keeps what it is told."""

    def count(self, ours: Any, theirs: Any) -> None:
        self.pairs = [list(ours), list(theirs)]


def test_the_check_compares_guesses_of_the_same_token(target: tuple[Any, ModelSource], tmp_path: Path):
    (model, source), text, check = target, random_prompt(20, VOCAB), Heard()
    reader = Reader(load_pair(source, save_dflash(tmp_path / "head").source, check=check))
    reader.read(text[:10], text[10])
    guessed = reader.levels(text[10]).argmax(-1).tolist()
    reader.read(text[10:12], text[12])  # the root and one accepted node
    reader.levels(text[12])
    with torch.no_grad():
        theirs = model(torch.tensor([text[:12]])).logits[0].argmax(-1).tolist()
    assert check.pairs == [guessed[:2], theirs[10:12]]


def test_configurations_that_are_refused(tmp_path: Path):
    folder = save_dflash(tmp_path / "head").source.path
    assert is_dflash(folder) and not is_dflash(tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in (("block_size", 1), ("dflash_config", {}), ("hidden_size", None)):
        file.write_text(json.dumps(config | {name: value}))
        with pytest.raises(CorruptCheckpointError):
            dflash_config(folder)
    file.write_text(json.dumps(config | {"architectures": ["DSparkDraftModel"]}))
    with pytest.raises(UnsupportedModelError, match="DSpark"):
        is_dflash(folder)
    file.write_text(json.dumps(config | {"architectures": ["DFlash2DraftModel"]}))
    with pytest.raises(CorruptCheckpointError, match="conv_group_size"):
        dflash_config(folder)
