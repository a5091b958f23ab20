"""Pre-quantized checkpoints run as the models that they encode: resident, streamed, with and without a draft."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support import reference
from support.engines import make_plan, random_prompt, write
from support.hybrids import HYBRIDS, random_hybrid
from support.loading import load_engine, load_model, plan_here, plan_request, prepare
from support.quantized import (
    EMBEDDINGS,
    HEAD,
    USUAL,
    Kind,
    Pair,
    awq,
    block_fp8,
    bnb4,
    bnb8,
    compressed,
    gptq,
    hide_tensors,
    save_quantized,
)
from support.streamed import silent
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save

from specchat.engine.model import TreeModel
from specchat.engine.streaming.cpu import MappedStreamer, ThreadStreamer
from specchat.errors import CorruptCheckpointError, UnsupportedModelError, UsageError
from specchat.models.packs.pack import Pack
from specchat.models.quant.modules import quant_linears
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import weight_bytes
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Tier

NUM_TOKENS = 20


@dataclass(frozen=True)
class Case:
    architecture: str
    kind: Kind
    skip: str = USUAL
    others: tuple[tuple[str, Kind], ...] = ()

    def __str__(self) -> str:
        return f"{self.architecture}-{self.kind.name}" + "-mixed" * bool(self.others)


CT4 = compressed("pack-quantized", group=32, sym=False)
CT8 = compressed("int-quantized", bits=8, strategy="channel")
FP8 = compressed("float-quantized", bits=8, strategy="channel")


def mixed() -> Case:
    """Return a compressed-tensors case with three quantization formats, and one layer's MLP in full precision."""
    groups = {
        "eight": {**CT8.config["config_groups"]["group_0"], "targets": [r"re:.*self_attn.*"]},
        "four": {**CT4.config["config_groups"]["group_0"], "targets": ["Linear"]},
        "float": {**FP8.config["config_groups"]["group_0"], "targets": [r"re:.*down_proj$"]},
    }
    config = {**CT4.config, "format": "mixed-precision", "config_groups": groups, "ignore": ["re:.*layers.1.mlp.*"]}
    kind = replace(CT4, config=config)
    return Case("llama", kind, rf"{USUAL}|layers\.1\.mlp", ((r"self_attn", CT8), (r"down_proj", FP8)))


def dynamic() -> Case:
    """Return a GPTQ case with one projection in 8 bits and another in full precision."""
    config = {**gptq().config, "dynamic": {r"+:.*\.up_proj": {"bits": 8, "group_size": 16}, r"-:.*\.o_proj": {}}}
    return Case("qwen3", replace(gptq(), config=config), rf"{USUAL}|o_proj", ((r"up_proj", gptq(8, 16)),))


FP32_NF4 = bnb4(dtype=torch.float32)  # else the library rounds its numbers once more, to the dtype that was quantized
BRIEF = [
    Case("llama", gptq(act_order=True)),
    Case("llama", gptq(8, sym=True, version=2), EMBEDDINGS),  # the head too
    mixed(),
    Case("llama_tied", bnb4("fp4", nested=False, storage="bfloat16", dtype=torch.float32)),
    Case("phi3", compressed("pack-quantized", bits=8, group=32, act_order=True)),
    Case("mixtral", FP32_NF4, f"{EMBEDDINGS}|{HEAD}"),  # routers too
    Case("mixtral", CT4, rf"{USUAL}|experts\.1\.w1|experts\.2\.w2"),  # some matrices of some experts are plain
    Case("deepseek_v3", block_fp8(dtype=torch.bfloat16)),
]
REST = [
    Case("llama", awq(16)),
    Case("llama", FP32_NF4, EMBEDDINGS),
    Case("llama", bnb8()),
    Case("llama_tied", CT4),
    dynamic(),
    Case("qwen3", compressed("float-quantized", bits=8, strategy="tensor", dynamic=False)),
    Case("qwen3", FP8, EMBEDDINGS),
    Case("phi3", gptq(act_order=True, sym=True)),
    Case("mixtral", gptq(act_order=True)),
    Case("mixtral", bnb8(), f"{EMBEDDINGS}|{HEAD}"),
    Case("qwen3_moe", awq(), rf"{USUAL}|self_attn"),
    Case("qwen3_moe", block_fp8((32, 32)), rf"{USUAL}|experts"),
    Case("qwen3_moe", CT8),
    Case("deepseek_v3", gptq(8, -1)),
    Case("zamba2", gptq(act_order=True), rf"{USUAL}|adapter"),  # its layers share a block
    Case("zamba2", FP32_NF4, rf"{EMBEDDINGS}|{HEAD}"),
]
CASES = [*BRIEF, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)]


pytestmark = pytest.mark.usefixtures("packs_tiny_models")


def make_pair(case: Case, folder: Path) -> tuple[Any, Pair]:
    if case.architecture in HYBRIDS:
        model = random_hybrid(case.architecture)
    else:
        config = make_config(case.architecture)
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        model = random_model(config)
    return model, save_quantized(model, folder, case.kind, skip=case.skip, others=dict(case.others))


def load(source: ModelSource, pack: Pack | None, *, resident: tuple[int, ...] | None, tier: Tier = "disk") -> TreeModel:
    return load_model(
        source,
        dtype=torch.float32,
        device=torch.device("cpu"),
        resident=resident,
        num_slots=1,
        cache_rows=64,
        chunk_rows=16,
        in_ram=range(99) if tier == "ram" else (),
        pack=pack,
    )


def logits(model: TreeModel, prompt: list[int]) -> torch.Tensor:
    model.cache.truncate(0, 0)
    return model.logits(model.append(prompt))


def make_pack(source: ModelSource) -> Pack:
    pack = prepare(source, "fp32", progress=silent, warn=silent)
    assert pack is not None
    return pack


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_and_text_are_those_of_the_dequantized_model(case: Case, tmp_path: Path):
    model, pair = make_pair(case, tmp_path)
    dense = hf.AutoModelForCausalLM.from_pretrained(pair.dense.path, dtype=torch.float32, attn_implementation="eager")
    prompt = random_prompt(20, VOCAB)
    with torch.inference_mode():
        expected = dense(torch.tensor([prompt])).logits[0]
    resident = load(pair.quantized, None, resident=None)
    assert len(list(quant_linears(resident.skeleton.model))) > 4
    ours = logits(resident, prompt)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4 * float(expected.std()))
    # streamed layers, transcoded while packing or for each pass, give the same bits
    pack = make_pack(pair.quantized)
    for streamed, streamer in (
        (load(pair.quantized, pack, resident=()), ThreadStreamer),
        (load(pair.quantized, pack, resident=(1,), tier="ram"), MappedStreamer),
        (load(pair.quantized, None, resident=()), ThreadStreamer),
    ):
        assert isinstance(streamed.streamer, streamer)
        assert torch.equal(logits(streamed, prompt), ours)
        streamed.close()
    # and with a draft its text is what transformers writes with the dense twin
    draft = save(perturbed(model, 0.02), tmp_path / "draft")
    text = reference.generate(dense, prompt, Sampling(), NUM_TOKENS)
    for guesses in (None, draft):
        plan = make_plan(pair.quantized, guesses, num_layers=model.config.num_hidden_layers, resident=())
        with load_engine(plan, pair.quantized, guesses, pack) as engine:
            tokens, steps = write(engine, prompt, Sampling(), NUM_TOKENS)
        assert text.first_difference(tokens) is None
        assert (len(steps) < NUM_TOKENS) == (guesses is not None)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_are_known_from_headers(tmp_path: Path):
    _, pair = make_pair(Case("mixtral", CT4), tmp_path)
    spec = describe(pair.quantized)
    assert spec.quant == "compressed-tensors int4"
    assert spec.num_params == describe(pair.dense).num_params
    model = load(pair.quantized, None, resident=None)
    in_layers = sum(p.nbytes for layer in model.skeleton.layers for p in layer.parameters())
    others = sum(p.nbytes for p in model.skeleton.model.parameters()) - in_layers
    padding = weight_bytes(spec, "fp32") - in_layers - others
    assert 0 <= padding < 256 * sum(map(len, spec.layer_params)) + 4096 * spec.num_layers + spec.buffer_bytes
    plan = plan_here(plan_request(target=pair.quantized, draft=None, device="cpu", dtype="fp32"))
    assert plan.quant == "compressed-tensors int4"
    # a pack of it holds what streams, and no numbers of 32 bits but norms and routers
    pack = make_pack(pair.quantized)
    assert pack.quantizer == "compressed-tensors int4 1"
    assert sum(layer.nbytes for layer in pack.layers) < 0.5 * sum(p.numel() * 4 for p in random_model_layers())


def random_model_layers() -> list[torch.Tensor]:
    config = make_config("mixtral")
    config.num_hidden_layers = 2
    return list(random_model(config).model.layers.parameters())


def test_prequantized_checkpoints_are_not_quantized_again(tmp_path: Path):
    _, pair = make_pair(Case("llama", awq()), tmp_path)
    for quant in ("int4", "int8"):
        with pytest.raises(UsageError, match=re.escape("is pre-quantized (awq int4)")) as caught:
            plan_here(plan_request(target=pair.quantized, draft=None, device="cpu", quant=quant))
        assert caught.value.hint
    assert plan_here(plan_request(target=pair.quantized, draft=None, device="cpu", quant="none")).quant == "awq int4"


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "hidden", "named"),
    [
        (Case("llama", awq()), ("1.self_attn.q_proj.scales",), r"1\.self_attn\.q_proj\.scales"),
        (Case("llama", gptq()), ("0.mlp.up_proj.qweight",), r"0\.mlp\.up_proj\.qweight"),
        (Case("llama", block_fp8()), ("0.mlp.up_proj.weight_scale_inv",), r"up_proj\.weight_scale_inv"),
        (Case("llama", bnb4()), ("0.mlp.up_proj.weight.absmax",), r"up_proj\.weight\.absmax"),
        (Case("llama", awq()), tuple(f"0.mlp.up_proj.{n}" for n in ("qweight", "qzeros", "scales")), r"up_proj"),
        (Case("mixtral", awq()), tuple(f"0.w3.{n}" for n in ("qweight", "qzeros", "scales")), r"expert 0 of .*gate_up"),
    ],
    ids=str,
)
def test_missing_tensors_are_named(case: Case, hidden: tuple[str, ...], named: str, tmp_path: Path):
    _, pair = make_pair(case, tmp_path)
    hide_tensors(pair.quantized, *hidden)
    with pytest.raises(CorruptCheckpointError, match=named) as caught:
        load(pair.quantized, None, resident=None)
    assert caught.value.hint


def test_truncated_files_and_wrong_group_sizes_are_refused(tmp_path: Path):
    _, pair = make_pair(Case("llama", gptq()), tmp_path)
    config_file, file = (pair.quantized.path / name for name in ("config.json", "model.safetensors"))
    config = json.loads(config_file.read_text())
    other = {**config, "quantization_config": {**config["quantization_config"], "group_size": 16}}
    config_file.write_text(json.dumps(other))
    with pytest.raises(CorruptCheckpointError, match=r"'model\.layers\..*qzeros' is .* the configuration says"):
        describe(pair.quantized)
    config_file.write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        describe(pair.quantized)


def test_unsupported_formats_are_refused(tmp_path: Path):
    _, pair = make_pair(Case("llama", awq()), tmp_path)
    config_file = pair.quantized.path / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(UnsupportedModelError, match="quip"):
        describe(pair.quantized)
    # embeddings are looked up, not multiplied with
    _, pair = make_pair(Case("llama", FP32_NF4, HEAD), tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        describe(pair.quantized)
