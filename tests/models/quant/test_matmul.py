"""Matmuls by oneDNN or transposed equal torch's own, also when weights change in place."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from specchat.models.quant.kernels import matmul

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no MKL: all is oneDNN anyway")


@pytest.fixture(autouse=True)
def not_intel(monkeypatch):
    monkeypatch.setattr(matmul, "is_intel", lambda: False)
    monkeypatch.setattr(matmul, "MIN_NUMBERS", 1)
    monkeypatch.setattr(matmul, "_is_turning_faster", lambda: True)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 70), st.integers(1, 130), st.integers(1, 90), st.booleans())
def test_onednn_is_exact_to_float32(num_rows, width, height, has_bias):
    generator = torch.Generator().manual_seed(num_rows * 1000 + width)
    weight = torch.randn(height, width, generator=generator)
    bias = torch.randn(height, generator=generator) if has_bias else None
    x = torch.randn(1, num_rows + 2, width, generator=generator)[:, 1:-1]
    assert matmul.is_faster_by_onednn(weight)
    with torch.inference_mode():
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        out = matmul.product(x, weight, bias)
    assert out.shape == (1, num_rows, height)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 5000))
def test_few_counts_of_rows_are_computed(num_rows):
    count = matmul.padded_count(num_rows)
    assert num_rows <= count <= 1.25 * num_rows and matmul.padded_count(count) == count


def test_there_are_few_counts():
    assert len({matmul.padded_count(num_rows) for num_rows in range(1, 513)}) == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_onednn_is_asked_for_few_counts(dtype, monkeypatch):
    """Its code for a count is never freed, so a chat of many lengths would grow by gigabytes."""
    asked, weight = set(), torch.randn(70, 40).to(dtype)
    linear, explicit = F.linear, matmul._onednn
    monkeypatch.setattr(matmul.F, "linear", lambda x, *others: asked.add(len(x)) or linear(x, *others))
    monkeypatch.setattr(matmul, "_onednn", lambda x, *others: asked.add(len(x)) or explicit(x, *others))
    monkeypatch.setattr(matmul, "_is_turning_faster", lambda: False)
    for num_rows in range(1, 131):
        x = torch.randn(num_rows, 40).to(dtype)
        torch.testing.assert_close(matmul.product(x, weight), linear(x, weight), rtol=2e-2, atol=2e-2)
    assert len(asked) <= 25


def test_weights_may_change_in_place():
    memory = torch.zeros(64 * 32 * 4, dtype=torch.uint8)
    weight = memory.view(torch.float32).view(64, 32)
    x = torch.randn(3, 32)
    for _ in range(3):
        now = torch.randn(64, 32)
        memory.copy_(now.view(torch.uint8).flatten())
        torch.testing.assert_close(matmul.product(x, weight), x @ now.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [44, 47, 48, 60, 64, 127, 128])
def test_transposed_matmuls_are_exact_to_one_rounding(num_rows, has_bias):
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(70, 130, generator=generator).bfloat16()
    bias = torch.randn(70, generator=generator).bfloat16() if has_bias else None
    x = torch.randn(1, num_rows + 2, 130, generator=generator).bfloat16()[:, 1:-1]
    assert matmul.turned_rows(x, weight) in matmul.TURNED_ROWS
    with torch.inference_mode():
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        out = matmul.product(x, weight, bias)
    assert out.shape == (1, num_rows, 70)
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 16, 43, 49, 59, 65, 123, 129, 512])
def test_other_row_counts_are_not_transposed(num_rows):
    weight = torch.randn(70, 130).bfloat16()
    x = torch.randn(num_rows, 130).bfloat16()
    assert matmul.turned_rows(x, weight) is None
    assert torch.equal(matmul.product(x, weight), F.linear(x, weight))


def test_batch_dimensions_are_transposed_together():
    weight, x = torch.randn(70, 130).bfloat16(), torch.randn(2, 32, 130).bfloat16()
    assert matmul.turned_rows(x, weight) == 64
    torch.testing.assert_close(matmul.product(x, weight), F.linear(x, weight), rtol=2.0**-7, atol=1e-3)
