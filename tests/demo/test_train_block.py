"""Training a block drafter: the head that is written is the one that the engine drafts with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import reference
from support.dflash import Reader, engine_with_dflash, load_pair
from support.engines import random_prompt
from support.heads import random_target
from support.targets import NUM_TOKENS, SAMPLINGS, check_head
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.demo.train.block import BlockHead, BlockOptions, train
from specchat.errors import UnsupportedModelError, UsageError
from specchat.models.drafts import as_draft
from specchat.models.hf.pairing import check_pair
from specchat.records.model import ModelSource

BLOCK, NUM_LAYERS = 6, 4
CPU = torch.device("cpu")


def made(folder: Path, architecture: str, steps: int) -> tuple[BlockOptions, list[list[float]]]:
    """A head beside its target, trained on a text that repeats."""
    target = save(random_target(architecture), folder / "target").path
    np.save(folder / "text.npy", np.tile(np.asarray(random_prompt(40, VOCAB), dtype=np.uint16), 40))
    options = BlockOptions(
        target,
        data=str(folder / "text.npy"),
        steps=steps,
        rows=2,
        length=48,
        block=BLOCK,
        blocks=16,
        rank=8,
        bf16=False,
    )
    return options, train(options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlockOptions, list[list[float]]]:
    return made(tmp_path_factory.mktemp("block"), "qwen3", steps=40)


def sources(options: BlockOptions) -> tuple[ModelSource, ModelSource]:
    folder = options.target.with_name("target-dflash")
    target, head = ModelSource("target", options.target), as_draft(ModelSource("head", folder))
    assert head.part == "dflash"
    check_pair(target, head)
    return target, head


def test_the_loss_of_each_level_falls(trained: tuple[BlockOptions, list[list[float]]]):
    _, history = trained
    assert len(history[0]) == BLOCK - 1
    first, last = (np.mean(part, axis=0) for part in (history[:5], history[-5:]))
    assert (last < 0.9 * first).all(), (first, last)


def test_the_engine_computes_the_scores_of_the_training(trained: tuple[BlockOptions, list[list[float]]]):
    options, _ = trained
    head = BlockHead(options, CPU)
    head.restore(options.target.with_name("target-dflash"))
    text = random_prompt(12 + BLOCK, VOCAB)
    reader = Reader(load_pair(*sources(options)))
    reader.read(text[:11], text[11])
    ours = reader.levels(text[11], chain=text[12 : 12 + BLOCK - 2])
    theirs = head.scores(torch.tensor([text]), begin=11)
    assert (ours - theirs).abs().max() <= 2e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("sampling", ["greedy", "t0.8"])
def test_text_is_the_targets_own(trained: tuple[BlockOptions, list[list[float]]], sampling: str):
    target, head = sources(trained[0])
    expected = reference.generate(random_target("qwen3"), random_prompt(18, VOCAB), SAMPLINGS[sampling], NUM_TOKENS)
    with engine_with_dflash(target, head, NUM_LAYERS, budget=16) as engine:
        check_head(engine, expected, sampling, "dflash", streams=False, retrieval=False)


@pytest.mark.slow
def test_training_goes_on_from_the_folder(trained: tuple[BlockOptions, list[list[float]]], tmp_path: Path):
    options, before = trained
    after = train(BlockOptions(**{**vars(options), "resume": True, "steps": 1, "seed": 9}))
    assert np.mean(after[0]) < 0.8 * np.mean(before[0])


def test_targets_with_other_layers_are_refused(tmp_path: Path):
    target = save(random_model(make_config("gemma3")), tmp_path / "target").path
    with pytest.raises(UnsupportedModelError, match="layers that a block drafter cannot have"):
        BlockHead(BlockOptions(target), CPU)
    with pytest.raises(UsageError, match="no text"):
        train(BlockOptions(save(random_target("qwen3"), tmp_path / "other").path))


def test_config_json_names_no_folder(trained: tuple[BlockOptions, list[list[float]]]):
    folder = trained[0].target.with_name("target-dflash")
    assert str(folder.parent) not in json.dumps((folder / "config.json").read_text())
