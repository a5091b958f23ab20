"""Dequantization of ggml's blocks: scales and codes in blocks of 32, 64 or 256 values.

Every function of `DECODERS` takes blocks, uint8 [n, bytes per block], and fills float32 [n, values per block]. The
order of the multiplications is ggml's, so results have the bits of its reference.

Operators of torch take as long for a number of 16 bytes as for one byte. So codes are masked and shifted 8 bytes at a
time, moved 16 bytes at a time, and looked up in pairs. That is 2 to 7 times as fast as one code at a time.
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

Decoder = Callable[[Tensor, Tensor], None]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of e2m1, as in ggml, whose scales are halved.
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


# --- bytes ---------------------------------------------------------------------------------------------------------


def half_at(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 value at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def low_and_high(codes: Tensor) -> Tensor:
    """Return the two 4-bit values of each byte side by side: [n, w] -> [n, 2 w]."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1)


def _words(codes: Tensor) -> Tensor:
    """View bytes [..., 8 k] as int64 [..., k]."""
    return codes.view(torch.int64)


def _wide(codes: Tensor) -> Tensor:
    """View bytes [..., 16 k] as values of 16 bytes [..., k]."""
    return codes.view(torch.complex128)


def _masked(codes: Tensor, shift: int, mask: int) -> Tensor:
    """Return (codes >> shift) & mask for contiguous bytes; a negative shift moves bits up."""
    words = _words(codes.reshape(-1))
    if shift:
        words = words >> shift if shift > 0 else words << -shift
    repeated = int.from_bytes(bytes([mask]) * 8, "little", signed=True)
    return (words & repeated).view(torch.uint8).view(codes.shape)


def _nibbles(codes: Tensor) -> Tensor:
    """Split bytes [..., w] into 4-bit values [..., 2, w]: all low halves, then all high halves."""
    codes = codes.contiguous()
    out = codes.new_empty(*codes.shape[:-1], 2, codes.shape[-1])
    for i in range(2):
        _wide(out)[..., i, :] = _wide(_masked(codes, 4 * i, 15))
    return out


def _quarters(codes: Tensor) -> Tensor:
    """Split bytes [..., w] into 2-bit values [..., 4, w], from the lowest bits to the highest."""
    codes = codes.contiguous()
    out = codes.new_empty(*codes.shape[:-1], 4, codes.shape[-1])
    for i in range(4):
        _wide(out)[..., i, :] = _wide(_masked(codes, 2 * i, 3))
    return out


def _widen(codes: Tensor, out: Tensor) -> Tensor:
    """Copy integers into `out` as float32."""
    return out.view(-1).copy_(codes.view(-1))


def scale_groups(out: Tensor, scales: Tensor, minima: Tensor | None = None) -> None:
    """Multiply equal groups of columns by their scales, and subtract their minima: scales and minima [n, groups]."""
    grouped = out.view(out.shape[0], scales.shape[1], -1).mul_(scales[..., None])
    if minima is not None:
        grouped.sub_(minima[..., None])


# --- 32 values with one scale --------------------------------------------------------------------------------------


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(half_at(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _widen(_nibbles(blocks[:, 2:]).view(torch.int8).sub_(8), out)
    out.mul_(half_at(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _widen(_nibbles(blocks[:, 4:]), out)
    out.mul_(half_at(blocks, 0)).add_(half_at(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    codes = _with_fifth_bits(_nibbles(blocks[:, 6:]), blocks[:, 2:6])
    _widen(codes.view(torch.int8).sub_(16), out)
    out.mul_(half_at(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _widen(_with_fifth_bits(_nibbles(blocks[:, 8:]), blocks[:, 4:8]), out)
    out.mul_(half_at(blocks, 0)).add_(half_at(blocks, 2))


def _with_fifth_bits(codes: Tensor, bits: Tensor) -> Tensor:
    """Add 16 to each code [n, 2, 16] whose bit in `bits`, uint8 [n, 4], is set."""
    _words(codes.view(-1)).bitwise_or_(_fifth_bits(codes.device).index_select(0, bits.reshape(-1).int()))
    return codes


@cache
def _fifth_bits(device: torch.device) -> Tensor:
    """Return the eight bits of each byte as eight bytes of 0 or 16: int64 [256]."""
    return _words((_bits(device) * 16).view(-1))


@cache
def _bits(device: torch.device) -> Tensor:
    """Return the eight bits of each byte, from the lowest to the highest: uint8 [256, 8]."""
    every = torch.arange(256, dtype=torch.uint8, device=device)
    return every[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1


# --- K types: 256 values, scales of groups of 16 or 32 -------------------------------------------------------------


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, :16]
    _widen(_quarters(blocks[:, 16:80].unflatten(1, (2, 32))), out)
    scale_groups(out, (scales & 15) * half_at(blocks, 80), (scales >> 4) * half_at(blocks, 82))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    codes, mask = _quarters(blocks[:, 32:96].unflatten(1, (2, 32))), blocks[:, :32].contiguous()
    for half in range(2):
        for quarter in range(4):
            _words(codes)[:, half, quarter] |= _words(_masked(mask, 4 * half + quarter - 2, 4))
    packed = blocks[:, 96:108]
    scales = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    scales |= torch.cat([(packed[:, 8:] >> 2 * i) & 3 for i in range(4)], 1) << 4
    _widen(codes.view(torch.int8).sub_(4), out)
    scale_groups(out, half_at(blocks, 108) * scales.float().sub_(32))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    codes, groups = blocks[:, 16:].unflatten(1, (4, 32)).contiguous(), out.view(-1, 4, 2, 32)
    for i in range(2):
        groups[:, :, i].copy_(_masked(codes, 4 * i, 15))
    scale_groups(out, *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    high = blocks[:, 16:48].contiguous()
    for group in range(8):
        _words(codes)[:, group] |= _words(_masked(high, group - 4, 16))
    _widen(codes, out)
    scale_groups(out, *_scales_and_minima(blocks))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight scales and eight minima per block, 6 bits each in 12 bytes from byte 4 on: float32 [n, 8] twice."""
    words = blocks[:, 4:16].contiguous().view(torch.int32).t().contiguous()
    own, shared = words[:2], words[2]
    upper = (torch.stack([shared, shared >> 4]) & 0x0F0F0F0F) | (own >> 2 & 0x30303030)
    values = torch.stack([own & 0x3F3F3F3F, upper], 2).view(torch.uint8).float()
    # Contiguous results: `scale_groups` takes more than twice as long with others.
    scales, minima = values.mul_(blocks[:, :4].contiguous().view(torch.float16).t().float().contiguous()[..., None])
    return scales, minima


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    codes = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).view(-1, 2, 4, 32)
    high = blocks[:, 128:192].unflatten(1, (2, 32)).contiguous()
    for quarter in range(4):
        _words(codes)[:, :, quarter] |= _words(_masked(high, 2 * quarter - 4, 48))
    _widen(codes.view(torch.int8).sub_(32), out)
    scale_groups(out, blocks[:, 192:208].view(torch.int8) * half_at(blocks, 208))


# --- tables of 16 values -------------------------------------------------------------------------------------------


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    look_up(_nibbles(blocks[:, 2:]), IQ4_VALUES, out)
    out.mul_(half_at(blocks, 0))


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=blocks.device)
    high = (blocks[:, 2:4].contiguous().view(torch.int16).int() >> shifts) & 3
    scales = (low_and_high(blocks[:, 4:8]) | high << 4) - 32
    look_up(_nibbles(blocks[:, 8:].unflatten(1, (8, 16))), IQ4_VALUES, out)
    scale_groups(out, half_at(blocks, 0) * scales)


def _mxfp4(blocks: Tensor, out: Tensor) -> None:
    look_up(_nibbles(blocks[:, 1:]), E2M1_TWICE, out)
    out.mul_(power_of_two(blocks[:, :1].int() - 128))


def _nvfp4(blocks: Tensor, out: Tensor) -> None:
    """Dequantize four groups of 16 values: 8 bytes each, after four scales."""
    packed = blocks[:, 4:].unflatten(1, (4, 8)).contiguous()
    codes = packed.new_empty(packed.shape[0], 4, 2, 8)
    for half in range(2):
        _words(codes)[:, :, half] = _words(_masked(packed, 4 * half, 15))
    look_up(codes, E2M1_TWICE, out)
    scale_groups(out, unsigned_e4m3(blocks[:, :4].contiguous()) * 0.5)


def unsigned_e4m3(codes: Tensor) -> Tensor:
    """Convert 8-bit floats to float32; ggml reads the code of NaN as 0."""
    values = (codes & 127).view(torch.float8_e4m3fn).float()
    return values.nan_to_num_(0.0)


def power_of_two(exponents: Tensor) -> Tensor:
    """Return 2^e as float32 for integers e, exactly, subnormal results too."""
    return torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents.int())


def look_up(codes: Tensor, values: tuple[int, ...], out: Tensor) -> None:
    """Replace 4-bit codes, one per byte, by float32 values, two at a time."""
    pairs = _pairs(values, codes.device)
    torch.index_select(pairs, 0, codes.view(-1).view(torch.int16).int(), out=out.view(-1).view(torch.int64))


@cache
def _pairs(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return two float32 values as int64 for every pair of codes, at an index with one code per byte."""
    index, table = torch.arange(0x1000), torch.tensor(values, dtype=torch.float32)
    return torch.stack([table[index & 15], table[index >> 8 & 15]], 1).view(torch.int64).view(-1).to(device)


# --- ternary types -------------------------------------------------------------------------------------------------


def _tq2_0(blocks: Tensor, out: Tensor) -> None:
    _widen(_quarters(blocks[:, :64].unflatten(1, (2, 32))).view(torch.int8).sub_(1), out)
    out.mul_(half_at(blocks, 64))


def _tq1_0(blocks: Tensor, out: Tensor) -> None:
    """Dequantize base-3 digits, the first digit in the highest place: 5 in each of 48 bytes, 4 in each of 4 bytes."""
    at = 0
    for part, num_digits in ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)):
        for digit in range(num_digits):
            wrapped = part * 3**digit  # uint8: the digits before this one overflow
            out[:, at : at + part.shape[1]] = (wrapped.to(torch.int16) * 3 >> 8) - 1
            at += part.shape[1]
    out.mul_(half_at(blocks, 52))


DECODERS: Mapping[str, Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
