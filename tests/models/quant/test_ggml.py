"""Blocks of GGUF files, against the reference of the gguf package, bit for bit."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, PLAIN_TYPES
from specchat.models.quant.formats.ggml import AlternatingBlocks, Blocks

PACKED = sorted(BLOCK_TYPES.keys() - PLAIN_TYPES)
ROWS, COLS = 40, 512


def random_rows(kind: str, rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    """Blocks of random bytes, uint8 [rows, row bytes], with every code and without infinite scales."""
    block = BLOCK_TYPES[kind]
    generator = torch.Generator().manual_seed(sum(kind.encode()))
    blocks = torch.randint(0, 256, (rows * cols // block.numbers, block.nbytes), dtype=torch.uint8, generator=generator)
    values = reference(kind, blocks)
    # scales are float16 somewhere in the block: an infinite one says nothing about the order of operations
    bad = ~np.isfinite(values).all(1)
    while bad.any():
        blocks[bad] = torch.randint(0, 256, (int(bad.sum()), block.nbytes), dtype=torch.uint8, generator=generator)
        bad = ~np.isfinite(reference(kind, blocks)).all(1)
    if kind == "NVFP4":
        blocks[:, :4] &= 127  # scales are unsigned
    return blocks.view(rows, -1)


def reference(kind: str, rows: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(rows.numpy(), GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", PACKED)
def test_values_have_the_bits_of_the_reference(kind):
    rows = random_rows(kind)
    expected = torch.from_numpy(reference(kind, rows))
    found = Blocks(kind).dequantize({"blocks": rows}, 0, ROWS, torch.empty(ROWS, COLS))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ3_S", "Q5_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_rounded_once(kind, dtype):
    rows = random_rows(kind)
    expected = torch.from_numpy(reference(kind, rows)).to(dtype)
    found = Blocks(kind).dequantize({"blocks": rows}, 0, ROWS, torch.empty(ROWS, COLS, dtype=dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["Q6_K", "Q8_0", "BF16"])
def test_a_row_does_not_depend_on_the_range(kind):
    rows = random_rows(kind) if kind != "BF16" else torch.randn(ROWS, COLS).bfloat16().view(torch.uint8)
    whole = Blocks(kind, 5).dequantize({"blocks": rows}, 0, ROWS, torch.empty(ROWS, COLS))
    part = Blocks(kind, 5).dequantize({"blocks": rows}, 7, 29, torch.empty(22, COLS))
    assert torch.equal(whole[7:29], part)


def test_interleaved_halves_of_heads_are_put_in_order():
    heads, head_dim = 4, 10
    weight = torch.randn(heads * head_dim, 64)
    stored = weight.view(heads, 2, head_dim // 2, 64).transpose(1, 2).reshape(weight.shape)  # as llama.cpp's converter
    rows = stored.contiguous().view(torch.uint8)
    found = Blocks("F32", heads).dequantize({"blocks": rows}, 0, len(weight), torch.empty_like(weight))
    assert torch.equal(found, weight)


@pytest.mark.parametrize(("begin", "end"), [(0, 2 * ROWS), (1, 8), (4, 9), (7, 7 + 1), (3, 10)])
def test_alternating_rows_come_from_two_matrices(begin, end):
    even, odd = random_rows("Q8_0"), torch.randn(ROWS, COLS).bfloat16()
    whole = torch.empty(2 * ROWS, COLS)
    whole[0::2], whole[1::2] = torch.from_numpy(reference("Q8_0", even)), odd.float()
    own = AlternatingBlocks("Q8_0", "BF16")
    segments = {"even": even, "odd": odd.view(torch.uint8)}
    assert [segment.shape for segment in own.segments(2 * ROWS, COLS)] == [each.shape for each in segments.values()]
    found = own.dequantize(segments, begin, end, torch.empty(end - begin, COLS))
    assert torch.equal(found, whole[begin:end])


def test_plain_rows_of_the_wanted_dtype_are_not_copied():
    rows = torch.randn(8, 32).bfloat16()
    found = Blocks("BF16").dequantize(
        {"blocks": rows.view(torch.uint8)}, 2, 5, torch.empty(3, 32, dtype=torch.bfloat16)
    )
    assert found.data_ptr() == rows[2:].data_ptr()
