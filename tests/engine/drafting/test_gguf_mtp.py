"""MTP layers in GGUF files draft as those in safetensors: the same weights, the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support import reference
from support.engines import make_plan, random_prompt, write
from support.gguf_files import differing, find, save_gguf
from support.heads import LAYOUTS, head_of, head_tensors, load_head_model, load_stack, random_target, save_with_mtp
from support.loading import load_engine
from support.tiny_models import VOCAB, random_model

from specchat.engine.drafting.mtp import MtpModel
from specchat.errors import UsageError
from specchat.models.drafts import as_draft, head_in, mtp_head
from specchat.models.hf.pairing import check_pair
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 20
ARCHITECTURES = ["deepseek_v3", "glm4_moe", "qwen3_5_text", "qwen3_next"]


def with_short_norms(source: ModelSource) -> ModelSource:
    """The saved model with norms in multiples of 1/256, so that adding 1 is exact."""
    file = source.path / "model.safetensors"
    tensors = {key: (value * 256).round() / 256 if "norm" in key else value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return source


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each == "glm4_moe" else pytest.mark.slow) for each in ARCHITECTURES],
)
def test_heads_in_gguf_files_are_those_of_the_checkpoint(architecture: str, tmp_path: Path):
    saved = with_short_norms(save_with_mtp(random_target(architecture), tmp_path / "model", LAYOUTS[architecture]))
    model = hf.AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32).eval()
    source = save_gguf(model, tmp_path / "x.gguf", head=head_tensors(saved, model.config.num_hidden_layers))
    assert mtp_head(source) == head_of(source)
    ours, theirs = (load_head_model(head_of(each), MtpModel, cache_rows=64) for each in (source, saved))
    assert not differing(ours.skeleton.model, theirs.skeleton.model)

    prompt = random_prompt(20, VOCAB)
    text = reference.generate(model, prompt, Sampling(), NUM_TOKENS)
    steps_of = {}
    for name, each in (("gguf", source), ("safetensors", saved)):
        plan = make_plan(each, head_of(each), num_layers=model.config.num_hidden_layers, resident=())
        with load_engine(plan, each, head_of(each)) as engine:
            written, steps = write(engine, prompt, Sampling(), NUM_TOKENS)
        assert text.first_difference(written) is None
        steps_of[name] = len(steps)
    assert steps_of["gguf"] == steps_of["safetensors"]
    assert steps_of["gguf"] < NUM_TOKENS or architecture == "deepseek_v3"  # its random head never agrees


def test_several_layers_in_gguf_files_are_those_of_the_checkpoint(tmp_path: Path):
    saved = save_with_mtp(random_target("glm4_moe"), tmp_path / "model", LAYOUTS["glm4_moe"], num_layers=2)
    saved = with_short_norms(saved)
    model = hf.AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32).eval()
    source = save_gguf(model, tmp_path / "x.gguf", head=head_tensors(saved, model.config.num_hidden_layers, 2))
    ours, theirs = (load_stack(each, 2, cache_rows=64) for each in (source, saved))
    assert not differing(ours.skeleton.model, theirs.skeleton.model)


def save_apart(folder: Path, model: Any) -> tuple[ModelSource, Path]:
    """Save a model with an MTP layer, and in a folder of GGUF files the layer beside the model without it."""
    saved = with_short_norms(save_with_mtp(model, folder / "saved", LAYOUTS["glm4_moe"]))
    model = hf.AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32).eval()
    files = folder / "files"
    files.mkdir()
    save_gguf(model, files / "tiny-F32.gguf")
    head = head_tensors(saved, model.config.num_hidden_layers)
    save_gguf(model, files / "mtp-tiny.gguf", head=head, is_alone=True)
    return saved, files


def test_a_head_in_a_file_of_its_own_drafts_for_the_model_beside_it(tmp_path: Path):
    saved, folder = save_apart(tmp_path, random_target("glm4_moe"))
    source = find(folder)
    head = mtp_head(source)
    assert head is not None and head.path != source.path
    ours, theirs = (load_head_model(each, MtpModel, cache_rows=64) for each in (head, head_of(saved)))
    assert not differing(ours.skeleton.model, theirs.skeleton.model)

    prompt, written = random_prompt(20, VOCAB), []
    for target, each in ((source, as_draft(find(folder / "mtp-tiny.gguf"))), (saved, head_of(saved))):
        assert each.part == "mtp"
        check_pair(target, each)
        with load_engine(make_plan(target, each, num_layers=4, resident=()), target, each) as engine:
            text, steps = write(engine, prompt, Sampling(), NUM_TOKENS)
        written.append((text, len(steps)))
    assert written[0] == written[1]
    assert written[0][1] < NUM_TOKENS


def test_a_head_for_another_model_is_not_used(tmp_path: Path):
    _, folder = save_apart(tmp_path, random_target("glm4_moe"))
    (tmp_path / "other").mkdir()
    config = random_target("glm4_moe").config
    config.num_hidden_layers -= 1
    _, other = save_apart(tmp_path / "other", random_model(config))
    (other / "mtp-tiny.gguf").replace(folder / "mtp-tiny.gguf")
    assert mtp_head(find(folder)) is None
    with pytest.raises(UsageError, match="a number of layers of 3, not 4"):
        check_pair(find(folder), as_draft(find(folder / "mtp-tiny.gguf")))


def test_gguf_files_without_the_layer_have_no_head(tmp_path: Path):
    model = random_target("glm4_moe")
    source = save_gguf(model, tmp_path / "x.gguf")  # announces a layer, and has a part of it
    assert mtp_head(source) is None
    with pytest.raises(UsageError, match="has no MTP layer in its files"):
        head_in(source)
