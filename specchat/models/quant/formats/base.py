"""What a quantization format is: how a matrix's bytes lie, and how it is multiplied with.

A matrix W [rows, cols] is stored as a few *segments*, tensors of any dtype. They are parameters of a module
(`quant.modules`), so they lie in a layer's blob, in packs and in slots like any other parameter. Fused experts are
one matrix each. A format is a frozen dataclass: two that are equal store alike.

A new format is one file: a subclass of `WeightFormat`, and, where checkpoints come in it, a `CheckpointScheme`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specchat.models.quant.kernels.chunked import Linear, Segments, product_in_pieces


@dataclass(frozen=True)
class Segment:
    """One tensor of a stored matrix; `name` is an identifier, the same for every matrix of a format."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFormat(ABC):
    """A way to store matrices.

    Attributes:
        name: short, for people: "int8", "nf4", "affine4".
    """

    name: ClassVar[str]

    @abstractmethod
    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """What a matrix [rows, cols] is stored in, in the order of the blob."""

    @abstractmethod
    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """The rows begin .. end - 1 as numbers; every row range gives the same numbers for a row.

        Args:
            segments: of the whole matrix.
            begin: the first row.
            end: behind the last; large matrices come in ranges of `chunk_rows`.
            out: contiguous memory [end - begin, cols] of the dtype and on the device that are wanted.

        Returns:
            [end - begin, cols] as `out`: `out` itself, filled, or other memory where a kernel insists on its own.
        """

    def linear(
        self, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias, a few rows of W at a time; the way that works everywhere.

        Args:
            x: [..., cols] in the compute dtype.
            segments: of W.
            shape: of W, (rows, cols).
            scratch: uint8 [>= scratch_bytes(shape, x.dtype, x.device)], written over.
            bias: [rows] or None.

        Returns:
            [..., rows] in the dtype of x.
        """
        return product_in_pieces(self.dequantize, x, segments, shape, scratch, bias)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """What can be called for `linear`, by name; the fastest of several is found by measuring (`quant.autotune`).

        In float32 they give the same bits, so that the text does not depend on what was fast. No way takes more memory
        than `linear`.

        Args:
            shape: of W, (rows, cols).
            num_rows: the most rows that x has.
            dtype: of x.
            device: of x.
        """
        return {"dequantize": self.linear}


class Quantizer(Protocol):
    """What we make of full-precision matrices ourselves."""

    @property
    def format(self) -> WeightFormat:
        """What it produces."""

    @property
    def identity(self) -> str:
        """Name, version and whatever else its bytes depend on: part of a pack's key."""

    def quantize(self, weight: Tensor, segments: Segments) -> None:
        """Fills the segments (CPU) from a matrix [rows, cols] of any float dtype (CPU), a few rows at a time."""
