"""The matrices of experts from the addresses of their segments, as a kernel finds them: slow, in torch on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from specchat.models.quant.formats.ggml import decode
from specchat.models.quant.kernels.tiles import TileForm


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
    """What `triton_experts.multiply` does."""
    assert x.is_contiguous() and out.is_contiguous() and x.dtype == out.dtype and x.shape[1] == shape[1]
    for expert, places in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        pairs = order[slice(*places)]
        if len(pairs):
            weight = weights(addresses[:, expert].tolist(), values, form, shape).to(x.dtype)
            out[pairs, first : first + shape[0]] = x[pairs // per_row] @ weight.T
    return True


def weights(addresses: list[int], values: Tensor, form: TileForm, shape: tuple[int, int]) -> Tensor:
    """The numbers of one matrix: float32 [rows, cols]."""
    rows, cols = shape
    if form.kind.startswith("plain"):
        numbers = _memory(addresses[0], rows * cols, form.scale_dtype).float()
        return numbers.view(shape) if form.kind == "plain" else numbers.view(cols, rows).T
    if form.kind == "blocks":
        row_bytes = cols // form.block_numbers * form.block_bytes
        blocks = _memory(addresses[0], rows * row_bytes, torch.uint8).view(rows, row_bytes)
        return decode(form.block, blocks, torch.empty(shape))
    if form.kind.startswith("nf4"):
        codes = _memory(addresses[0], rows * cols // 2, torch.uint8).int()
        steps = values[torch.stack([codes >> 4, codes & 15], 1).view(-1)]
        blocks = torch.arange(rows * cols) // form.group
        if form.kind == "nf4":
            scales = _memory(addresses[1], int(blocks[-1]) + 1, torch.float32)
        else:
            absmax = _memory(addresses[1], int(blocks[-1]) + 1, torch.uint8).int()
            nested = _memory(addresses[2], len(absmax) // 256 + 1, torch.float32)
            scales = values[16 + absmax] * nested[torch.arange(len(absmax)) // 256]
            scales = scales + _memory(addresses[3], 1, torch.float32)
        return (steps * scales[blocks]).view(shape)
    if form.kind == "mxfp4":
        powers = _memory(addresses[1], rows * cols // 32, torch.uint8).view(rows, -1)
        scales = 2.0 ** (powers.double() - 127)
        steps = values[_nibbles(addresses[0], shape).int()]
        return (steps * scales.repeat_interleave(32, 1)).float()
    if form.kind == "fp8":
        steps = _memory(addresses[0], rows * cols, torch.float8_e4m3fn).view(shape).float()
    elif form.bits == 4:
        steps = _nibbles(addresses[0], shape).float()
    else:
        steps = _memory(addresses[0], rows * cols, torch.int8).view(shape).float()
    group_rows, group = form.group_rows or rows, form.group or cols
    grid = -(-rows // group_rows), -(-cols // group)

    def spread(address: int, dtype: torch.dtype) -> Tensor:
        numbers = _memory(address, grid[0] * grid[1], dtype).view(grid).float()
        return numbers.repeat_interleave(group_rows, 0)[:rows].repeat_interleave(group, 1)[:, :cols]

    steps = steps - (spread(addresses[2], torch.int8) if form.has_zeros else form.middle)
    numbers = steps * spread(addresses[1], form.scale_dtype)
    return numbers.to(form.scale_dtype).float() if form.rounds else numbers


def _nibbles(address: int, shape: tuple[int, int]) -> Tensor:
    codes = _memory(address, shape[0] * -(-shape[1] // 2), torch.uint8).view(shape[0], -1)
    return torch.stack([codes & 15, codes >> 4], 2).view(shape[0], -1)[:, : shape[1]]


def _memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
