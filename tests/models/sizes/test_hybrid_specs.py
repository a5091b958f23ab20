"""The recorded sizes of known hybrids are those of the modules that transformers builds."""

from __future__ import annotations

import json

import pytest
from support import hybrid_specs
from support.versions import newest_only

from specchat.models.catalog.known_models import KnownModel
from specchat.models.sizes.hybrid_specs import FILE, active_hybrid_params, hybrid_spec
from specchat.models.sizes.known_specs import known_spec
from specchat.records.model import QUANTS

pytestmark = newest_only("the sizes of its modules are recorded")

MODELS = hybrid_specs.known_hybrids()
HINT = "write the file again: PYTHONPATH=.:tests python -m support.hybrid_specs"


def check(model: KnownModel, quants: tuple[str, ...]) -> None:
    recorded, found = json.loads(FILE.read_text())[model.id], hybrid_specs.record(model, quants)
    assert recorded["active_params"] == found["active_params"], HINT
    for quant in quants:
        assert recorded["quants"][quant] == found["quants"][quant], HINT


@pytest.mark.parametrize("model_id", ["LiquidAI/LFM2-350M", "ibm-granite/granite-4.0-h-350m"])
def test_the_sizes_of_small_hybrids_are_recorded(model_id: str):
    check(next(model for model in MODELS if model.id == model_id), ("none", "int4"))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_the_sizes_of_all_known_hybrids_are_recorded(model: KnownModel):
    check(model, QUANTS)


def test_every_known_hybrid_is_recorded_and_no_other():
    assert set(json.loads(FILE.read_text())) == {model.id for model in MODELS}
    assert {"Qwen/Qwen3.8-27B", "Qwen/Qwen3.6-35B-A3B", "ibm-granite/granite-4.0-h-small"} < {m.id for m in MODELS}


def test_layers_keep_their_order_and_experts_their_number():
    spec = known_spec("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "int4")
    kinds = ["M" if shape.state else "*" if shape.heads else "E" for shape in spec.kv_shapes]
    assert "".join(kinds) == "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    experts, attention = spec.layer_params[1], spec.layer_params[5]
    assert len(experts) > 128 * 2 * 4 > len(attention)
    assert hybrid_spec("Qwen/Qwen3.8-27B", "none").num_params == active_hybrid_params("Qwen/Qwen3.8-27B")
    assert active_hybrid_params("Qwen/Qwen3.6-35B-A3B") == pytest.approx(3.45e9, rel=0.01)
