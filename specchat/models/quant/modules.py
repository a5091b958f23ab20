"""Modules whose matrices are stored in a quantization format: their parameters are the format's segments.

Layout, packing, streaming and binding treat segments like any other parameter; only the matmul knows the format.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specchat.models.quant.autotune import autotuner, rows_class
from specchat.models.quant.formats.base import RowCopy, Segment, WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Segments, scratch_bytes
from specchat.models.quant.kernels.packed import PackedMatrix, can_pack, pack


class Scratch:
    """Memory for dequantizing the matrices of one model, one chunk at a time.

    Attributes:
        memory: scratch memory, uint8; it grows to the largest chunk on first use.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def of(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return scratch memory for a chunk of a matrix (rows, cols) in a compute dtype: uint8, contents undefined."""
        nbytes = scratch_bytes(shape, dtype, device)
        if self.memory.numel() < nbytes or self.memory.device != device:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self.memory


class QuantLinear(nn.Module):
    """A linear layer with a quantized matrix; replaces an `nn.Linear`.

    Args:
        weight_format: quantization format of the matrix.
        shape: (rows, cols) of the matrix: out_features, in_features.
        bias: bias of the replaced layer, or None.
        scratch: scratch memory shared by all matrices of the model.
    """

    def __init__(
        self, weight_format: WeightFormat, shape: tuple[int, int], bias: nn.Parameter | None, scratch: Scratch
    ) -> None:
        super().__init__()
        self.format = weight_format
        self.shape = shape
        self.out_features, self.in_features = shape
        self.scratch = scratch
        self._names = []
        self._kernels: dict[tuple[torch.device, torch.dtype, int], Linear] = {}
        for segment in weight_format.segments(*shape):
            self.register_parameter(segment.name, _empty(segment))
            self._names.append(segment.name)
        self.register_parameter("bias", bias)
        self._held: PackedMatrix | RowCopy | None = None

    @property
    def segments(self) -> Segments:
        """The parameters that store the matrix, by the format's names."""
        parameters = self._parameters
        return {name: parameters[name] for name in self._names}  # type: ignore[misc]  # only a bias may be None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the segments."""
        return sum(segment.nbytes for segment in self.segments.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of what `hold` has made."""
        return 0 if self._held is None else self._held.nbytes

    def hold(self, dtype: torch.dtype, *, keeps_segments: bool = False) -> None:
        """Keep a copy of the matrix for few rows, or the matrix dequantized instead of its segments, if possible.

        The segments must stay as they are from now on.

        Args:
            dtype: dtype of the activations.
            keeps_segments: whether the segments stay beside the dequantized matrix, to look up rows.
        """
        self._held = self.format.row_copy(self.segments, self.shape, dtype)
        if self._held is not None:
            self.format = self.format.beside_row_copy()
        elif can_pack(self.shape, dtype):
            weight = torch.empty(self.shape, dtype=dtype)
            weight = self.format.dequantize(self.segments, 0, self.shape[0], weight)
            self._held = pack(weight)
            if self._held is not None and not keeps_segments:
                for name in self._names:
                    drop(self, name)

    def release(self) -> None:
        """Let go of what `hold` has made, so that other segments can be bound; the numbers of the matrix stay."""
        self._held = None
        self._kernels.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + bias: [..., cols] -> [..., rows]."""
        held, bias = self._held, self._parameters["bias"]
        if isinstance(held, PackedMatrix):
            return held.linear(x, bias)
        scratch, segments = self.scratch.of(self.shape, x.dtype, x.device), self.segments
        kind = x.device, x.dtype, rows_class(x, self.shape)
        linear = self._kernels.get(kind)
        if linear is None:
            linear = self._kernels[kind] = autotuner().linear(self.format, x, segments, self.shape, scratch, held)
        return linear(x, segments, self.shape, scratch, bias)


def drop(module: nn.Module, name: str) -> None:
    """Replace a parameter by one on meta, of the same shape and dtype, so that its memory can be freed."""
    parameter = module._parameters[name]
    assert parameter is not None
    module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


class QuantParts(nn.ModuleList):
    """One matrix in several row ranges, each stored separately, such as a checkpoint's gate_proj and up_proj."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T: [..., cols] -> [..., rows of all parts]."""
        return torch.cat([part(x) for part in self], -1)


def same_format(module: nn.Module) -> nn.Module:
    """Return a module for another matrix in the formats of a `QuantLinear` or `QuantParts`, without a bias, on meta."""
    if isinstance(module, QuantParts):
        return QuantParts(same_format(part) for part in module)
    assert isinstance(module, QuantLinear)
    return QuantLinear(module.format, module.shape, None, module.scratch)


def format_key(module: nn.Module) -> tuple[object, ...]:
    """Return what two matrices have in common if one module can hold either."""
    linears = [linear for _, linear in quant_linears(module)]
    return tuple((linear.format, linear.shape) for linear in linears)


def _empty(segment: Segment) -> nn.Parameter:
    return nn.Parameter(torch.empty(segment.shape, dtype=segment.dtype, device="meta"), requires_grad=False)


@dataclass(frozen=True)
class Matrix:
    """A place in a model where a matrix may be stored in a quantization format.

    Attributes:
        path: path within the model of an nn.Linear, or of the parameter that fuses the matrices of all experts.
        layer: index of the decoder layer; None for the head and for blocks that layers share.
        shape: (rows, cols) of one matrix W in x W^T.
        num_experts: number of matrices that the parameter fuses; 0 for an nn.Linear.
        transposed: whether a fused parameter holds [cols, rows] per expert.
        is_head: whether the matrix scores tokens.
        is_sensitive: whether the matrix is `limits.is_sensitive`.
        is_lookup: whether the matrix is the table of the input embeddings.
    """

    path: str
    layer: int | None
    shape: tuple[int, int]
    num_experts: int = 0
    transposed: bool = False
    is_head: bool = False
    is_sensitive: bool = False
    is_lookup: bool = False


@dataclass(frozen=True)
class Part:
    """A range of rows of a matrix, stored separately; most matrices have one part."""

    rows: int
    format: WeightFormat


def replace_linear(model: Any, matrix: Matrix, part: Part, scratch: Scratch) -> None:
    """Replace an nn.Linear by a `QuantLinear`."""
    parent, leaf = parent_of(model, matrix.path)
    setattr(parent, leaf, QuantLinear(part.format, matrix.shape, getattr(parent, leaf).bias, scratch))


def quant_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, QuantLinear]]:
    """Yield all quantized matrices in a module with their paths."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, QuantLinear):
            yield name, child


def segment_names(module: nn.Module) -> frozenset[str]:
    """Return the parameters of a module that are segments, whose dtypes do not follow the model's compute dtype."""
    linears = quant_linears(module)
    return frozenset(f"{path}.{name}" if path else name for path, linear in linears for name in linear.segments)


def parent_of(model: Any, path: str) -> tuple[Any, str]:
    """Return the module that owns `path` as a child or parameter, and the name in it."""
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf
