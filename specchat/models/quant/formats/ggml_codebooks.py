"""Dequantization of ggml's IQ1, IQ2 and IQ3 blocks: codes are entries of a codebook, and signs are stored apart.

The functions have the form that `ggml_blocks` describes.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from specchat.models.quant.formats.ggml_blocks import Decoder, half_at, low_and_high, scale_groups

_BOOKS = Path(__file__).with_name("ggml_codebooks.toml")
_SHIFT = 0.125  # of IQ1's values, up or down


def _iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    words = _u32(blocks[:, 66:98])
    _gather(codebook("IQ3_XXS", blocks.device), blocks[:, 2:66], out)
    _apply_signs(out, _even_signs(blocks.device), _fields(words, 7, 4))
    scale_groups(out, half_at(blocks, 0) * (0.5 + (words >> 28)) * 0.5)


def _iq3_s(blocks: Tensor, out: Tensor) -> None:
    ninth = _fields(blocks[:, 66:74].int(), 1, 8).flatten(1) << 8
    _gather(codebook("IQ3_S", blocks.device), blocks[:, 2:66].int() | ninth, out)
    _apply_signs(out, _signs(blocks.device), blocks[:, 74:106])
    scale_groups(out, half_at(blocks, 0) * (1 + 2 * low_and_high(blocks[:, 106:110])))


def _iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    groups = blocks[:, 2:66].unflatten(1, (8, 8))
    words = _u32(groups[:, :, 4:])[..., 0]
    _gather(codebook("IQ2_XXS", blocks.device), groups[:, :, :4], out)
    _apply_signs(out, _even_signs(blocks.device), _fields(words, 7, 4))
    scale_groups(out, half_at(blocks, 0) * (0.5 + (words >> 28)) * 0.25)


def _iq2_xs(blocks: Tensor, out: Tensor) -> None:
    codes = _u16(blocks[:, 2:66])
    _gather(codebook("IQ2_XS", blocks.device), codes & 511, out)
    _apply_signs(out, _even_signs(blocks.device), codes >> 9)
    scale_groups(out, half_at(blocks, 0) * (0.5 + low_and_high(blocks[:, 66:74])) * 0.25)


def _iq2_s(blocks: Tensor, out: Tensor) -> None:
    high = _fields(blocks[:, 66:74].int(), 2, 4).flatten(1)
    _gather(codebook("IQ2_S", blocks.device), blocks[:, 2:34].int() | high << 8, out)
    _apply_signs(out, _signs(blocks.device), blocks[:, 34:66])
    scale_groups(out, half_at(blocks, 0) * (0.5 + low_and_high(blocks[:, 74:82])) * 0.25)


def _iq1_s(blocks: Tensor, out: Tensor) -> None:
    high = _u16(blocks[:, 34:50])
    _gather(codebook("IQ1", blocks.device), blocks[:, 2:34].int() | _fields(high, 3, 4).flatten(1) << 8, out)
    out.view(-1, 8, 32).add_((_SHIFT - 2 * _SHIFT * (high >> 15))[..., None])
    scale_groups(out, half_at(blocks, 0) * (2 * (high >> 12 & 7) + 1))


def _iq1_m(blocks: Tensor, out: Tensor) -> None:
    packed, high = _u16(blocks[:, 48:56]), low_and_high(blocks[:, 32:48]).int()
    top = packed >> 12  # the scale of the block, 4 bits in each word
    bits = top[:, 0] | top[:, 1] << 4 | top[:, 2] << 8 | top[:, 3] << 12
    scale = bits.to(torch.int16).view(torch.float16).float()
    _gather(codebook("IQ1", blocks.device), blocks[:, :32].int() | (high & 7) << 8, out)
    out.view(-1, 32, 8).add_((_SHIFT - 2 * _SHIFT * (high >> 3))[..., None])
    scale_groups(out, scale[:, None] * (2 * _fields(packed, 3, 4).flatten(1) + 1))


def _u32(codes: Tensor) -> Tensor:
    """Return little-endian words of 4 bytes as int64."""
    return codes.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _u16(codes: Tensor) -> Tensor:
    """Return little-endian words of 2 bytes as int32."""
    return codes.contiguous().view(torch.int16).int() & 0xFFFF


def _fields(words: Tensor, width: int, count: int) -> Tensor:
    """Return the lowest `count` fields of `width` bits: [n, m] -> [n, m, count]."""
    shifts = torch.arange(0, width * count, width, device=words.device)
    return words[..., None] >> shifts & (1 << width) - 1


def _gather(book: Tensor, index: Tensor, out: Tensor) -> None:
    """Fill `out` with entries of a codebook, 16 bytes (four values) at a time."""
    wide, target = book.view(torch.complex128).view(-1), out.view(-1).view(torch.complex128)
    index = index.reshape(-1).int()
    if book.shape[1] == 8:
        index = torch.stack([2 * index, 2 * index + 1], 1).view(-1)
    torch.index_select(wide, 0, index, out=target)


def _apply_signs(out: Tensor, book: Tensor, index: Tensor) -> None:
    signs = torch.empty_like(out)
    _gather(book, index, signs)
    out.mul_(signs)


@cache
def codebook(name: str, device: torch.device) -> Tensor:
    """Return a codebook: float32 [entries, 4 or 8]."""
    found = tomllib.loads(_BOOKS.read_text(encoding="ascii"))[name]
    packed = torch.frombuffer(bytearray(bytes.fromhex(found["hex"])), dtype=torch.uint8)
    bits = found["bits"]
    index = packed[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & (1 << bits) - 1
    values = torch.tensor(found["values"], dtype=torch.float32)
    return values[index.view(-1).long()].view(-1, found["width"]).to(device)


@cache
def _signs(device: torch.device) -> Tensor:
    """Return eight signs for each byte, -1 for a bit that is set: float32 [256, 8]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1.0 - 2.0 * bits).to(device)


@cache
def _even_signs(device: torch.device) -> Tensor:
    """Return eight signs for each 7-bit code; the eighth makes the number of minus signs even: float32 [128, 8]."""
    signs = _signs(device)[:128].clone()
    signs[:, 7] = signs[:, :7].prod(1)
    return signs


CODEBOOK_DECODERS: Mapping[str, Decoder] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
