"""Skeletons call the attention function that they were built with; nothing is registered on import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.tiny_models import make_config
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from specchat.models.hf.attention import explicit_attention, register_attention
from specchat.models.hf.skeleton import Skeleton, build_skeleton


def zeros(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Any, None]:
    calls.append("zeros")
    return torch.zeros_like(query.transpose(1, 2)), None


def ones(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Any, None]:
    calls.append("ones")
    return torch.ones_like(query.transpose(1, 2)), None


calls: list[str] = []


def called(skeleton: Skeleton) -> set[str]:
    """Return which of the functions above a pass over a skeleton calls."""
    calls.clear()
    hidden = torch.empty(1, 3, skeleton.config.hidden_size, device="meta")
    rotary = tuple(torch.empty(1, 3, skeleton.config.head_dim, device="meta") for _ in range(2))
    for layer in skeleton.layers:
        layer(hidden, position_embeddings=rotary)
    return set(calls)


def test_every_skeleton_calls_its_own_attention_function():
    """Other skeletons from the same configuration, or from that of the first skeleton, change nothing."""
    config = make_config("llama")
    first = build_skeleton(config, torch.float32, zeros)
    second = build_skeleton(first.config, torch.float32, ones)
    plain = build_skeleton(first.config, torch.bfloat16)
    assert (called(first), called(second), called(plain)) == ({"zeros"}, {"ones"}, set())
    assert first.config.dtype == torch.float32 and plain.config.dtype == torch.bfloat16
    assert config.to_dict() == make_config("llama").to_dict()


def test_a_function_is_registered_once():
    name = register_attention(zeros)
    known = len(AttentionInterface().keys()), len(AttentionMaskInterface().keys())
    assert register_attention(zeros) == name != register_attention(ones)
    register_attention(ones)
    assert len(AttentionInterface().keys()) <= known[0] + 1 and len(AttentionMaskInterface().keys()) <= known[1] + 1


def test_another_function_of_the_same_name_is_refused():
    def make() -> Any:
        def attention() -> None: ...

        return attention

    register_attention(make())
    with pytest.raises(ValueError, match=r"two attention functions have the name .*make\.<locals>\.attention"):
        register_attention(make())


@pytest.mark.slow
def test_importing_the_engine_registers_nothing():
    code = (
        "import specchat.engine.engine, specchat.models.sizes.inspect, transformers as hf; "
        "print([n for kind in (hf.AttentionInterface, hf.AttentionMaskInterface) for n in kind() if 'specchat' in n])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("value_dim", [8, 4])
def test_explicit_attention_matches_torch(scaling: float | None, value_dim: int):
    """Also with sinks far below all scores, and with a cap far above them."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*size, generator=generator) for size in ((2, 3, 5, 8), (2, 7, 8), (2, 7, value_dim)))
    mask = torch.where(torch.rand(1, 1, 5, 7, generator=generator) < 0.3, float("-inf"), 0.0)
    mask[..., 0] = 0.0
    expanded = (x[:, None].expand(-1, 3, -1, -1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *expanded, attn_mask=mask.expand(2, 3, -1, -1), scale=scaling)
    for softcap, sinks in ((None, None), (None, torch.full((6,), -1e4)), (1e5, None)):
        found = explicit_attention(q, k, v, mask, scaling, softcap, sinks)
        assert torch.allclose(found, expected, atol=1e-5)
    capped = explicit_attention(q, k, v, mask, scaling, 0.1, None)
    assert not torch.allclose(capped, expected, atol=1e-2)
    half = explicit_attention(q * 0, k, v, torch.zeros(1, 1, 5, 7), scaling, None, torch.full((6,), 0.0))
    assert torch.allclose(half, v.sum(1)[:, None, None].expand(-1, 3, 5, -1) / 8, atol=1e-6)
