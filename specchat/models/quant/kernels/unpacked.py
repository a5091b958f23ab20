"""The matrices that our Triton kernels unpack value by value: ggml's blocks and int3."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from specchat.models.quant.kernels.chunked import Segments

# Types that the kernels can unpack: ggml's, and int3.
KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "MXFP4", "NVFP4")
INT3 = "INT3"


@dataclass(frozen=True)
class Unpacked:
    """Rows of a matrix for the kernels.

    Attributes:
        kind: type of the values, one of `KINDS` or `INT3`.
        numbers: values per block; for int3, per scale.
        nbytes: bytes per block; 0 for int3.
        tensors: four contiguous tensors [rows, n]: codes, signs, ninths and scales of int3, or four times the blocks.
        book: float32 table of the type: 16 values, followed by 256 scales for NVFP4; or entries of four values,
            followed by 256 scales for int3.
    """

    kind: str
    numbers: int
    nbytes: int
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    book: Tensor


# Returns the rows begin .. end - 1, in the order in which they are stored.
Unpack = Callable[[Segments, int, int], Unpacked]
# Returns where each row is stored, int64 [rows]; None for rows in order.
Order = Callable[[Segments], Tensor | None]
