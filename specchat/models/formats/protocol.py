"""What a number format of quantized matrices is: how its bytes lie, and how they are multiplied with.

A matrix W [rows, cols] is stored as a few *segments*, tensors of any dtype. They are parameters of a module
(`models.quantized`), so they lie in a layer's blob, in packs and in slots like any other parameter. Fused experts are
one matrix each. A format is a frozen dataclass: two that are equal store alike.

A new format is one file: a subclass of `WeightFormat`, and, where checkpoints come in it, a `CheckpointScheme`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from specchat.models.checkpoint.layout import dequantized_rows
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.products import product

Segments = Mapping[str, Tensor]
# `WeightFormat.dequantize` and `WeightFormat.linear`, or what does the same.
Dequantize = Callable[[Segments, int, int, Tensor], Tensor]
Linear = Callable[[Tensor, Segments, tuple[int, int], Tensor, Tensor | None], Tensor]


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

    def ways(
        self, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Linear]:
        """What can be called for `linear`, by name; the fastest of several is found by measuring (`formats.choices`).

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


class CheckpointScheme(Protocol):
    """How one kind of pre-quantized checkpoint stores its matrices; made from config.json's quantization_config.

    `module` is the matrix's path in the checkpoint ("model.layers.0.mlp.up_proj", and for experts
    "model.layers.0.mlp.experts.3.up_proj"); its tensors are given by what follows the path and a dot ("qweight",
    "weight.absmax"). A tensor named "bias" is none of the scheme's business.
    """

    @property
    def name(self) -> str:
        """What banner and plan say, such as "gptq int4"."""

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """The format of one matrix [rows, cols] from headers alone; None where it is a plain `weight` (skipped).

        Raises:
            CorruptCheckpointError: tensors are missing or have shapes that cannot be; the tensor is named.
            UnsupportedModelError: a variant that specchat does not read.
        """

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fills the segments (CPU, as `format_of` says) from the checkpoint's tensors (CPU, as saved).

        Raises:
            CorruptCheckpointError: the tensors' contents cannot be what was saved.
        """


def product_in_pieces(
    dequantize: Dequantize,
    x: Tensor,
    segments: Segments,
    shape: tuple[int, int],
    scratch: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`WeightFormat.linear` with rows of W from `dequantize`."""
    rows, cols = shape
    step = chunk_rows(rows, cols, x.dtype, x.device)
    y = x.new_empty(*x.shape[:-1], rows) if step < rows else None
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        weight = dequantize(segments, begin, end, view_scratch(scratch, end - begin, cols, x.dtype))
        part = product(x, weight, None if bias is None else bias[begin:end])
        if y is None:
            return part.contiguous()  # for whoever takes views of it
        y[..., begin:end] = part
    assert y is not None
    return y


def chunk_rows(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a matrix that are dequantized at a time."""
    return dequantized_rows(rows, cols, dtype.itemsize, device.type)


def scratch_bytes(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int:
    """Scratch memory that `linear` needs for a matrix (rows, cols)."""
    return chunk_rows(*shape, dtype, device) * shape[1] * dtype.itemsize


def view_scratch(scratch: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The beginning of uint8 memory as a matrix [rows, cols]."""
    return scratch[: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)
