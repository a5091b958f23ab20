"""Matrix products by oneDNN: the same numbers as torch's own, also when the weights' memory gets other contents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specchat.engine import linear


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 130), st.integers(1, 90), st.booleans())
def test_products_are_exact_to_float32(num_rows, width, height, has_bias):
    generator = torch.Generator().manual_seed(num_rows * 1000 + width)
    module = nn.Linear(width, height, bias=has_bias)
    rows = torch.randn(1, num_rows + 2, width, generator=generator)[:, 1:-1]
    with torch.inference_mode():
        exact = nn.functional.linear(rows.double(), module.weight.double(), module.bias.double() if has_bias else None)
        out = linear.product(module, rows)
    assert out.shape == (1, num_rows, height)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_weights_may_change_in_place():
    memory = torch.zeros(64 * 32 * 4, dtype=torch.uint8)
    module = nn.Linear(32, 64, bias=False)
    module.weight = nn.Parameter(memory.view(torch.float32).view(64, 32), requires_grad=False)
    rows = torch.randn(3, 32)
    for _ in range(3):
        weight = torch.randn(64, 32)
        memory.copy_(weight.view(torch.uint8).flatten())
        torch.testing.assert_close(linear.product(module, rows), rows @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL computes otherwise anyway")
@pytest.mark.parametrize(("intel", "changed"), [(False, ["large", "inner.large"]), (True, [])])
def test_only_large_float32_maps_change_and_only_where_mkl_is_slow(monkeypatch, intel, changed):
    monkeypatch.setattr(linear, "is_intel", lambda: intel)
    model = nn.Module()
    with torch.device("meta"):
        model.large, model.small = nn.Linear(1024, 1024), nn.Linear(1024, 1023, bias=False)
        model.half = nn.Linear(1024, 1024, dtype=torch.bfloat16)
        model.inner = nn.Module()
        model.inner.large = nn.Linear(2048, 1024)
    linear.use_fast_products(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == changed
