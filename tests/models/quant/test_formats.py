"""specchat's own quantization formats: values, row ranges and matmuls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from specchat.models.quant.formats.base import Quantizer
from specchat.models.quant.formats.int3 import Int3, Int3Quantizer, book
from specchat.models.quant.formats.int8 import Int8Quantizer
from specchat.models.quant.formats.nf4 import Nf4Quantizer
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels import matmul
from specchat.models.quant.kernels.bnb import bnb, bnb_version
from specchat.models.quant.kernels.chunked import chunk_rows, scratch_bytes

CPU = torch.device("cpu")
QUANTIZERS = [Int8Quantizer(), Nf4Quantizer(), Int3Quantizer()]
quantizers = st.sampled_from(QUANTIZERS)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Gaussian, with a few large numbers, as trained matrices have them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[:: 1 + shape[0] * shape[1] // 3] *= 8
    return weight.to(dtype)


def quantized(quantizer: Quantizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    segments = {s.name: torch.full(s.shape, 77).to(s.dtype) for s in quantizer.format.segments(*weight.shape)}
    quantizer.quantize(weight, segments)
    return segments


def numbers(quantizer: Quantizer, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    return quantizer.format.dequantize(quantized(quantizer, weight), 0, len(weight), out).clone()


@settings(max_examples=60, deadline=None)
@given(quantizers, shapes, dtypes, dtypes, st.data())
def test_values_do_not_depend_on_the_row_range(quantizer, shape, saved, wanted, data):
    weight = matrix(shape, saved)
    whole = numbers(quantizer, weight, wanted)
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    out = torch.empty(end - begin, shape[1], dtype=wanted)
    part = quantizer.format.dequantize(quantized(quantizer, weight), begin, end, out)
    assert part.dtype == wanted and part.is_contiguous()
    assert torch.equal(part, whole[begin:end])


@settings(max_examples=30, deadline=None)
@given(shapes, dtypes)
def test_int8_matches_its_definition(shape, saved):
    weight = matrix(shape, saved)
    rows, cols = shape
    expected = torch.empty(shape)
    for row in range(rows):
        for begin in range(0, cols, 128):
            group = weight[row, begin : begin + 128].float()
            scale = (group.abs().max() / 127).bfloat16().float()
            codes = (group / scale).round().clamp(-127, 127) if scale > 0 else torch.zeros_like(group)
            expected[row, begin : begin + 128] = codes * scale
    assert torch.equal(numbers(Int8Quantizer(), weight), expected)


@settings(max_examples=30, deadline=None)
@given(shapes, dtypes)
def test_nf4_equals_bitsandbytes_on_the_whole_matrix(shape, saved):
    bnb()
    from bitsandbytes import functional

    weight = matrix(shape, saved)
    # flat: the two-dimensional CPU kernel errs where rows are no multiple of 64
    codes, state = functional.quantize_4bit(
        weight.view(1, -1), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    segments = quantized(Nf4Quantizer(), weight)
    assert torch.equal(segments["codes"], codes.view(-1))
    assert torch.equal(segments["absmax"], state.absmax) and torch.equal(segments["nested_absmax"], state.state2.absmax)
    assert segments["offset"].item() == state.offset.item()
    if weight.numel() % 2 == 0:  # bitsandbytes compiles a kernel for every odd size, for seconds
        assert torch.equal(numbers(Nf4Quantizer(), weight, saved), functional.dequantize_4bit(codes, state).view(shape))


def test_nf4_of_a_large_matrix_does_not_depend_on_the_pieces():
    weight = matrix((1100, 4096))  # more than is quantized at a time
    segments, halves = quantized(Nf4Quantizer(), weight), [quantized(Nf4Quantizer(), w) for w in weight.split(1024)]
    assert torch.equal(segments["codes"], torch.cat([half["codes"] for half in halves]))
    bnb()
    from bitsandbytes import functional

    _, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(segments["absmax"], state.absmax) and torch.equal(segments["nested_absmax"], state.state2.absmax)


def test_int8_of_a_large_matrix_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch):
    weight = matrix((37, 200))
    whole = quantized(Int8Quantizer(), weight)
    for rows in (1, 5):
        monkeypatch.setattr("specchat.models.quant.formats.int8._QUANTIZE_ROWS_BYTES", rows * 4 * 200)
        pieces = quantized(Int8Quantizer(), weight)
        assert all(torch.equal(pieces[name], segment) for name, segment in whole.items())


def int3_scale(code: int) -> float:
    return 0.0 if code == 0 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 31)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 300)), dtypes)
def test_int3_matches_its_definition(shape, wanted):
    generator = torch.Generator().manual_seed(shape[1])
    stored = {
        s.name: torch.randint(0, 255, s.shape, dtype=s.dtype, generator=generator) for s in Int3().segments(*shape)
    }
    expected = torch.empty(shape)
    for row in range(shape[0]):
        codes, signs, ninths, scales = (stored[name][row].tolist() for name in ("codes", "signs", "ninths", "scales"))
        for column in range(shape[1]):
            quad = column // 4
            entry = book()[codes[quad] + 256 * (ninths[quad // 8] >> quad % 8 & 1)]
            sign = -1 if signs[column // 8] >> column % 8 & 1 else 1
            expected[row, column] = sign * int(entry[column % 4]) * int3_scale(scales[column // 128])
    assert torch.equal(Int3().dequantize(stored, 0, shape[0], torch.empty(shape, dtype=wanted)), expected.to(wanted))


def test_int3_finds_nearly_the_best_entries():
    """Compare with a search among all entries, for the scales that were taken and for others."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found = quantized(Int3Quantizer(), weight)
    entries, groups = book().float(), weight.abs().view(-1, 128)
    usual = found["scales"].view(-1).int()

    def least_errors(codes: torch.Tensor) -> torch.Tensor:
        scales = torch.tensor([int3_scale(int(code)) for code in codes])[:, None]
        nearest = torch.cdist((groups / scales).view(-1, 4), entries).argmin(1)
        return (entries[nearest].view_as(groups) * scales - groups).square().sum(1)

    best = torch.stack([least_errors(usual + offset) for offset in range(-4, 5)]).amin(0)
    error = (numbers(Int3Quantizer(), weight) - weight).square().sum()
    assert best.sum() <= error < 1.05 * best.sum()


def test_int3_does_not_depend_on_the_pieces_and_keeps_faults(monkeypatch: pytest.MonkeyPatch):
    weight = matrix((37, 200))
    weight[3, 7], weight[4, 150] = torch.nan, torch.inf
    whole = quantized(Int3Quantizer(), weight)
    faulty = numbers(Int3Quantizer(), weight).isnan()
    assert faulty[3, :128].all() and faulty[4, 128:].all() and faulty.sum() == 128 + 72
    for rows in (1, 5):
        monkeypatch.setattr("specchat.models.quant.formats.int3._QUANTIZE_NUMBERS", rows * 200)
        pieces = quantized(Int3Quantizer(), weight)
        assert all(torch.equal(pieces[name], segment) for name, segment in whole.items())
    transposed = quantized(Int3Quantizer(), weight.T.contiguous().T)
    assert all(torch.equal(transposed[name], segment) for name, segment in whole.items())


def test_identities_of_quantizers():
    """Another version of bitsandbytes makes another pack."""
    assert bnb_version() in Nf4Quantizer().identity


@given(shapes, dtypes, dtypes, st.data())
def test_plain_matrices_are_cast(shape, saved, wanted, data):
    form, weight = Plain(saved), matrix(shape, saved)
    assert [(s.name, s.shape, s.dtype) for s in form.segments(*shape)] == [("weight", shape, saved)]
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    out = form.dequantize({"weight": weight}, begin, end, torch.empty(end - begin, shape[1], dtype=wanted))
    assert out.dtype == wanted and torch.equal(out, weight[begin:end].to(wanted))


@pytest.mark.parametrize(
    ("quantizer", "error"), [(QUANTIZERS[0], 0.0068), (QUANTIZERS[1], 0.094), (QUANTIZERS[2], 0.137)]
)
def test_error_of_a_gaussian_matrix(quantizer, error):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    assert (numbers(quantizer, weight) - weight).norm() / weight.norm() < error


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_leaves_the_original_unchanged(quantizer, dtype):
    weight = matrix((5, 200), dtype)
    quantized(quantizer, weight)
    assert torch.equal(weight, matrix((5, 200), dtype))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
def test_zeros_stay_zeros(quantizer):
    assert numbers(quantizer, torch.zeros(3, 200)).eq(0).all()
    weight = matrix((4, 256))
    weight[1] = 0
    assert numbers(quantizer, weight)[1].abs().max() < 1e-2


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
@pytest.mark.parametrize("shape", [(1, 96), (7, 130), (2500, 64), (896, 128)], ids=str)
def test_linear_equals_matmul_with_the_dequantized_matrix(quantizer, shape):
    """Cover one chunk and several: the last shapes have more rows than a chunk, and exactly as many."""
    weight, bias, x = matrix(shape), torch.randn(shape[0]), torch.randn(2, 5, shape[1])
    scratch = torch.empty(scratch_bytes(shape, x.dtype, CPU), dtype=torch.uint8)
    y = quantizer.format.linear(x, quantized(quantizer, weight), shape, scratch, bias)
    torch.testing.assert_close(y, F.linear(x, numbers(quantizer, weight), bias), atol=1e-4, rtol=1e-4)
    without = quantizer.format.linear(x, quantized(quantizer, weight), shape, scratch)
    torch.testing.assert_close(without, y - bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
@pytest.mark.parametrize("shape", [(512, 128), (1000, 128)], ids=str)
def test_transposed_matmuls_give_the_same_result(quantizer, shape, monkeypatch):
    """The result lies in memory as any other's, so that whatever a model does with it takes views of it."""
    monkeypatch.setattr(matmul, "MIN_NUMBERS", 1)
    monkeypatch.setattr(matmul, "_is_turning_faster", lambda: True)
    weight, x = matrix(shape, torch.bfloat16), torch.randn(1, 64, shape[1]).bfloat16()
    scratch = torch.empty(scratch_bytes(shape, x.dtype, CPU), dtype=torch.uint8)
    y = quantizer.format.linear(x, quantized(quantizer, weight), shape, scratch)
    assert y.is_contiguous()
    expected = F.linear(x.float(), numbers(quantizer, weight, torch.bfloat16).float())
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=2.0**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_dequantizes_to_the_same_values(quantizer, dtype):
    weight = matrix((300, 256))
    segments = {name: segment.cuda() for name, segment in quantized(quantizer, weight).items()}
    for begin, end in ((0, 300), (7, 9)):
        out = torch.empty(end - begin, 256, dtype=dtype, device="cuda")
        found = quantizer.format.dequantize(segments, begin, end, out).cpu()
        assert torch.equal(found, numbers(quantizer, weight, dtype)[begin:end])


@given(st.integers(1, 10**5), st.integers(1, 10**5), dtypes)
def test_chunks_are_small(rows, cols, dtype):
    num_rows = chunk_rows(rows, cols, dtype, CPU)
    assert 1 <= num_rows <= rows
    assert num_rows == 1 or scratch_bytes((rows, cols), dtype, CPU) < 32 << 20


def test_chunks_have_equal_size():
    """Whole blocks of rows, and no small one is left over: it would cost as much as half a large one."""
    assert [chunk_rows(rows, 2048, torch.bfloat16, CPU) for rows in (512, 896, 897, 2048, 7168)] == [
        512,
        896,
        512,
        704,
        896,
    ]
    assert chunk_rows(2048, 7168, torch.bfloat16, CPU) == 512
    assert chunk_rows(11008, 4096, torch.bfloat16, CPU) == 896
