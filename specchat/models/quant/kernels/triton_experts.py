"""Products of many experts on a GPU in one Triton kernel, which dequantizes as it multiplies. Not measured on a GPU.

A loop over experts starts some eight kernels for each, a thousand a layer with 128 experts. The host then takes longer
for a layer than its bytes take to arrive. Here a program serves one expert and some rows of its matrix, so the host
starts one kernel and waits for no counts.

This module imports Triton, so only GPU code imports it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.triton_blocks import unpacked_values
from specchat.models.quant.kernels.triton_start import start

_BLOCK_ROWS = 64
_BLOCK_COLS = 64
# Pairs of row and expert that are multiplied at a time: few of an expert in a tree, many in a prompt.
_FEW_PAIRS, _MANY_PAIRS = 16, 64
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def multiply(
    x: Tensor,
    order: Tensor,
    starts: Tensor,
    addresses: Tensor,
    values: Tensor,
    out: Tensor,
    shape: tuple[int, int],
    first: int,
    per_row: int,
    form: TileForm,
) -> bool:
    """Fill columns of `out` with x W^T, for each pair with the W of its expert; sums are float32.

    The sum of a pair runs over blocks of columns of W in order. It does not depend on other pairs.

    Args:
        x: activations [rows, cols], contiguous; pair p has row p // per_row.
        order: pairs grouped by expert, int64 [pairs].
        starts: place in `order` of each expert's first pair, and after the last one's, int64 [experts + 1].
        addresses: addresses on the GPU of each segment of each expert's matrix, int64 [segments, experts].
        values: values that codes stand for, float32 [16], and of a nested absmax [256]; the table of ggml's blocks.
        out: products [pairs, width] in the dtype of x, contiguous.
        shape: (rows, cols) of W.
        first: first column of `out` to fill.
        per_row: pairs of a row of x.
        form: format of the matrices.

    Returns:
        Whether `out` was filled. The kernel may not compile; a device on which it failed is not tried again.
    """
    num_experts, (rows, cols) = addresses.shape[1], shape
    block_pairs = _FEW_PAIRS if len(order) <= 2 * _FEW_PAIRS * num_experts else _MANY_PAIRS

    def call() -> None:
        _kernel[num_experts, triton.cdiv(rows, _BLOCK_ROWS)](
            x,
            order,
            starts,
            addresses,
            values,
            out,
            rows,
            cols,
            first,
            out.shape[1],
            num_experts,
            per_row=per_row,
            block_pairs=block_pairs,
            block_rows=_BLOCK_ROWS,
            block_cols=_BLOCK_COLS,
            enable_fp_fusion=False,
            **constants_of(form),
        )

    return start("experts", x, call)


def constants_of(form: TileForm) -> dict[str, object]:
    """Return the kernel's constants that describe a format."""
    return {
        "kind": form.kind,
        "bits": form.bits,
        "group": form.group,
        "group_rows": form.group_rows,
        "middle": form.middle,
        "has_zeros": form.has_zeros,
        "scale_dtype": _TYPES[form.scale_dtype],
        "rounds": form.rounds,
        "block": form.block,
        "block_numbers": form.block_numbers,
        "block_bytes": form.block_bytes,
    }


@triton.jit(do_not_specialize=["first"])  # type: ignore[untyped-decorator]
def _kernel(
    x: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    addresses: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    num_experts: tl.tensor,
    kind: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    group_rows: tl.constexpr,
    middle: tl.constexpr,
    has_zeros: tl.constexpr,
    scale_dtype: tl.constexpr,
    rounds: tl.constexpr,
    block: tl.constexpr,
    block_numbers: tl.constexpr,
    block_bytes: tl.constexpr,
    per_row: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
) -> None:
    """Multiply all pairs of one expert by a block of rows of its matrix."""
    expert = tl.program_id(0)
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    mine = addresses + expert
    for base in range(begin, end, block_pairs):
        place = base + tl.arange(0, block_pairs)
        is_pair = place < end
        pair = tl.load(order + place, mask=is_pair, other=0)
        total = tl.zeros((block_pairs, block_rows), dtype=tl.float32)
        for left in range(0, cols, block_cols):
            col = left + tl.arange(0, block_cols)
            inside = (row[:, None] < rows) & (col[None, :] < cols)
            weight = _weights(
                mine, num_experts, values, row[:, None], col[None, :], inside, rows, cols,
                kind, bits, group, group_rows, middle, has_zeros, scale_dtype, rounds,
                block, block_numbers, block_bytes,
            )  # fmt: skip
            is_number = is_pair[:, None] & (col[None, :] < cols)
            numbers = tl.load(x + (pair // per_row)[:, None] * cols + col[None, :], mask=is_number, other=0)
            total = tl.dot(numbers, tl.trans(weight.to(x.dtype.element_ty)), total, input_precision="ieee")
        target = out + pair[:, None] * width + first + row[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=is_pair[:, None] & (row[None, :] < rows))


@triton.jit  # type: ignore[untyped-decorator]
def _weights(
    mine: tl.tensor,
    num_experts: tl.tensor,
    values: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    inside: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    kind: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    group_rows: tl.constexpr,
    middle: tl.constexpr,
    has_zeros: tl.constexpr,
    scale_dtype: tl.constexpr,
    rounds: tl.constexpr,
    block: tl.constexpr,
    block_numbers: tl.constexpr,
    block_bytes: tl.constexpr,
) -> tl.tensor:
    """Dequantize a block of an expert's matrix: float32 [rows, cols] of the block, the format's own values."""
    codes = tl.load(mine).to(tl.pointer_type(tl.uint8))
    flat = row.to(tl.int64) * cols + col
    if kind == "plain" or kind == "plain transposed":  # noqa: PLR1714  Triton has no sets
        place = flat if kind == "plain" else col.to(tl.int64) * rows + row
        return tl.load(codes.to(tl.pointer_type(scale_dtype)) + place, mask=inside, other=0).to(tl.float32)
    if kind == "blocks":
        of_row = codes + row.to(tl.int64) * (cols // block_numbers * block_bytes)
        return unpacked_values(
            of_row, of_row, of_row, of_row, values, col, inside, block, block_numbers, block_bytes
        )  # fmt: skip
    scales = tl.load(mine + num_experts)
    if kind == "nf4" or kind == "nf4 nested":  # noqa: PLR1714  Triton has no sets
        byte = tl.load(codes + flat // 2, mask=inside, other=0).to(tl.int32)
        steps = tl.load(values + ((byte >> (4 * (1 - flat % 2))) & 15))
        block = flat // group
        if kind == "nf4":
            scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + block, mask=inside, other=0)
        else:
            code = tl.load(scales.to(tl.pointer_type(tl.uint8)) + block, mask=inside, other=0).to(tl.int32)
            nested = tl.load(mine + 2 * num_experts).to(tl.pointer_type(tl.float32))
            mean = tl.load(tl.load(mine + 3 * num_experts).to(tl.pointer_type(tl.float32)))
            scale = tl.load(values + 16 + code) * tl.load(nested + block // 256, mask=inside, other=0) + mean
        return steps * scale
    if kind == "mxfp4":
        byte = tl.load(codes + flat // 2, mask=inside, other=0).to(tl.int32)
        steps = tl.load(values + ((byte >> (4 * (flat % 2))) & 15))
        power = tl.load(scales.to(tl.pointer_type(tl.uint8)) + flat // 32, mask=inside, other=1).to(tl.int32)
        return steps * tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)
    if kind == "fp8":
        byte = tl.load(codes + flat, mask=inside, other=0).to(tl.int32)
        shifted = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
        steps = shifted.to(tl.float32, bitcast=True) * 2.0**120
    elif bits == 4:
        packed = tl.load(codes + row.to(tl.int64) * ((cols + 1) // 2) + col // 2, mask=inside, other=0).to(tl.int32)
        steps = ((packed >> (4 * (col % 2))) & 15).to(tl.float32)
    else:
        steps = tl.load(codes.to(tl.pointer_type(tl.int8)) + flat, mask=inside, other=0).to(tl.float32)
    num_groups = 1 if group == 0 else tl.cdiv(cols, group)
    at_col = col * 0 if group == 0 else col // group
    at_row = row * 0 if group_rows == 0 else row // group_rows
    at = at_row.to(tl.int64) * num_groups + at_col
    if has_zeros:
        zeros = tl.load(mine + 2 * num_experts).to(tl.pointer_type(tl.int8))
        steps -= tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
    else:
        steps -= middle
    numbers = steps * tl.load(scales.to(tl.pointer_type(scale_dtype)) + at, mask=inside, other=0).to(tl.float32)
    return numbers.to(scale_dtype).to(tl.float32) if rounds else numbers
