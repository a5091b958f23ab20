"""Checkpoints in MXFP4 and NVFP4 run as the models that they encode: gpt-oss, compressed-tensors and modelopt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support import reference
from support.engines import make_plan, random_prompt, write
from support.fp4 import codes_of, exponents_of, modelopt, modelopt_fp8, mxfp4, nvfp4, powers, two_per_byte, values_of
from support.loading import load_engine, load_model, prepare
from support.quantized import Kind, save_quantized
from support.streamed import silent
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.model import TreeModel
from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.quant.formats.fp4 import MxFp4, NvFp4
from specchat.models.quant.modules import quant_linears
from specchat.models.sizes.describe import describe
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

pytestmark = pytest.mark.usefixtures("packs_tiny_models")


def make_model(architecture: str) -> Any:
    config = make_config(architecture)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return random_model(config)


def logits(source: ModelSource, prompt: list[int], pack: Any = None, resident: Any = None) -> torch.Tensor:
    model: TreeModel = load_model(source, resident=resident, num_slots=1, cache_rows=64, chunk_rows=16, pack=pack)
    assert len(list(quant_linears(model.skeleton.model))) > 4
    found = model.logits(model.append(prompt))
    model.close()
    return found


def check(quantized: ModelSource, dense: Path, name: str) -> None:
    twin = hf.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
    prompt = random_prompt(20, VOCAB)
    with torch.inference_mode():
        expected = twin(torch.tensor([prompt])).logits[0]
    ours = logits(quantized, prompt)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4 * float(expected.std()))
    assert describe(quantized).quant == name
    pack = prepare(quantized, "fp32", progress=silent, warn=silent)
    assert pack is not None
    assert torch.equal(logits(quantized, prompt, pack, ()), ours)
    assert torch.equal(logits(quantized, prompt, None, (1,)), ours)
    text = reference.generate(twin, prompt, Sampling(), 20)
    with load_engine(make_plan(quantized, None, num_layers=2, resident=()), quantized, None, pack) as engine:
        tokens, _ = write(engine, prompt, Sampling(), 20)
    assert text.first_difference(tokens) is None


@pytest.mark.parametrize(
    ("architecture", "kind", "others", "name"),
    [
        pytest.param("llama", mxfp4(), {}, "compressed-tensors fp4", marks=pytest.mark.slow),
        ("qwen3_moe", mxfp4(), {}, "compressed-tensors fp4"),
        pytest.param("llama", nvfp4(), {}, "compressed-tensors fp4", marks=pytest.mark.slow),
        ("qwen3_moe", nvfp4(), {}, "compressed-tensors fp4"),
        ("llama", modelopt(), {}, "modelopt nvfp4"),
        ("qwen3_moe", modelopt(), {"self_attn": modelopt_fp8()}, "modelopt nvfp4"),
        ("llama", modelopt_fp8(128), {"mlp": modelopt(), "o_proj": modelopt_fp8()}, "modelopt mixed"),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else value if isinstance(value, str) else str(len(value)),
)
def test_scores_and_text_are_those_of_the_dequantized_model(
    architecture: str, kind: Kind, others: dict[str, Kind], name: str, tmp_path: Path
):
    pair = save_quantized(make_model(architecture), tmp_path, kind, others=others)
    check(pair.quantized, pair.dense.path, name)


def test_an_export_may_describe_itself_in_a_file_of_its_own(tmp_path: Path):
    kind = modelopt()
    pair = save_quantized(make_model("llama"), tmp_path, kind)
    config = json.loads((pair.quantized.path / "config.json").read_text())
    del config["quantization_config"]
    (pair.quantized.path / "config.json").write_text(json.dumps(config))
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (pair.quantized.path / "hf_quant_config.json").write_text(json.dumps(own))
    check(pair.quantized, pair.dense.path, "modelopt nvfp4")


def save_gpt_oss(folder: Path) -> tuple[ModelSource, Path]:
    """A tiny gpt-oss with its experts in MXFP4 as OpenAI stores them, and the folder of its dequantized twin."""
    config = make_config("gpt_oss")
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    dense = save(random_model(config), folder / "dense")
    tensors, stored, meant = load_file(dense.path / "model.safetensors"), {}, {}
    for key, tensor in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = meant[key] = tensor
            continue
        blocks, scales, values = [], [], []
        for expert in tensor:  # [cols, rows]
            weight = expert.t().contiguous()
            exponents = exponents_of(weight)
            packed = two_per_byte(codes_of(weight, powers(exponents)))
            blocks.append(packed.view(len(packed), -1, 16))
            scales.append(exponents)
            values.append(values_of(packed, powers(exponents)).t())
        stored[f"{key}_blocks"], stored[f"{key}_scales"] = torch.stack(blocks), torch.stack(scales)
        meant[key] = torch.stack(values).contiguous()
    quantized = save(random_model(config), folder / "quantized")
    save_file(stored, quantized.path / "model.safetensors", {"format": "pt"})
    save_file(meant, dense.path / "model.safetensors", {"format": "pt"})
    values = json.loads((quantized.path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantized.path / "config.json").write_text(json.dumps(values))
    return quantized, dense.path


def test_gpt_oss_scores_as_its_dequantized_twin(tmp_path: Path):
    quantized, dense = save_gpt_oss(tmp_path)
    check(quantized, dense, "mxfp4")


def test_values_are_those_of_transformers_and_compressed_tensors():
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    rows, cols = 24, 64
    packed = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(0, 250, (rows, cols // 32), dtype=torch.uint8, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        ours = MxFp4().dequantize({"codes": packed, "scales": exponents}, 0, rows, torch.empty(rows, cols, dtype=dtype))
        theirs = convert_moe_packed_tensors(packed.view(1, rows, -1, 16), exponents[None], dtype=dtype)[0].t()
        assert torch.equal(ours, theirs)
    weights = torch.randn(rows, cols, generator=generator)
    for kind in (mxfp4(), nvfp4()):
        tensors = kind.pack(weights, 0)
        group = kind.config["config_groups"]["group_0"]
        scheme = QuantizationScheme(targets=["Linear"], weights={**group["weights"], "dynamic": False})
        compressor = BaseCompressor.get_value_from_registry(kind.config["format"])
        state = {name: tensor for name, tensor in tensors.items() if name != "input_global_scale"}
        theirs = compressor.decompress(state, scheme)["weight"]
        segments = {"codes": tensors["weight_packed"], "scales": tensors["weight_scale"]}
        if kind.name == "ct-nvfp4":
            segments["tensor_scale"] = tensors["weight_global_scale"]
        own = MxFp4() if kind.name == "ct-mxfp4" else NvFp4(divides=True)
        assert torch.equal(own.dequantize(segments, 0, rows, torch.empty(rows, cols, dtype=theirs.dtype)), theirs)


def test_damaged_and_unknown_variants_are_refused(tmp_path: Path):
    kind = modelopt()
    pair = save_quantized(make_model("llama"), tmp_path, kind)
    file = pair.quantized.path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj"
    for name in ("pre_quant_scale", "weight_svd_down"):
        save_file({**tensors, f"{key}.{name}": torch.ones(64)}, file)
        with pytest.raises(UnsupportedModelError, match="AWQ or SVD"):
            describe(pair.quantized)
    save_file({name: each for name, each in tensors.items() if name != f"{key}.weight_scale"}, file)
    with pytest.raises(CorruptCheckpointError, match=r"up_proj\.weight_scale"):
        describe(pair.quantized)
