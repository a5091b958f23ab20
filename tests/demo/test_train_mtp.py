"""Training an MTP head: the head that is written is the one that the engine drafts with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.engines import random_prompt
from support.heads import Follower, random_target
from support.tiny_models import VOCAB, save

from specchat.demo.train.mtp import Head, MtpOptions, train
from specchat.errors import UsageError
from specchat.models.catalog.ref import demo_source
from specchat.models.checkpoint.safetensors import MTP_FILE
from specchat.records.model import ModelSource


def made(folder: Path, architecture: str, steps: int) -> tuple[Path, list[list[float]]]:
    """A target with a head that was trained on a text that repeats."""
    target = save(random_target(architecture), folder / "target").path
    np.save(folder / "text.npy", np.tile(np.asarray(random_prompt(40, VOCAB), dtype=np.uint16), 40))
    options = MtpOptions(target, data=str(folder / "text.npy"), steps=steps, rows=2, length=48, depth=3, bf16=False)
    return target, train(options)


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("qwen3_5_text", marks=pytest.mark.slow)])
def test_the_engine_computes_the_rows_of_the_training(tmp_path: Path, architecture: str):
    target, history = made(tmp_path, architecture, steps=1)
    assert len(history) == 1 and len(history[0]) == 3
    head = Head(target, torch.device("cpu"))
    head.restore({name: value.float() for name, value in load_file(target / MTP_FILE).items()})
    text = random_prompt(12, VOCAB)
    follower = Follower(ModelSource("target", target))
    follower.read(text[:-1], text[-1])
    ours = follower.chain(text[-1], [])[0]
    with torch.no_grad():
        theirs = head.scores(torch.tensor([text]))[-1]
    assert (ours - theirs).abs().max() <= 2e-5 * float(theirs.abs().max())


@pytest.mark.slow
def test_the_divergence_falls(tmp_path: Path):
    _, history = made(tmp_path, "qwen3", steps=60)
    first, last = (np.mean(part, axis=0) for part in (history[:5], history[-5:]))
    assert (last < 0.9 * first).all(), (first, last)


@pytest.mark.slow
def test_chats_are_read_with_the_targets_own_template(tmp_path: Path):
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]
    chats.write_text("\n".join(json.dumps({"messages": messages}) for _ in range(20)))
    target = demo_source("target").path
    out = tmp_path / "head.safetensors"
    assert len(train(MtpOptions(target, chats, out=out, steps=1, rows=1, length=32, depth=2))) == 1
    assert out.is_file()
    with pytest.raises(UsageError, match="no text"):
        train(MtpOptions(target))
