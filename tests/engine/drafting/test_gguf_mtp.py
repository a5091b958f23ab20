"""MTP layers in GGUF files draft as those in safetensors: the same weights, the same text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support import reference
from support.engines import make_plan, random_prompt, write
from support.gguf_files import differing, save_gguf
from support.heads import LAYOUTS, head_of, load_head_model, random_target, save_with_mtp
from support.loading import load_engine
from support.tiny_models import VOCAB

from specchat.engine.drafting.mtp import MtpModel
from specchat.errors import UsageError
from specchat.models.drafts import head_in, mtp_head
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 20
# Names of Qwen's layout that llama.cpp's converter replaces.
_QWEN = {
    "mtp.fc.": "eh_proj.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.norm.": "shared_head.norm.",
    "mtp.layers.0.": "",
}
ARCHITECTURES = ["deepseek_v3", "glm4_moe", "qwen3_5_text", "qwen3_next"]


def with_short_norms(source: ModelSource) -> ModelSource:
    """The saved model with norms in multiples of 1/256, so that adding 1 is exact."""
    file = source.path / "model.safetensors"
    tensors = {key: (value * 256).round() / 256 if "norm" in key else value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return source


def head_tensors(source: ModelSource, num_layers: int) -> dict[str, torch.Tensor]:
    """The tensors of a saved MTP layer, numbered behind the last layer, with experts in stacks."""
    own, prefix = {}, f"model.layers.{num_layers}."
    for key, value in load_file(source.path / "model.safetensors").items():
        place = next((place for place in _QWEN if key.startswith(place)), None)
        if place is not None:
            own[_QWEN[place] + key.removeprefix(place)] = value
        elif key.startswith(prefix):
            own[key.removeprefix(prefix)] = value
    experts = sorted({int(match[1]) for name in own if (match := re.match(r"mlp\.experts\.(\d+)\.", name))})

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([own.pop(f"mlp.experts.{expert}.{name}.weight") for expert in experts])

    if experts:
        gates, ups = stacked("gate_proj"), stacked("up_proj")
        own |= {"mlp.experts.gate_up_proj": torch.cat([gates, ups], 1), "mlp.experts.down_proj": stacked("down_proj")}
    return {prefix + name: value for name, value in own.items()}


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


def test_gguf_files_without_the_layer_have_no_head(tmp_path: Path):
    model = random_target("glm4_moe")
    source = save_gguf(model, tmp_path / "x.gguf")  # announces a layer, and has a part of it
    assert mtp_head(source) is None
    with pytest.raises(UsageError, match="has no MTP layer in its files"):
        head_in(source)
