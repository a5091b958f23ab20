"""What the Triton kernels need to know of ggml's types."""

from functools import cache

import torch
from torch import Tensor

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.quant.formats.ggml_blocks import E2M1_TWICE, IQ4_VALUES, unsigned_e4m3
from specchat.models.quant.formats.ggml_codebooks import codebook
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.kernels.unpacked import Unpacked

_CODEBOOKS = ("IQ3_XXS", "IQ3_S")


def unpacked_blocks(kind: str, blocks: Tensor) -> Unpacked:
    """Return rows of blocks, uint8 [rows, bytes per row], for the kernels."""
    block = BLOCK_TYPES[kind]
    return Unpacked(kind, block.numbers, block.nbytes, (blocks,) * 4, _table(kind, blocks.device))


@cache
def tile_of_blocks(kind: str) -> TileForm:
    """Return how the kernel for many experts dequantizes tiles of blocks of a type."""
    block = BLOCK_TYPES[kind]
    table = tuple(_table(kind, torch.device("cpu")).flatten().tolist())
    return TileForm("blocks", values=table, block=kind, block_numbers=block.numbers, block_bytes=block.nbytes)


@cache
def _table(kind: str, device: torch.device) -> Tensor:
    """Return the table of a type as `Unpacked` describes; any for types without one."""
    if kind in _CODEBOOKS:
        return codebook(kind, device)
    table = torch.tensor(IQ4_VALUES if kind.startswith("IQ4") else E2M1_TWICE, dtype=torch.float32)
    if kind == "NVFP4":
        table = torch.cat([table, unsigned_e4m3(torch.arange(256, dtype=torch.uint8)) * 0.5])
    return table.to(device)
