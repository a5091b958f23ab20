"""Matrices for our Triton kernel, and whether it gives torch's numbers; without a GPU by Triton's interpreter.

TRITON_INTERPRET=1 PYTHONPATH=.:tests python -m support.triton_cases
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.base import Segment, WeightFormat
from specchat.models.quant.formats.fp4 import MxFp4
from specchat.models.quant.formats.fp8 import Fp8
from specchat.models.quant.formats.ggml import Blocks
from specchat.models.quant.formats.int3 import Int3
from specchat.models.quant.formats.int8 import Int8
from specchat.models.quant.formats.nf4 import Bnb4
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels.chunked import Dequantize, scratch_bytes
from specchat.models.quant.kernels.grouped import Grouping, multiply_grouped
from specchat.models.quant.kernels.refusals import forget_refusals, take_refusals
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.triton import dequantize_by_triton
from specchat.models.quant.kernels.unpacked import INT3, KINDS

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A matrix, what it is stored in, which of its rows are wanted, and in which dtype."""

    form: Affine | Int8
    shape: tuple[int, int]
    rows: tuple[int, int]
    wanted: torch.dtype


def small_cases() -> Iterator[Case]:
    """Every kind of number in every dtype; odd columns, ragged groups, more columns than a program has, some rows."""
    shapes = ((1, 1), (3, 31), (4, 200), (2, 1100))
    for bits, zeros, scale_dtype, wanted in itertools.product((4, 8), (False, True), FLOATS, FLOATS):
        for shape, group in zip(shapes, (None, 8, 128, 32), strict=True):
            yield Case(Affine(bits, group, scale_dtype, zeros), shape, (shape[0] // 2, shape[0]), wanted)
    for shape, group, wanted in itertools.product(shapes, (128, 32), FLOATS):
        yield Case(Int8(group), shape, (0, shape[0]), wanted)


def large_cases() -> Iterator[Case]:
    """What layers have, for a GPU."""
    for zeros, scale_dtype, wanted in itertools.product((False, True), (torch.float16, torch.bfloat16), FLOATS):
        for bits, group, shape in ((4, 128, (4096, 11008)), (4, 32, (1001, 4097)), (8, None, (4096, 4096))):
            yield Case(Affine(bits, group, scale_dtype, zeros), shape, (7, shape[0]), wanted)
    for wanted in FLOATS:
        yield Case(Int8(), (11008, 4096), (0, 11008), wanted)


def random_segments(form: Affine | Int8, shape: tuple[int, int], *, exact: bool = False) -> dict[str, Tensor]:
    """Any codes; scales of any size and sign, some so large and small that 16 bits overflow and underflow.

    Args:
        exact: scales are powers of two, so that bfloat16 has all the numbers.
    """
    generator = torch.Generator().manual_seed(0)
    segments = {}
    for each in form.segments(*shape):
        if each.name == "scales":
            sizes = 10.0 ** torch.randint(-7, 5, each.shape, generator=generator)
            scales = torch.randn(each.shape, generator=generator) * sizes
            segments[each.name] = (scales.sign() * scales.abs().log2().floor().exp2() if exact else scales).to(
                each.dtype
            )
        elif each.name == "zeros":
            least, end = (-16, 17) if form.bits == 4 else (-128, 128)
            segments[each.name] = torch.randint(least, end, each.shape, dtype=each.dtype, generator=generator)
        else:
            codes = torch.randint(0, 256, each.shape, dtype=torch.uint8, generator=generator)
            segments[each.name] = codes.view(each.dtype)
    return segments


def by_triton(form: Affine | Int8, eager: Dequantize) -> Dequantize:
    """The format's numbers by the kernel."""
    bits, rounds = (8, False) if isinstance(form, Int8) else (form.bits, True)
    return partial(dequantize_by_triton, eager, bits, form.group, rounds)


def check(case: Case, device: torch.device) -> None:
    """The kernel gives the numbers that torch gives on a CPU, and writes nothing but them.

    Triton's interpreter, on a CPU, cuts off what does not fit into a bfloat16, where a GPU rounds.
    """

    def never(*_: object) -> Tensor:
        raise AssertionError("the kernel was not used")

    begin, end = case.rows
    cols = case.shape[1]
    cut_off = device == CPU and torch.bfloat16 in {case.wanted, *(s.dtype for s in case.form.segments(*case.shape))}
    segments = random_segments(case.form, case.shape, exact=cut_off)
    expected = case.form.dequantize(segments, begin, end, torch.empty(end - begin, cols, dtype=case.wanted))
    memory = torch.full(((end - begin) * cols + 64,), 7.0, dtype=case.wanted, device=device)
    out = memory[: (end - begin) * cols].view(end - begin, cols)
    there = {name: segment.to(device) for name, segment in segments.items()}
    found = by_triton(case.form, never)(there, begin, end, out)
    assert found is out
    assert torch.equal(found.cpu(), expected), case
    assert memory[out.numel() :].eq(7).all(), case


@dataclass(frozen=True)
class Turned(Plain):
    """Unquantized weights [cols, rows], as gpt-oss stores them."""

    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        return (Segment("weight", (cols, rows), self.dtype),)

    def dequantize(self, segments: Any, begin: int, end: int, out: Tensor) -> Tensor:
        return out.copy_(segments["weight"].T[begin:end])

    def tile_form(self, shape: tuple[int, int]) -> TileForm:
        return TileForm("plain transposed", scale_dtype=self.dtype)


# Formats of experts, and the columns that their matrices have here: the last block of columns is not full.
EXPERT_FORMS: list[tuple[WeightFormat, int]] = [
    (Int8(), 200),
    (Int8(32), 70),
    *((Affine(bits, group, dtype, zeros), 72) for bits, group in ((4, 32), (8, None)) for dtype in FLOATS[1:]
      for zeros in (False, True)),
    (Affine(4, 8, torch.float16), 33),
    (Bnb4(), 200),
    (Bnb4("fp4", 32, nested=False), 66),
    (Fp8(None, None, torch.float32), 70),
    (Fp8(1, None, torch.bfloat16), 70),
    (Fp8(16, 32, torch.bfloat16), 70),
    (MxFp4(), 96),
    *((Plain(dtype), 70) for dtype in FLOATS),
    *((Turned(dtype), 70) for dtype in FLOATS),
    *((Blocks(kind), BLOCK_TYPES[kind].numbers * (3 if BLOCK_TYPES[kind].numbers < 256 else 1)) for kind in KINDS),
]  # fmt: skip


def expert_segments(form: WeightFormat, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Any codes; scales around 1, powers of two if Triton's interpreter would cut them off."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(form, Blocks):
        return {"blocks": _expert_blocks(form.kind, form.segments(*shape)[0], generator)}
    segments = {}
    for each in form.segments(*shape):
        codes = torch.randint(0, 256, each.shape, dtype=torch.uint8, generator=generator)
        if each.dtype == torch.float8_e4m3fn:
            codes[codes & 0x7F == 0x7F] = 3  # NaN
        segments[each.name] = codes.view(each.dtype) if each.dtype.itemsize == 1 else codes
        if each.dtype.itemsize > 1:
            segments[each.name] = 2.0 ** (codes % 4).float().sub(2).to(each.dtype)
        elif isinstance(form, MxFp4) and each.name == "scales":
            segments[each.name] = codes % 9 + 123
        elif each.name == "zeros":
            segments[each.name] = codes.view(torch.int8) // 8
    return segments


def _expert_blocks(kind: str, segment: Segment, generator: torch.Generator) -> Tensor:
    """Any codes; scales so small that the products of rows stay finite in float16."""
    found = torch.randint(0, 256, segment.shape, dtype=torch.uint8, generator=generator)
    blocks = found.view(-1, BLOCK_TYPES[kind].nbytes)
    if kind == "MXFP4":
        blocks[:, 0] = blocks[:, 0] % 9 + 118
    elif kind == "NVFP4":
        blocks[:, :4] %= 64
    else:
        for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
            scales = 2.0 ** -torch.randint(8, 12, (len(blocks),), generator=generator).float()
            blocks[:, at : at + 2] = scales.half().view(torch.uint8).view(-1, 2)
    return found


def check_experts(form: WeightFormat, cols: int, dtype: torch.dtype, device: torch.device) -> None:
    """The kernel for many experts gives the products of single matrices, whatever other pairs there are.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers, so 16 bits are float16 there.
    """
    num_experts, rows, first = 5, 67, 3
    shape = rows, cols
    matrices = [expert_segments(form, shape, seed) for seed in range(num_experts)]
    there = [{name: segment.to(device) for name, segment in each.items()} for each in matrices]
    addresses = torch.tensor([[each[name].data_ptr() for each in there] for name in there[0]], device=device)
    tile = form.tile_form(shape)
    assert tile is not None
    # Expert 2 has no pair, expert 4 more than one block of them; the number of experts stands for none.
    ids = torch.tensor([[4, 0], [4, 1], [3, 5], [0, 4], *[[4, 1]] * 20])
    x = torch.randn(len(ids), cols, generator=torch.Generator().manual_seed(1)).to(dtype)

    def product(x: Tensor, ids: Tensor) -> Tensor:
        out = torch.full((ids.numel(), first + rows + 2), 7.0, dtype=dtype, device=device)
        grouping = Grouping.of(ids.reshape(-1).to(device), num_experts)
        assert multiply_grouped(x.to(device), grouping, addresses, tile, shape, out, first=first, per_row=2)
        kept = out.cpu()
        assert kept[:, :first].eq(7).all() and kept[:, first + rows :].eq(7).all()
        assert kept[ids.reshape(-1) == num_experts].eq(7).all()
        return kept[:, first : first + rows]

    found = product(x, ids)
    for pair, expert in enumerate(ids.reshape(-1).tolist()):
        if expert < num_experts:
            weight = form.dequantize(matrices[expert], 0, rows, torch.empty(shape, dtype=dtype))
            expected = x[pair // 2].double() @ weight.double().T
            limit = (1e-6 if dtype == torch.float32 else 2**-7) * float(expected.abs().max())
            assert (found[pair].double() - expected).abs().max() <= limit, (form, dtype, pair)
    for row in (0, 3):
        assert torch.equal(product(x[row : row + 1], ids[row : row + 1]), found[2 * row : 2 * row + 2]), form


def check_products() -> None:
    """The formats ask the kernel for the right numbers: the same products as without it, as if this were a GPU."""
    torch.cuda.get_device_capability = lambda _: (9, 0)  # type: ignore[assignment]
    shape = (5, 72)
    x, bias = torch.randn(1, 3, shape[1]), torch.randn(shape[0])
    affine = (Affine(4, 32, torch.float16, zeros, reordered) for zeros in (False, True) for reordered in (False, True))
    for form in (Int8(32), Affine(8, None, torch.float16), *affine):
        segments = random_segments(form, shape)
        segments["scales"].clamp_(-2, 2)  # sums are to stay finite
        if "order" in segments:
            segments["order"] = torch.randperm(shape[1]).to(torch.int32)
        scratch = torch.empty(scratch_bytes(shape, x.dtype, CPU), dtype=torch.uint8)
        ways = form.kernels(shape, 4, x.dtype, torch.device("cuda"))
        assert [*ways] == ["dequantize", "triton"]
        expected, found = (way(x, segments, shape, scratch, bias) for way in ways.values())
        assert torch.equal(found, expected), form


@contextmanager
def refusing(module: ModuleType) -> Iterator[None]:
    """A module whose kernel does not compile; checks that it was tried once, and that this is told once."""
    calls = 0

    class Failing:
        def __getitem__(self, grid: object) -> None:
            nonlocal calls
            calls += 1
            raise RuntimeError("no compiler")

    kernel, module._kernel = module._kernel, Failing()
    yield
    said = take_refusals()
    assert calls == len(said) == 1 and said[0].endswith("no compiler")
    module._kernel = kernel
    forget_refusals()


def check_failure() -> None:
    """A kernel that does not compile is tried once; the numbers come from torch."""
    from specchat.models.quant.kernels import triton_affine

    form, shape = Affine(4, 32, torch.float16, zeros=True), (5, 70)
    segments = random_segments(form, shape)
    expected = form.dequantize(segments, 1, 5, torch.empty(4, 70))
    with refusing(triton_affine):
        for _ in range(3):
            found = by_triton(form, form.dequantize)(segments, 1, 5, torch.empty(4, 70))
            assert torch.equal(found, expected)


def form_of(kind: str) -> Blocks | Int3:
    return Int3() if kind == INT3 else Blocks(kind)


def random_codes(kind: str, shape: tuple[int, int], *, exact: bool = False) -> dict[str, Tensor]:
    """Any codes, without infinite scales.

    Args:
        exact: scales are so simple that bfloat16 has all the numbers, as far as the type allows it.
    """
    generator = torch.Generator().manual_seed(0)
    form = form_of(kind)
    found = {s.name: torch.randint(0, 256, s.shape, dtype=s.dtype, generator=generator) for s in form.segments(*shape)}
    if kind == INT3:
        found["scales"] = found["scales"] % 255 // 8 * 8 if exact else found["scales"] % 255
        return found
    nbytes = BLOCK_TYPES[kind].nbytes
    blocks = found["blocks"].view(-1, nbytes)
    for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (), "NVFP4": ()}.get(kind, (0,)):
        scales = torch.randn(len(blocks), generator=generator) * 10.0 ** torch.randint(-5, 3, (len(blocks),))
        halves = (scales.sign() * scales.abs().log2().floor().exp2() if exact else scales).half()
        blocks[:, at : at + 2] = halves.view(torch.uint8).view(-1, 2)
    return found


# Values of these types have so few bits that bfloat16 has them, if scales are powers of two.
EXACT = ("Q4_0", "Q8_0", "IQ4_NL", "MXFP4", INT3)


def check_blocks(
    kind: str, shape: tuple[int, int], rows: tuple[int, int], wanted: torch.dtype, device: torch.device
) -> None:
    """The kernels give the values that torch gives on a CPU, and write nothing but them."""
    form, (begin, end), cols = form_of(kind), rows, shape[1]
    segments = random_codes(kind, shape, exact=device == CPU and wanted == torch.bfloat16)
    expected = form.dequantize(segments, begin, end, torch.empty(end - begin, cols, dtype=wanted))
    memory = torch.full(((end - begin) * cols + 64,), 7.0, dtype=wanted, device=device)
    out = memory[: (end - begin) * cols].view(end - begin, cols)
    there = {name: segment.to(device) for name, segment in segments.items()}
    from specchat.models.quant.kernels.triton_blocks import fill

    assert fill(form.unpack(there, begin, end), out)
    assert torch.equal(out.cpu().view(torch.uint8), expected.view(torch.uint8)), (kind, shape, wanted)
    assert memory[out.numel() :].eq(7).all(), (kind, shape)


def check_product(kind: str, shape: tuple[int, int], m: int, device: torch.device) -> None:
    """The product has the bits of partial sums over every `PRODUCT_BLOCK`-th column, and of these sums' sum."""
    from specchat.models.quant.kernels.triton_blocks import PRODUCT_BLOCK, multiply

    form, (rows, cols) = form_of(kind), shape
    segments = random_codes(kind, shape)
    if kind == "MXFP4":  # sums are to stay finite
        segments["blocks"].view(-1, BLOCK_TYPES[kind].nbytes)[:, 0] %= 140
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(1))
    values = form.dequantize(segments, 0, rows, torch.empty(shape))
    sums = torch.zeros(m, rows, PRODUCT_BLOCK)
    for begin in range(0, cols, PRODUCT_BLOCK):
        part = slice(begin, begin + PRODUCT_BLOCK)
        sums[:, :, : values[:, part].shape[1]] += x[:, None, part] * values[:, part]
    expected = torch.from_numpy(sums.numpy().sum(2))
    there = {name: segment.to(device) for name, segment in segments.items()}
    memory = torch.full((m * rows + 64,), 7.0, device=device)
    out = memory[: m * rows].view(m, rows)
    assert multiply(form.unpack(there, 0, rows), x.to(device), out)
    assert memory[m * rows :].eq(7).all(), (kind, shape)
    if device == CPU:
        assert torch.equal(out, expected), (kind, m)
    else:  # a GPU adds up the partial sums in another order
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def check_order() -> None:
    """Interleaved rows come out in order, by both kernels and with a bias, as if this were a GPU."""
    torch.cuda.get_device_capability = lambda _: (9, 0)  # type: ignore[assignment]
    form, shape = Blocks("Q8_0", heads=2), (16, 64)
    segments = random_codes("Q8_0", shape)
    ones = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    segments["blocks"].view(-1, BLOCK_TYPES["Q8_0"].nbytes)[:, :2] = ones  # sums of integers are exact
    x, bias = torch.randint(-4, 5, (2, shape[1])).float(), torch.arange(16.0)
    scratch = torch.empty(scratch_bytes(shape, x.dtype, CPU), dtype=torch.uint8)
    cuda = torch.device("cuda")
    assert [*form.kernels(shape, 2, torch.float32, cuda)] == ["dequantize", "triton"]
    assert [*form.kernels(shape, 17, torch.bfloat16, cuda)] == ["dequantize", "triton"]
    ways = form.kernels(shape, 2, torch.bfloat16, cuda)
    assert [*ways] == ["dequantize", "triton", "fused"]
    expected, *found = (way(x, segments, shape, scratch, bias) for way in ways.values())
    assert all(torch.equal(each, expected) for each in found)


def block_cases() -> Iterator[tuple[str, tuple[int, int], tuple[int, int], torch.dtype]]:
    for kind in (*KINDS, INT3):
        for wanted in FLOATS:
            if wanted != torch.bfloat16 or kind in EXACT:
                yield kind, (3, 1280), (1, 3), wanted
    yield INT3, (3, 333), (0, 3), torch.float32
    yield INT3, (2, 5), (1, 2), torch.float32


if __name__ == "__main__":
    cases = list(small_cases())
    for each in cases:
        check(each, CPU)
    # The interpreter of Triton 3.6 cannot loop up to a number that was loaded, with numpy's newest versions.
    for form, cols in EXPERT_FORMS if Version(version("triton")) >= Version("3.7") else ():
        for dtype in (torch.float32, torch.float16):
            check_experts(form, cols, dtype, CPU)
    check_products()
    check_failure()
    blocks = list(block_cases())
    for each_block in blocks:
        check_blocks(*each_block, CPU)
    for each_kind in (*KINDS, INT3):
        check_product(each_kind, (3, 1280), 3, CPU)
    check_product(INT3, (2, 333), 1, CPU)
    check_order()
    print(f"{len(cases)} matrices, {len(blocks)} of blocks")
