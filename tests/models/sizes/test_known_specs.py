"""The shipped figures of known models against published counts and the modules that transformers builds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specchat.models.catalog.families import known_families
from specchat.models.catalog.known_models import KnownModel, known_model, known_models
from specchat.models.catalog.ref import parse_model
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.nf4 import Bnb4
from specchat.models.quant.modules import Matrix, Part
from specchat.models.sizes import inspect, known_specs
from specchat.models.sizes.geometry import layer_bytes, weight_bytes
from specchat.models.sizes.inspect import inspect_model
from specchat.models.sizes.known_specs import known_spec
from specchat.records.model import DTYPE_BYTES, QUANTS, ModelSource, ModelSpec

MODELS = list(known_models().values())
UNIFORM = [model for model in MODELS if not known_specs.is_hybrid(model) and model.stored != "gguf"]
# The smallest model of each architecture; the others only differ in figures.
KINDS = list({model.config["model_type"]: model for model in sorted(UNIFORM, key=lambda m: -m.billions)}.values())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_the_number_of_weights_is_the_published_one(model: KnownModel):
    assert known_spec(model.id).num_params == pytest.approx(model.billions * 1e9, rel=0.01)


def test_known_models_are_valid_and_supported():
    assert len(MODELS) >= 40
    assert all(parse_model(model.id).kind == "hub" for model in MODELS)
    assert all(model.stored in ("", "awq", "bnb-4bit", "gguf") for model in MODELS)
    shapes = [model.shape for model in MODELS if model.shape]
    assert len(set(shapes)) == len(shapes) > 10
    unsupported = known_families().why_unsupported
    assert [model.id for model in MODELS if unsupported(model.id)] == []


def test_the_figures_of_the_drafts_of_known_models_are_known():
    families = {known_families().family_of(model.id) for model in MODELS} - {None}
    assert len(families) > 10
    drafts = {draft for family in families for draft in family.drafts}
    assert [draft for draft in sorted(drafts) if known_model(draft) is None] == []


def test_a_copy_has_the_figures_of_its_original():
    original = known_models()["meta-llama/Llama-3.2-1B-Instruct"]
    assert known_model("unsloth/Llama-3.2-1B-Instruct@main") == original
    assert known_model("meta-llama/Llama-3.2-1B-Instruct") == original
    assert known_model("someone/a-model-of-their-own") is None


class StoredAs:
    """Replace every layer's matrices by those of a pre-quantized checkpoint; the head stays plain."""

    def __init__(self, stored: str) -> None:
        self.name, self._format = {
            "awq": ("awq int4", Affine(4, 128, torch.float16, zeros=True)),
            "bnb-4bit": ("bitsandbytes 4-bit", Bnb4()),
        }[stored]

    def parts(self, matrix: Matrix, expert: int):
        return None if matrix.is_head or matrix.is_lookup else (Part(matrix.shape[0], self._format),)


def built(model: KnownModel, quant: str, layers: int, folder: Path) -> ModelSpec:
    """Return what `inspect_model` finds in the modules that transformers builds from the figures."""
    figures = model.config | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(figures))
    with pytest.MonkeyPatch.context() as patch:
        if model.stored:
            patch.setattr(inspect, "assume_recipe", lambda *_: StoredAs(model.stored))
        return inspect_model(ModelSource(model.id, folder), quant)


def compare(model: KnownModel, quant: str, layers: int, folder: Path) -> None:
    found = built(model, quant, layers, folder)
    known = known_specs.spec_of(replace(model, config={**model.config, "num_hidden_layers": layers}), quant)
    for dtype in DTYPE_BYTES:
        assert layer_bytes(known, 0, dtype) == layer_bytes(found, layers - 1, dtype)
        assert weight_bytes(known, dtype) == pytest.approx(weight_bytes(found, dtype), abs=8192)  # buffers
    unscaled = model.config.get("original_max_position_embeddings", found.max_positions)  # how it is scaled is left out
    assert known.max_positions == min(found.max_positions, unscaled)
    exact = "architecture vocab_size hidden_size num_layers mlp_size num_heads dtype num_params kv_shapes quant"
    for name in (*exact.split(), "quant_shapes", "lookup_params"):
        assert getattr(known, name) == getattr(found, name), name
    same_workspace(known, found)


def same_workspace(known: ModelSpec, found: ModelSpec) -> None:
    """Check that the activations of a pass are never less than profiled, and little more."""
    for size, profiled in found.activations.items():
        ours = known.activations[size]
        assert ours.num_masks == profiled.num_masks
        for rows, keys in ((512, 8704), (512, 512), (128, 2048)):
            for place in ("outside", "entry", "layer", "head"):
                most, least = (max(c.at(rows, keys) for c in getattr(each, place)) for each in (ours, profiled))
                assert least <= most <= 2.1 * least, (size, rows, keys, place)
            pass_bytes = [
                max(c.at(rows, keys) for c in each.entry) + max(c.at(rows, keys) for c in each.layer)
                for each in (ours, profiled)
            ]
            assert pass_bytes[0] <= 1.3 * pass_bytes[1], (size, rows, keys)


@pytest.mark.parametrize("model", KINDS, ids=lambda model: model.config["model_type"])
def test_the_sizes_of_every_architecture_match(model: KnownModel, tmp_path: Path):
    compare(model, "none", 2, tmp_path)


@pytest.mark.parametrize(
    ("model_id", "quant"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "int4"),
        ("Qwen/Qwen3-30B-A3B", "int4"),
        ("microsoft/Phi-4-mini-instruct", "int8"),
        ("Qwen/Qwen3-8B-AWQ", "none"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "none"),
    ],
)
def test_the_sizes_of_quantized_layers_match(model_id: str, quant: str, tmp_path: Path):
    compare(known_models()[model_id], quant, 2, tmp_path)


def test_the_sizes_match_where_the_first_and_last_layers_differ(tmp_path: Path):
    compare(known_models()["Qwen/Qwen2.5-0.5B-Instruct"], "int3", 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("model", UNIFORM, ids=lambda model: model.id)
def test_the_sizes_of_every_known_model_match(model: KnownModel, quant: str, tmp_path: Path):
    compare(model, "none" if model.stored else quant, 4, tmp_path)


def test_known_specs_need_no_torch():
    program = (
        "import sys; from specchat.models.sizes.known_specs import known_spec;"
        "from specchat.models.catalog.ref import parse_model;"
        "parse_model('shape:llama-8b'); known_spec('Qwen/Qwen3-8B'); known_spec('Qwen/Qwen3.8-27B');"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
