"""Norms of drafts as one kernel: the same numbers up to rounding, and only where torch computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_models import make_config, random_model

from specchat.models.hf.norms import fuse_norms

# By architecture, the norms of a layer that torch can compute; Gemma's add 1 to their weights.
NORMS = {"llama": 2, "qwen3": 4, "gemma3": 0}


@pytest.mark.parametrize("architecture", NORMS)
def test_norms_are_fused_where_torch_computes_the_same(architecture: str):
    model = random_model(make_config(architecture))
    for parameter in (each for name, each in model.named_parameters() if "norm" in name):
        torch.nn.init.normal_(parameter, 1.0, 0.3)
    plain, ids = copy.deepcopy(model), torch.arange(12)[None]
    layers = model.config.num_hidden_layers
    assert fuse_norms(model) == (NORMS[architecture] * layers + 1 if NORMS[architecture] else 0)
    with torch.inference_mode():
        found, expected = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert all(("forward" in vars(norm)) == bool(NORMS[architecture]) for norm in norms)


def test_other_weights_are_used_once_they_are_bound():
    model = random_model(make_config("llama"))
    fuse_norms(model)
    norm, hidden = model.model.norm, torch.randn(2, model.config.hidden_size)
    norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, 3.0), requires_grad=False)
    torch.testing.assert_close(
        norm(hidden), 3 * torch.nn.functional.rms_norm(hidden, hidden.shape[1:]), rtol=1e-4, atol=1e-4
    )
