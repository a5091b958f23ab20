"""Packed matrices and copies for few rows multiply by the numbers of the matrix, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from specchat.models.quant.autotune import Autotuner
from specchat.models.quant.formats import base
from specchat.models.quant.formats.int8 import Int8, Int8Quantizer
from specchat.models.quant.formats.nf4 import Bnb4, Nf4Quantizer
from specchat.models.quant.kernels import bnb, matmul, packed
from specchat.models.quant.kernels.chunked import scratch_bytes
from specchat.models.quant.kernels.packed import can_pack, pack
from specchat.models.quant.modules import QuantLinear, Scratch

BF16, FP32 = torch.bfloat16, torch.float32
ROWS, COLS = SHAPE = (192, 256)
ROUNDING = {BF16: 2.0**-7, FP32: 1e-5}


@pytest.fixture(autouse=True)
def _small_matrices_count(monkeypatch, tmp_path):
    for module in (matmul, packed, base):
        monkeypatch.setattr(module, "MIN_NUMBERS", 1)
    choices = Autotuner(tmp_path)
    for name in ("modules", "packing"):
        monkeypatch.setattr(f"specchat.models.quant.{name}.autotuner", lambda: choices)


def made(dtype, rows, cols=COLS, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_row_has_the_same_bits_beside_any_number_of_others(dtype, has_bias):
    if not can_pack(SHAPE, dtype):
        pytest.skip("this torch cannot pack")
    weight, x = made(dtype, ROWS), made(dtype, 70, seed=1)
    bias = made(dtype, 1, ROWS, seed=2)[0] if has_bias else None
    matrix = pack(weight)
    assert matrix is not None and matrix.nbytes == weight.nbytes
    with torch.inference_mode():
        every = matrix.linear(x[None], bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        for count in (1, 2, 3, 8, 48, 65):
            assert torch.equal(matrix.linear(x[:count], bias), every[0, :count])
        assert matrix.linear(x[None, :1], bias).shape == (1, 1, ROWS)
    torch.testing.assert_close(every[0].double(), exact, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * 16)


@pytest.mark.parametrize(("shape", "dtype"), [((100, 256), FP32), ((192, 250), BF16), (SHAPE, torch.float16)])
def test_other_shapes_and_dtypes_stay_as_they_are(shape, dtype):
    assert not can_pack(shape, dtype)


def test_a_torch_without_the_operators_packs_nothing(monkeypatch):
    monkeypatch.setattr(packed, "_OPERATORS", ("no_such_operator",))
    assert not can_pack(SHAPE, BF16)


def test_the_kernel_for_one_row_leaves_the_switch_as_it_was():
    weight, x = made(BF16, ROWS), made(BF16, 1, seed=1)
    assert matmul.has_own_row_kernel(weight)
    was_enabled = torch._C._get_mkldnn_enabled()
    try:
        for enabled in (True, False):
            torch._C._set_mkldnn_enabled(enabled)
            found = matmul.product_of_one_row(x, weight)
            assert torch._C._get_mkldnn_enabled() is enabled
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)
    torch.testing.assert_close(found, matmul.product(x, weight), rtol=2.0**-7, atol=0.1)


def filled(quantizer, scale=0.02):
    segments = {each.name: torch.empty(each.shape, dtype=each.dtype) for each in quantizer.format.segments(*SHAPE)}
    quantizer.quantize(made(FP32, ROWS) * scale, segments)
    return segments


def linear_of(quantizer):
    module = QuantLinear(quantizer.format, SHAPE, None, Scratch())
    for name, segment in filled(quantizer).items():
        setattr(module, name, torch.nn.Parameter(segment, requires_grad=False))
    return module


@pytest.mark.parametrize("quantizer", [Int8Quantizer(), Nf4Quantizer()], ids=["int8", "nf4"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_held_matrix_multiplies_by_the_same_numbers(quantizer, dtype):
    module, x = linear_of(quantizer), made(dtype, 65, seed=1)
    weight = quantizer.format.dequantize(module.segments, 0, ROWS, torch.empty(SHAPE, dtype=dtype)).double()
    module.hold(dtype)
    has_copy = dtype == BF16 and isinstance(quantizer, Nf4Quantizer) and bnb.has_row_kernel(SHAPE, 64)
    assert module.held_bytes == (ROWS * COLS // 2 + ROWS * COLS // 64 * 2 if has_copy else weight.numel() * x.itemsize)
    assert any(parameter.is_meta for parameter in module.parameters()) is not has_copy
    with torch.inference_mode():
        for count in (1, 4, 16, 65):
            found, exact = module(x[:count]).double(), x[:count].double() @ weight.T
            assert (found - exact).norm() / exact.norm() < ROUNDING[dtype]


def test_the_copy_for_rows_is_exact_in_the_numbers_it_rounds():
    """The kernel's numbers are the 16 values and the absmax in bfloat16; every row is computed alike."""
    if not bnb.has_row_kernel(SHAPE, 64):
        pytest.skip("this processor has no kernel for few rows")
    form, segments = Bnb4(), filled(Nf4Quantizer())
    copy = form.row_copy(segments, SHAPE, BF16)
    assert form.row_copy(segments, SHAPE, FP32) is None and form.row_copy(segments, (ROWS - 1, COLS), BF16) is None
    absmax = form._absmax(segments, 0, ROWS * COLS // 64)
    table = form.dequantize(segments, 0, ROWS, torch.empty(SHAPE)).view(-1, 64) / absmax[:, None]
    weight = (table.bfloat16().double() * absmax.bfloat16().double()[:, None]).view(SHAPE)
    x = made(BF16, 5, seed=1)
    exact = x.double() @ weight.T
    found = copy.linear(x)
    assert (found == exact.float().bfloat16()).float().mean() > 0.99
    assert torch.equal(copy.linear(x[2:3])[0], found[2])


def test_more_rows_use_the_rounded_absmax_of_the_copy():
    form, segments = Bnb4().beside_row_copy(), filled(Nf4Quantizer())
    assert form != Bnb4() and repr(form) == repr(Bnb4())
    wide = Bnb4().dequantize(segments, 0, ROWS, torch.empty(SHAPE))
    narrow = form.dequantize(segments, 0, ROWS, torch.empty(SHAPE, dtype=BF16))
    absmax = form._absmax(segments, 0, ROWS * COLS // 64)[:, None]
    expected = (wide.view(-1, 64) / absmax * absmax.bfloat16().float()).view(SHAPE)
    assert (narrow.float() - expected).norm() < (narrow.float() - wide).norm()
    torch.testing.assert_close(narrow, expected.bfloat16(), rtol=2**-7, atol=0)


def test_a_single_row_may_be_dequantized_for_another_kernel():
    ways = Int8().kernels(SHAPE, 1, BF16, torch.device("cpu"))
    assert [*ways] == ["dequantize", "dequantize for a row"]
    x, segments = made(BF16, 1, seed=1), filled(Int8Quantizer())
    scratch = torch.empty(scratch_bytes(SHAPE, BF16, torch.device("cpu")), dtype=torch.uint8)
    one, other = (way(x, segments, SHAPE, scratch, None) for way in ways.values())
    torch.testing.assert_close(one, other, rtol=2.0**-6, atol=1e-2)
    assert [*Int8().kernels(SHAPE, 2, BF16, torch.device("cpu"))] == ["dequantize"]
