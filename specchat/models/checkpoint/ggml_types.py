"""Block types of GGUF tensors: values and bytes per block. A row of a tensor is a whole number of blocks."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A type in which GGUF files store tensors.

    Attributes:
        name: ggml's name; plain types have safetensors' names.
        numbers: values per block.
        nbytes: bytes per block.
    """

    name: str
    numbers: int
    nbytes: int

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of `cols` values, which must be a multiple of `numbers`."""
        assert cols % self.numbers == 0
        return cols // self.numbers * self.nbytes


# Keys are the numbers in the files.
_BY_NUMBER: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
_UNREAD: Mapping[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    41: "Q1_0",
    42: "Q2_0",
}
# The one tensor of whole numbers: the target's tokens that a head scores.
TOKEN_MAP, _IDS = "d2t", 27
BLOCK_TYPES: Mapping[str, BlockType] = {each.name: each for each in _BY_NUMBER.values()}
PLAIN_TYPES = frozenset({"F32", "F16", "BF16"})


def block_type(number: int, tensor: str) -> BlockType | None:
    """Return the type with a number; None if specchat does not read the type for a tensor of this name."""
    if (number, tensor) == (_IDS, TOKEN_MAP):
        return BlockType("I64", 1, 8)
    return _BY_NUMBER.get(number)


def type_name(number: int) -> str:
    """Return the name of any type, for messages."""
    known = _BY_NUMBER.get(number)
    return _UNREAD.get(number, f"ggml type {number}") if known is None else known.name
