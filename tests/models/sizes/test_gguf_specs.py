"""The recorded sizes of known GGUF uploads: those of files with such headers, in llama.cpp's own mixes of types."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support import gguf_specs
from support.gguf_mixes import MIXES, Facts, types_of
from support.versions import newest_only

from specchat.models.catalog.known_models import KnownModel, known_model, known_models
from specchat.models.catalog.ref import parse_model
from specchat.models.catalog.suggest import likely_models
from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.sizes.geometry import layer_sizes, weight_bytes
from specchat.models.sizes.gguf_specs import FILE
from specchat.models.sizes.known_specs import active_params, known_spec

UPLOADS = gguf_specs.known_uploads()
HINT = "write the file again: PYTHONPATH=.:tests python -m support.gguf_specs"
QUANTIZER = shutil.which("llama-quantize")
# Sizes that the hub lists, also of mixes that are no entries: the files beside the tensors hold a vocabulary.
PUBLISHED = {
    "mradermacher/Qwen3.8-27B-i1-GGUF:IQ3_M": 12.77e9,
    "bartowski/Llama-3.3-70B-Instruct-GGUF:Q4_K_M": 42.52e9,
    "bartowski/Llama-3.3-70B-Instruct-GGUF:IQ4_XS": 37.90e9,
    "bartowski/Llama-3.3-70B-Instruct-GGUF:IQ3_M": 31.94e9,
    "lmstudio-community/gemma-4-26B-A4B-it-GGUF:Q4_K_M": 16.8e9,
    **{model.id: model.file_bytes for model in UPLOADS if model.file_bytes},
}


def entry(model_id: str) -> KnownModel:
    """The entry of an upload, or one for another mix of its repository."""
    repo = model_id.partition(":")[0]
    like = next(model for model in UPLOADS if model.id.partition(":")[0] == repo)
    return replace(like, id=model_id)


def test_every_upload_is_recorded_and_no_other():
    assert set(json.loads(FILE.read_text())) == {model.id for model in UPLOADS}
    assert {gguf_specs.mix_of(model) for model in UPLOADS} == {"Q4_K_M", "IQ4_XS", "IQ3_XXS", "MXFP4"}
    assert len({model.like for model in UPLOADS}) == 7


def test_the_sizes_of_an_upload_are_found_by_its_name():
    spec = known_spec("lmstudio-community/Qwen3.8-27B-GGUF:Q4_K_M")
    assert known_spec(spec.name, "int8") == spec  # pre-quantized: nothing is left to choose
    assert spec.quant == "gguf q4_k_m" and len(set(layer_sizes(spec, "bf16"))) > 2
    assert spec.num_params == known_spec("Qwen/Qwen3.8-27B").num_params
    assert spec.kv_shapes == known_spec("Qwen/Qwen3.8-27B").kv_shapes
    mine = known_model("someone/Qwen3.8-27B-GGUF:q4_k_m")
    assert mine is not None and mine.id == spec.name
    assert active_params(known_models()["ggml-org/gpt-oss-20b-GGUF:MXFP4"]) == active_params(
        known_models()["unsloth/gpt-oss-20b-BF16"]
    )
    assert all(parse_model(model.id).variant == gguf_specs.mix_of(model) for model in UPLOADS)


def test_misspelt_names_lead_to_uploads():
    assert likely_models("glm-4.7-flash-gguf")[0] == "unsloth/GLM-4.7-Flash-GGUF:Q4_K_M"
    assert likely_models("qwen3.8:27b-q4_k_m") == ["lmstudio-community/Qwen3.8-27B-GGUF:Q4_K_M"]
    assert likely_models("unsloth/Qwen3.8-27B-GUFF:Q4_K_M")[0] == "lmstudio-community/Qwen3.8-27B-GGUF:Q4_K_M"
    assert likely_models("qwen3.8-27b")[0] == "Qwen/Qwen3.8-27B"


def test_recorded_layers_are_most_of_the_published_bytes():
    """All except embeddings, which are looked up in 16 bits, the head, an MTP layer and the vocabulary."""
    for model in UPLOADS:
        if model.file_bytes:
            spec = known_spec(model.id)
            in_layers = sum(layer_sizes(spec, "bf16"))
            assert 0.87 * model.file_bytes < in_layers < model.file_bytes
            assert 0.97 * model.file_bytes < weight_bytes(spec, "bf16") < 1.1 * model.file_bytes


@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ4_XS", "IQ3_XXS"])
def test_layers_have_the_bytes_of_their_types(mix: str):
    spec = known_spec(f"bartowski/Llama-3.3-70B-Instruct-GGUF:{mix}")
    stems = {"attn_q": (8192, 8192), "attn_k": (1024, 8192), "attn_v": (1024, 8192), "attn_output": (8192, 8192)}
    stems |= {"ffn_gate": (28672, 8192), "ffn_up": (28672, 8192), "ffn_down": (8192, 28672)}
    shapes = {f"blk.{layer}.{stem}.weight": shape for layer in range(80) for stem, shape in stems.items()}
    types = types_of({**shapes, "output.weight": (128256, 8192)}, mix, Facts(80, 8))
    for layer, nbytes in enumerate(layer_sizes(spec, "bf16")):
        own = [(shapes[name], BLOCK_TYPES[types[name]]) for name in shapes if name.startswith(f"blk.{layer}.")]
        assert nbytes == pytest.approx(sum(rows * kind.row_bytes(cols) for (rows, cols), kind in own), rel=1e-3)


@pytest.mark.slow
@newest_only("the sizes of its modules are recorded")
@pytest.mark.parametrize("model", UPLOADS, ids=lambda model: model.id)
def test_all_uploads_are_described_as_recorded(model: KnownModel):
    assert json.loads(FILE.read_text())[model.id] == gguf_specs.record(model), HINT


@pytest.mark.slow
@pytest.mark.parametrize("model_id", PUBLISHED)
def test_the_mixes_give_the_published_sizes(model_id: str, tmp_path: Path):
    model = entry(model_id)
    tensors = gguf_specs.write_header(model, gguf_specs.read_config(model), tmp_path / "x.gguf")
    # unsloth keeps a few small tensors in more bits
    most = 0.012 if model_id.startswith("unsloth/") else 0.0015
    assert tensors == pytest.approx(PUBLISHED[model_id], rel=most)


@pytest.mark.slow
@pytest.mark.skipif(QUANTIZER is None, reason="llama-quantize is not installed")
@pytest.mark.parametrize("has_importances", [True, False])
@pytest.mark.parametrize("model", {model.like: model for model in UPLOADS}.values(), ids=lambda model: model.like)
def test_the_mixes_are_those_of_llama_cpp(model: KnownModel, has_importances: bool, tmp_path: Path):
    config = gguf_specs.read_config(model)
    gguf_specs.write_header(model, config, tmp_path / "x.gguf", dtype="BF16")
    options = []
    if has_importances:
        name = b"blk.0.ffn_down.weight"
        options = ["--imatrix", str(tmp_path / "imatrix.dat")]
        (tmp_path / "imatrix.dat").write_bytes(struct.pack(f"<ii{len(name)}siif", 1, len(name), name, 1, 1, 1.0))
    shapes = gguf_specs.shapes_of(model, config, gguf_specs.tensors_of(config))
    facts = replace(gguf_specs.facts_of(model, config), has_importances=has_importances)
    for mix in MIXES:
        found = dry_run([*options, str(tmp_path / "x.gguf"), "MXFP4_MOE" if mix == "MXFP4" else mix])
        assert found == {name: kind.lower() for name, kind in types_of(shapes, mix, facts).items()}, mix


def dry_run(arguments: list[str]) -> dict[str, str]:
    """The type that llama.cpp chooses for each tensor, in small letters."""
    assert QUANTIZER is not None
    done = subprocess.run([QUANTIZER, "--dry-run", *arguments], capture_output=True, check=True)
    text = (done.stdout + done.stderr).decode(errors="replace")
    line = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\S+), size = .*?(?:\((\S+)\))?$", re.MULTILINE)
    return {name: (kind or before).lower() for name, before, kind in line.findall(text)}
