"""Key-value shapes come from the modules: they hold where names in a configuration mislead."""

import pytest
import torch
from support.loading import load_model
from support.tiny_models import ARCHITECTURES, SPECIAL, make_config, random_model, save

from specchat.engine.attention import tree_attention
from specchat.models.hf.config import kv_shapes
from specchat.models.hf.kv_shapes import record_kv_shapes
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.sizes.describe import describe
from specchat.records.model import KvShape

SLIDING, GLOBAL, SHARED = KvShape(2, 16, 16), KvShape(2, 32, 32), KvShape(0, 0, 0)
EXPECTED = {
    "gemma3n": (SLIDING,) * 4 + (SHARED,) * 2,
    "gemma4": (SLIDING, GLOBAL) * 3,
    "gemma4_shared": (SLIDING, GLOBAL) * 2 + (SHARED,) * 2,
    "gemma4_k_eq_v": (SLIDING, KvShape(1, 32, 32)) * 3,
    "mimo_v2_flash": (KvShape(2, 24, 16), *(KvShape(4, 24, 16),) * 3),
    "deepseek_v3": (KvShape(1, 16, 8),) * 4,
    "gpt_bigcode": (KvShape(1, 16, 16),) * 4,
}


def recorded(architecture):
    return record_kv_shapes(build_skeleton(make_config(architecture), torch.bfloat16, tree_attention))


@pytest.mark.parametrize("architecture", EXPECTED)
def test_shapes_are_those_of_the_modules(architecture):
    assert recorded(architecture) == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_equal_those_that_configurations_name(architecture):
    assert recorded(architecture) == kv_shapes(make_config(architecture))


def test_the_skeleton_stays_as_it_was():
    skeleton = build_skeleton(make_config("gemma4_shared"), torch.float32, tree_attention)
    forwards = [layer.forward for layer in skeleton.layers]
    buffers = {name: buffer.device for name, buffer in skeleton.model.named_buffers()}
    record_kv_shapes(skeleton)
    assert [layer.forward for layer in skeleton.layers] == forwards
    assert {name: buffer.device for name, buffer in skeleton.model.named_buffers()} == buffers


@pytest.mark.parametrize("architecture", [name for name in EXPECTED if name in SPECIAL])
def test_descriptions_and_caches_agree(architecture, tmp_path):
    source = save(random_model(make_config(architecture)), tmp_path / "model")
    spec, model = describe(source), load_model(source, cache_rows=64)
    assert model.cache.nbytes == model.cache.capacity * spec.kv_numbers_per_row * 4
    assert set(spec.activations) == {2, 4}  # profiled, not assumed
    model.close()
