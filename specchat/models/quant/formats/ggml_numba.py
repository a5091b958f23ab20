"""Loops over ggml's blocks for numba: all steps from the bytes of a block to rounded values at once.

Each loop takes the address of blocks, a pointer to the output, and the number of blocks. The order of operations is
that of `formats.ggml_blocks`, so results have the same bits.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from specchat.models.quant.formats.ggml_blocks import E2M1_TWICE, IQ4_VALUES
from specchat.models.quant.formats.ggml_codebooks import codebook
from specchat.models.quant.kernels.numba_lanes import (
    as_float,
    bits_16,
    both_halves,
    byte_at,
    codes_8,
    codes_16,
    codes_32,
    entries,
    field,
    less,
    lookup,
    negated,
    put,
    put_minus,
    put_plus,
    short_at,
    signed_byte_at,
    with_high,
    word_at,
)

_loop = njit(error_model="numpy")
_of_iq4, _of_e2m1 = lookup(IQ4_VALUES), lookup(E2M1_TWICE)


@_loop
def _half_at(at: int) -> Any:
    """Return the float16 value at an address as float32."""
    bits = np.uint32(short_at(at))
    # The bits, moved to their places in a float32, are a value of another bias: subnormal float16 are then subnormal.
    value = as_float(np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00):
        value = np.float32(np.nan) if bits & np.uint32(0x3FF) else np.float32(np.inf)
    return -value if bits & np.uint32(0x8000) else value


# --- 32 values with one scale --------------------------------------------------------------------------------------


@_loop
def _q8_0(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 34 * b
        put(out, 32 * b, codes_32(at + 2), _half_at(at))


@_loop
def _q4_0(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 18 * b
        scale, codes = _half_at(at), codes_16(at + 2)
        put(out, 32 * b, less(field(codes, 0, 15), 8), scale)
        put(out, 32 * b + 16, less(field(codes, 4, 15), 8), scale)


@_loop
def _q4_1(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 20 * b
        scale, least, codes = _half_at(at), _half_at(at + 2), codes_16(at + 4)
        put_plus(out, 32 * b, field(codes, 0, 15), scale, least)
        put_plus(out, 32 * b + 16, field(codes, 4, 15), scale, least)


@_loop
def _q5_0(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 22 * b
        scale, high, codes = _half_at(at), word_at(at + 2), codes_16(at + 6)
        put(out, 32 * b, less(with_high(field(codes, 0, 15), bits_16(high), 4), 16), scale)
        high = np.uint32(high >> np.uint32(16))
        put(out, 32 * b + 16, less(with_high(field(codes, 4, 15), bits_16(high), 4), 16), scale)


@_loop
def _q5_1(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 24 * b
        scale, least, high, codes = _half_at(at), _half_at(at + 2), word_at(at + 4), codes_16(at + 8)
        put_plus(out, 32 * b, with_high(field(codes, 0, 15), bits_16(high), 4), scale, least)
        high = np.uint32(high >> np.uint32(16))
        put_plus(out, 32 * b + 16, with_high(field(codes, 4, 15), bits_16(high), 4), scale, least)


# --- K types: 256 values, scales of groups of 16 or 32 -------------------------------------------------------------


@_loop
def _q2_k(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 84 * b
        scale, least = _half_at(at + 80), _half_at(at + 82)
        for group in range(16):
            own = np.int32(byte_at(at + group))
            factor, offset = np.float32(own & 15) * scale, np.float32(own >> 4) * least
            codes = codes_16(at + 16 + 32 * (group >> 3) + 16 * (group & 1))
            put_minus(out, 256 * b + 16 * group, field(codes, (group & 7) & 6, 3), factor, offset)


@_loop
def _q3_k(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 110 * b
        scale = _half_at(at + 108)
        for group in range(16):
            low = np.int32(byte_at(at + 96 + (group & 7))) >> (4 * (group >> 3)) & 15
            high = np.int32(byte_at(at + 104 + (group & 3))) >> (2 * (group >> 2)) & 3
            factor = scale * np.float32((low | high << 4) - 32)
            side = 16 * (group & 1)
            codes = field(codes_16(at + 32 + 32 * (group >> 3) + side), group & 6, 3)
            third = field(codes_16(at + side), group >> 1, 1)
            put(out, 256 * b + 16 * group, less(with_high(codes, third, 2), 4), factor)


@_loop
def _six_bits(scales: int, group: int, shift: int) -> Any:
    """Return a scale (`shift` 0) or a minimum (`shift` 4) of Q4_K and Q5_K, 6 bits, as float32."""
    if group < 4:
        return np.float32(np.int32(byte_at(scales + group + shift)) & 63)
    low = np.int32(byte_at(scales + group + 4)) >> shift & 15
    return np.float32(low | np.int32(byte_at(scales + group + shift - 4)) >> 6 << 4)


@_loop
def _q4_k(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 144 * b
        scale, least = _half_at(at), _half_at(at + 2)
        for group in range(8):
            codes = field(codes_32(at + 16 + 32 * (group >> 1)), 4 * (group & 1), 15)
            factor, offset = _six_bits(at + 4, group, 0) * scale, _six_bits(at + 4, group, 4) * least
            put_minus(out, 256 * b + 32 * group, codes, factor, offset)


@_loop
def _q5_k(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 176 * b
        scale, least, high = _half_at(at), _half_at(at + 2), codes_32(at + 16)
        for group in range(8):
            codes = field(codes_32(at + 48 + 32 * (group >> 1)), 4 * (group & 1), 15)
            factor, offset = _six_bits(at + 4, group, 0) * scale, _six_bits(at + 4, group, 4) * least
            put_minus(out, 256 * b + 32 * group, with_high(codes, field(high, group, 1), 4), factor, offset)


@_loop
def _q6_k(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 210 * b
        scale = _half_at(at + 208)
        for group in range(16):
            half, quarter, side = group >> 3, group >> 1 & 3, 16 * (group & 1)
            low = field(codes_16(at + 64 * half + 32 * (quarter & 1) + side), 4 * (quarter >> 1), 15)
            high = field(codes_16(at + 128 + 32 * half + side), 2 * quarter, 3)
            factor = np.float32(signed_byte_at(at + 192 + group)) * scale
            put(out, 256 * b + 16 * group, less(with_high(low, high, 4), 32), factor)


# --- tables of 16 values -------------------------------------------------------------------------------------------


@_loop
def _iq4_nl(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 18 * b
        scale, codes = _half_at(at), codes_16(at + 2)
        put(out, 32 * b, _of_iq4(field(codes, 0, 15)), scale)
        put(out, 32 * b + 16, _of_iq4(field(codes, 4, 15)), scale)


@_loop
def _iq4_xs(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 136 * b
        scale, high = _half_at(at), np.int32(short_at(at + 2))
        for group in range(8):
            low = np.int32(byte_at(at + 4 + (group >> 1))) >> (4 * (group & 1)) & 15
            factor = scale * np.float32((low | (high >> 2 * group & 3) << 4) - 32)
            codes = codes_16(at + 8 + 16 * group)
            put(out, 256 * b + 32 * group, _of_iq4(field(codes, 0, 15)), factor)
            put(out, 256 * b + 32 * group + 16, _of_iq4(field(codes, 4, 15)), factor)


@_loop
def _mxfp4(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 17 * b
        exponent, codes = np.uint32(byte_at(at)), codes_16(at + 1)
        # 2^(exponent - 128); the two smallest are subnormal.
        bits = np.uint32(exponent - np.uint32(1)) << np.uint32(23) if exponent > 1 else np.uint32(0x200000) << exponent
        scale = as_float(np.uint32(bits))
        put(out, 32 * b, _of_e2m1(field(codes, 0, 15)), scale)
        put(out, 32 * b + 16, _of_e2m1(field(codes, 4, 15)), scale)


@_loop
def _half_of_e4m3(code: int) -> Any:
    """Return half the value of an unsigned 8-bit float, without its sign; 0 for NaN."""
    code &= 127
    if code == 127:
        return np.float32(0)
    if code < 8:
        return np.float32(code) * np.float32(2.0**-10)
    return as_float(np.uint32((code + (119 << 3)) << 20))


@_loop
def _nvfp4(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 36 * b
        for group in range(4):
            codes = both_halves(codes_8(at + 4 + 8 * group))
            put(out, 64 * b + 16 * group, _of_e2m1(codes), _half_of_e4m3(np.int32(byte_at(at + group))))


# --- entries of a codebook: four values at once, and signs ---------------------------------------------------------


def _book(name: str) -> Any:
    """Return the entries of a codebook as words of four bytes: int32 [entries]."""
    return codebook(name, torch.device("cpu")).to(torch.int8).view(torch.int32).flatten().numpy()


_BOOK_XXS, _BOOK_S = _book("IQ3_XXS"), _book("IQ3_S")


@_loop
def _iq3_xxs(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 98 * b
        scale = _half_at(at)
        for group in range(8):
            codes, word = at + 2 + 8 * group, word_at(at + 66 + 4 * group)
            values = entries(
                _BOOK_XXS[byte_at(codes)],
                _BOOK_XXS[byte_at(codes + 1)],
                _BOOK_XXS[byte_at(codes + 2)],
                _BOOK_XXS[byte_at(codes + 3)],
                _BOOK_XXS[byte_at(codes + 4)],
                _BOOK_XXS[byte_at(codes + 5)],
                _BOOK_XXS[byte_at(codes + 6)],
                _BOOK_XXS[byte_at(codes + 7)],
            )
            signs = np.uint32(0)
            for eight in range(4):
                own = np.uint32(np.uint32(word >> np.uint32(7 * eight)) & np.uint32(127))
                parity = own ^ own >> np.uint32(4)
                parity ^= parity >> np.uint32(2)
                parity = (parity ^ parity >> np.uint32(1)) & np.uint32(1)  # the number of minus signs is even
                signs = np.uint32(signs | np.uint32(own | parity << np.uint32(7)) << np.uint32(8 * eight))
            factor = scale * (np.float32(0.5) + np.float32(np.int32(word >> np.uint32(28)))) * np.float32(0.5)
            put(out, 256 * b + 32 * group, negated(values, np.uint32(signs)), factor)


@_loop
def _of_nine_bits(codes: int, ninth: int, at: int) -> Any:
    return _BOOK_S[np.int64(byte_at(codes + at)) | (ninth >> at & 1) << 8]


@_loop
def _iq3_s(blocks: int, out: Any, count: int) -> None:
    for b in range(count):
        at = blocks + 110 * b
        scale = _half_at(at)
        for group in range(8):
            codes, ninth = at + 2 + 8 * group, np.int64(byte_at(at + 66 + group))
            values = entries(
                _of_nine_bits(codes, ninth, 0),
                _of_nine_bits(codes, ninth, 1),
                _of_nine_bits(codes, ninth, 2),
                _of_nine_bits(codes, ninth, 3),
                _of_nine_bits(codes, ninth, 4),
                _of_nine_bits(codes, ninth, 5),
                _of_nine_bits(codes, ninth, 6),
                _of_nine_bits(codes, ninth, 7),
            )
            low = np.int32(byte_at(at + 106 + (group >> 1))) >> (4 * (group & 1)) & 15
            signs = word_at(at + 74 + 4 * group)
            put(out, 256 * b + 32 * group, negated(values, signs), scale * np.float32(1 + 2 * low))


LOOPS = {
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
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
