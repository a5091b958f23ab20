"""The interface of a quantization format: how it stores a matrix, and how to multiply with it.

A matrix W [rows, cols] is stored as a few *segments*, tensors of any dtype. They are parameters of a module
(`quant.modules`), so layer blobs, packs and slots hold them like any other parameter. Each of several fused experts is
a matrix of its own. A format is a frozen dataclass: equal formats store matrices identically.

A new format is one file: a subclass of `WeightFormat`, and a `CheckpointScheme` if checkpoints use the format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specchat.models.quant.kernels.chunked import Linear, Multiply, Segments, matmul_in_chunks
from specchat.models.quant.kernels.matmul import MIN_NUMBERS, product, product_of_one_row
from specchat.models.quant.kernels.tiles import TileForm


@dataclass(frozen=True)
class Segment:
    """One tensor of a stored matrix; `name` is an identifier that all matrices of a format share."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFormat(ABC):
    """A way to store matrices.

    Attributes:
        name: short name for users, such as "int8", "nf4" or "affine4".
        verbatim: segments that are the bytes of a tensor in a checkpoint, with the tensor's name after the module's
            path; empty if segments differ from what checkpoints store.
        looks_up: whether `look_up` works, which input embeddings need.
    """

    name: ClassVar[str]
    verbatim: ClassVar[Mapping[str, str]] = {}
    looks_up: ClassVar[bool] = False

    @abstractmethod
    def segments(self, rows: int, cols: int) -> tuple[Segment, ...]:
        """Return the segments of a matrix [rows, cols], in blob order."""

    @abstractmethod
    def dequantize(self, segments: Segments, begin: int, end: int, out: Tensor) -> Tensor:
        """Dequantize the rows begin .. end - 1; a row's values do not depend on the range.

        Args:
            segments: segments of the whole matrix.
            begin: first row.
            end: row after the last; large matrices come in ranges of `chunk_rows`.
            out: contiguous memory [end - begin, cols] of the wanted dtype and device.

        Returns:
            Rows [end - begin, cols] like `out`: `out` itself, or other memory where a kernel allocates its own.
        """

    def prepare(self, dtype: torch.dtype) -> None:  # noqa: B027  # most formats need nothing
        """Make ready what `dequantize` needs for results of a dtype in host memory, such as compiled functions."""

    def look_up(self, segments: Segments, rows: Tensor, out: Tensor) -> Tensor:
        """Dequantize some rows of W in any order; only formats that `looks_up`.

        Args:
            segments: segments of the whole matrix.
            rows: indices of the rows, int64 [n].
            out: contiguous memory [n, cols] of the wanted dtype and device.

        Returns:
            Rows like `out`: `out` itself, or other memory.
        """
        raise NotImplementedError

    def linear(
        self,
        x: Tensor,
        segments: Segments,
        shape: tuple[int, int],
        scratch: Tensor,
        bias: Tensor | None = None,
        *,
        multiply: Multiply = product,
    ) -> Tensor:
        """Compute x W^T + bias with a few rows of W at a time; works on every device.

        Args:
            x: activations [..., cols] in the compute dtype.
            segments: segments of W.
            shape: (rows, cols) of W.
            scratch: scratch memory, uint8 [>= scratch_bytes(shape, x.dtype, x.device)]; it is overwritten.
            bias: bias [rows] or None.
            multiply: matmul with the dequantized rows.

        Returns:
            Result [..., rows] in the dtype of x.
        """
        return matmul_in_chunks(self.dequantize, x, segments, shape, scratch, bias, multiply=multiply)

    def kernels(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """Return the kernels that can compute `linear`, by name; `quant.autotune` measures which is fastest.

        In float32 all kernels give the same bits, so that the text does not depend on speed. No kernel needs more
        memory than `linear`.

        Args:
            shape: (rows, cols) of W.
            num_rows: maximum rows of x.
            dtype: dtype of x.
            device: device of x.
        """
        ways: dict[str, Linear] = {"dequantize": self.linear}
        is_large = shape[0] * shape[1] >= MIN_NUMBERS
        if num_rows == 1 and is_large and dtype == torch.bfloat16 and device.type == "cpu":
            ways["dequantize for a row"] = partial(self.linear, multiply=product_of_one_row)
        return ways

    def tile_form(self, shape: tuple[int, int]) -> TileForm | None:
        """Return how the kernel for many experts dequantizes matrices of a shape; None if it cannot.

        Args:
            shape: (rows, cols) of W.
        """
        return None

    def row_copy(self, segments: Segments, shape: tuple[int, int], dtype: torch.dtype) -> RowCopy | None:
        """Return a copy of a matrix for a kernel that multiplies few rows of x with codes; None without such a kernel.

        Args:
            segments: segments of W.
            shape: (rows, cols) of W.
            dtype: dtype of x.
        """
        return None

    def beside_row_copy(self) -> WeightFormat:
        """Return the format whose `dequantize` gives the numbers that a `row_copy` multiplies by."""
        return self


class RowCopy(Protocol):
    """A matrix in the order of a kernel for few rows, next to its segments; it multiplies by the same numbers."""

    nbytes: int

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...  # noqa: D102


class Quantizer(Protocol):
    """Quantization of full-precision matrices by specchat itself."""

    @property
    def format(self) -> WeightFormat:
        """Format of the quantized matrices."""

    @property
    def identity(self) -> str:
        """Name, version and everything else that the bytes depend on; part of a pack's key."""

    def quantize(self, weight: Tensor, segments: Segments) -> None:
        """Fill the segments (CPU) from a matrix [rows, cols] of any float dtype (CPU), a few rows at a time."""
