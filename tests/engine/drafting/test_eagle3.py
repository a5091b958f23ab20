"""EAGLE-3 heads: scores equal the equations, computed from scratch, and the cache follows what the target commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.eagle3 import KINDS, Eagle3Follower, Saved, known_tokens, save_eagle3, slow_chain
from support.engines import random_prompt
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting.head_check import HeadCheck
from specchat.models.sizes.describe import describe
from specchat.records.model import ModelSource

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelSource]:
    model = random_model(make_config("qwen3"))
    return model, save(model, tmp_path_factory.mktemp("target") / "qwen3")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("heads")
    return {name: save_eagle3(64, root / name, kind) for name, kind in KINDS.items()}


def check_scores(ours: torch.Tensor, saved: Saved, theirs: torch.Tensor) -> None:
    known = known_tokens(saved)
    assert ours.shape == (len(theirs), VOCAB)
    assert (ours[:, known] - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))
    assert theirs.std() > 0.1  # else anything is close
    others = torch.ones(VOCAB).bool().index_fill(0, known, False)
    assert (ours[:, others] < theirs.amin(-1, keepdim=True)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_equations(target: tuple[Any, ModelSource], heads: dict[str, Saved], kind: str):
    (model, source), saved = target, heads[kind]
    text, chain = random_prompt(21, VOCAB), [5, 9, 7]
    follower = Eagle3Follower(source, saved.source, chunk_rows=8)
    follower.read(text[:-1], text[-1])
    check_scores(follower.chain(text[-1], chain), saved, slow_chain(model, saved, text, chain))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["specforge", "speculators"])  # with the target's embeddings, and with its own
def test_quantized_heads_score_alike(target: tuple[Any, ModelSource], heads: dict[str, Saved], kind: str):
    source, saved, text = target[1], heads[kind], random_prompt(21, VOCAB)
    assert describe(saved.source, "int8").quant == "int8"
    scores = []
    for quant in ("none", "int8"):
        follower = Eagle3Follower(source, saved.source, quant=quant)
        follower.read(text[:-1], text[-1])
        scores.append(follower.chain(text[-1], [5])[:, known_tokens(saved)])
    assert 0 < (scores[0] - scores[1]).abs().max() < 0.1 * scores[0].abs().max()


def test_rows_follow_the_committed_text(target: tuple[Any, ModelSource], heads: dict[str, Saved]):
    """Trees, steps without drafts, another last token and a text that goes back leave the rows of a new head."""
    (model, source), saved = target, heads["speculators"]
    text, chain = random_prompt(30, VOCAB), [4, 6]
    follower = Eagle3Follower(source, saved.source)
    follower.read(text[:10], text[10])
    follower.chain(text[10], [9, 9, 9])  # dropped
    follower.read(text[10:13], 99)
    check_scores(follower.chain(99, chain), saved, slow_chain(model, saved, [*text[:13], 99], chain))
    follower.read([text[13]], text[14])  # instead of 99: the last row is computed anew
    for place in range(14, 18):
        follower.read([text[place]], text[place + 1])  # without drafts
    check_scores(follower.chain(text[18], chain), saved, slow_chain(model, saved, text[:19], chain))
    follower.target.cache.truncate(0, 8)
    follower.tokens = follower.tokens[:8]
    follower.read([*text[8:10], 7, 7], 5)
    check_scores(follower.chain(5, chain), saved, slow_chain(model, saved, [*text[:10], 7, 7, 5], chain))


class Heard(HeadCheck):
    """A check that keeps what it is told."""

    def count(self, ours: Any, theirs: Any) -> None:
        self.pairs = list(zip(ours, theirs, strict=True))


def test_the_check_compares_guesses_of_the_same_token(target: tuple[Any, ModelSource], heads: dict[str, Saved]):
    (model, source), saved = target, heads["specforge"]
    text, check = random_prompt(16, VOCAB), Heard()
    follower = Eagle3Follower(source, saved.source, check=check)
    follower.read(text[:-1], text[-1])
    follower.chain(text[-1], [])
    known = known_tokens(saved)
    with torch.no_grad():
        theirs = model(torch.tensor([text[:-1]])).logits[0].argmax(-1).tolist()
    for row, pair in enumerate(check.pairs):
        guessed = known[slow_chain(model, saved, text[: row + 2], [])[0].argmax()]
        assert pair == (int(guessed), theirs[row + 1])
    assert len(check.pairs) == len(text) - 2


def test_damaged_heads_are_refused(tmp_path: Path, target: tuple[Any, ModelSource]):
    from safetensors.torch import load_file, save_file

    from specchat.errors import CorruptCheckpointError

    saved = save_eagle3(64, tmp_path / "head", KINDS["specforge"])
    file = saved.source.path / "model.safetensors"
    whole = load_file(file)
    for missing in ("fc.weight", "d2t", "midlayer.hidden_norm.weight"):
        save_file({key: value for key, value in whole.items() if key != missing}, file, {"format": "pt"})
        with pytest.raises(CorruptCheckpointError):
            Eagle3Follower(target[1], saved.source)
    save_file(whole | {"d2t": whole["d2t"] + VOCAB}, file, {"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="d2t"):
        Eagle3Follower(target[1], saved.source).model.skeleton.check_vocabulary()
