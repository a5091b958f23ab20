"""Products of few rows with scaled integers by our Triton kernel; without a GPU by Triton's interpreter.

TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m support.triton_products
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.int8 import Int8
from specchat.models.quant.kernels.chunked import scratch_bytes
from support.triton_cases import CPU, random_segments, refusing

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Product:
    """A matrix in a format, and the dtype of the rows that it is multiplied with."""

    form: Affine | Int8
    shape: tuple[int, int]
    dtype: torch.dtype


def small_products(dtypes: tuple[torch.dtype, ...]) -> Iterator[Product]:
    """Every kind of code; rows and columns that leave blocks partly empty, groups of several sizes."""
    for dtype in dtypes:
        for bits, zeros, scales in itertools.product((4, 8), (False, True), (torch.float32, torch.float16)):
            for shape, group in (((33, 256), 128), ((5, 66), None), ((16, 96), 32), ((7, 65), 64)):
                yield Product(Affine(bits, group, scales, zeros), shape, dtype)
        for shape, group in (((40, 384), 128), ((3, 200), 128), ((17, 70), 32)):
            yield Product(Int8(group), shape, dtype)


def large_products() -> Iterator[Product]:
    """What drafts and heads have, for a GPU: all sizes of programs."""
    for dtype, shape in itertools.product(
        (torch.bfloat16, torch.float16), ((512, 2048), (8192, 2048), (2048, 8192), (40000, 1024))
    ):
        yield Product(Int8(), shape, dtype)
        yield Product(Affine(4, 128, torch.float16, zeros=True), shape, dtype)


def check(case: Product, device: torch.device) -> None:
    """The product is that of the dequantized matrix, and a row has the same bits whatever other rows there are.

    Triton's interpreter cuts off what does not fit into a bfloat16, so scales are simple there.
    """
    form, (rows, cols) = case.form, case.shape
    segments = _segments(form, case.shape)
    weight = form.dequantize(segments, 0, rows, torch.empty(case.shape, dtype=case.dtype)).double()
    x = torch.randn(37, cols, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    there = {name: segment.to(device) for name, segment in segments.items()}
    found = _fused(case, x.to(device), there)
    expected = x.double() @ weight.T
    sizes = x.double().abs() @ weight.T.abs()
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * sizes).all(), case
    for begin, end in ((0, 1), (3, 4), (16, 37), (20, 23)):
        assert torch.equal(_fused(case, x[begin:end].to(device), there), found[begin:end]), (case, begin, end)


def _segments(form: Affine | Int8, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Any codes; scales are powers of two of usual sizes."""
    segments = random_segments(form, shape)
    scales = segments["scales"].float()
    powers = 2.0 ** -(scales.abs().clamp(min=1e-7).log2().floor() % 6 + 2)
    return segments | {"scales": powers.copysign(scales).to(segments["scales"].dtype)}


def _fused(case: Product, x: Tensor, segments: dict[str, Tensor]) -> Tensor:
    """The product by the fused kernel, which may write nothing but it."""
    from specchat.models.quant.kernels import triton_product
    from specchat.models.quant.kernels.triton import _product_cols

    form, rows = case.form, case.shape[0]
    bits, rounds = (8, False) if isinstance(form, Int8) else (form.bits, True)
    width = _product_cols(case.shape[1], form.group)
    assert width is not None
    memory = torch.full((len(x) * rows + 64,), 7.0, dtype=x.dtype, device=x.device)
    out = memory[: len(x) * rows].view(len(x), rows)
    zeros = segments.get("zeros")
    assert triton_product.multiply(
        x, segments["codes"], segments["scales"], zeros, bits, form.group, rounds, width, out
    )
    assert memory[out.numel() :].eq(7).all(), case
    return out.cpu()


def check_ways() -> None:
    """The formats offer the kernel for few rows in 16 bits, with groups that it can multiply, and it adds a bias."""
    torch.cuda.get_device_capability = lambda _: (9, 0)  # type: ignore[assignment]
    shape, x, bias = (6, 256), torch.randn(1, 3, 256).half(), torch.randn(6).half()
    form = Int8()
    assert [*form.kernels(shape, 4, torch.float32, CUDA)] == ["dequantize", "triton"]
    assert [*form.kernels(shape, 128, torch.float16, CUDA)] == ["dequantize", "triton"]
    assert [*Affine(4, 8, torch.float16).kernels(shape, 4, torch.float16, CUDA)] == ["dequantize", "triton"]
    for each in (form, Affine(4, 32, torch.float16, zeros=True, reordered=True)):
        segments = _segments(each, shape)
        if "order" in segments:
            segments["order"] = torch.randperm(shape[1]).to(torch.int32)
        ways = each.kernels(shape, 64, torch.float16, CUDA)
        assert [*ways] == ["dequantize", "triton", "fused"]
        scratch = torch.empty(scratch_bytes(shape, x.dtype, CPU), dtype=torch.uint8)
        expected, _, found = (way(x, segments, shape, scratch, bias) for way in ways.values())
        torch.testing.assert_close(found, expected, rtol=4e-3, atol=2e-2)


def check_failure() -> None:
    """A kernel that does not compile is tried once; the numbers come from torch."""
    from specchat.models.quant.kernels import triton_product

    form, shape, x = Int8(), (5, 128), torch.randn(2, 128).half()
    segments, scratch = _segments(form, shape), torch.empty(5 * 128 * 2, dtype=torch.uint8)
    with refusing(triton_product):
        for _ in range(3):
            found = form.kernels(shape, 2, x.dtype, CUDA)["fused"](x, segments, shape, scratch, None)
            assert torch.equal(found, form.linear(x, segments, shape, scratch))


if __name__ == "__main__":
    products = list(small_products((torch.float16,)))
    for product in products:
        check(product, CPU)
    check_ways()
    check_failure()
    print(f"{len(products)} products")
