"""Checkpoints that come quantized: how each matrix of the model is stored there, and how its segments are filled."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo
from specchat.models.hf.conversion import locate_modules
from specchat.models.hf.matrices import find_matrices
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.modules import Matrix, Part
from specchat.models.quant.schemes.base import CheckpointScheme

_VERSION = 1  # of what transcoding makes
# A module's path, and the names of what quantizers store for its matrix. "weight" alone may be a norm's, too.
_TENSOR = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx|SCB|weight(?:[._].*)?|(?:input|output|activation)_\w+)")


@dataclass(frozen=True)
class _Stored:
    """A matrix in the checkpoint.

    Attributes:
        module: its path there.
        shape: (rows, cols).
        tensors: by what follows the path.
        format: None where it is plain.
    """

    module: str
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]
    format: WeightFormat | None

    @property
    def part(self) -> Part:
        """How it is stored as some rows of a matrix whose other rows may be quantized."""
        own = self.format or Plain(stored_torch_dtype(self.tensors["weight"].dtype))
        return Part(self.shape[0], own)


class CheckpointRecipe:
    """The `weights.recipe.Recipe` of a checkpoint that comes quantized: every matrix as it is stored there.

    Args:
        scheme: from config.json.
        skeleton: of the model, before anything is replaced.
        checkpoint: whose headers say how each matrix is stored.

    Raises:
        CorruptCheckpointError: tensors of a matrix are missing or have shapes that cannot be.
        UnsupportedModelError: something is quantized that can only be read plain.
    """

    def __init__(self, scheme: CheckpointScheme, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.scheme = scheme
        self.name = scheme.name
        self._folder = checkpoint.folder
        # path of the matrix -> (expert, part) -> where it is
        self._stored: dict[str, dict[tuple[int, int], _Stored]] = {}
        self._num_parts: dict[str, int] = {}
        tensors = _by_module(checkpoint)
        matrices = {matrix.path: matrix for matrix in find_matrices(skeleton)}
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
        for module, place in locate_modules(skeleton, tensors).items():
            matrix = matrices.get(place.path)
            shape = matrix.shape if matrix else shapes.get(f"{place.path}.weight", ())
            if len(shape) == 2:
                own_shape = (shape[0] // place.num_parts, shape[1])
                own = scheme.format_of(module, own_shape, tensors[module])
                stored = self._stored.setdefault(place.path, {})
                stored[place.expert, place.part] = _Stored(module, own_shape, tensors[module], own)
                self._num_parts[place.path] = place.num_parts
        self._quantized = {
            path for path, stored in self._stored.items() if any(each.format is not None for each in stored.values())
        }
        # where numbers are needed: routers, which quantizers do not always leave alone
        self._unpacked = sorted(self._quantized - matrices.keys())
        self._check_unpacked(skeleton)

    @property
    def identity(self) -> str:
        """What a pack's bytes depend on beside the checkpoint."""
        return f"{self.name} {_VERSION}"

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """How one matrix is stored; None where it is plain, and so are those it is fused with.

        Raises:
            CorruptCheckpointError: it is nowhere, though others that it is fused with are quantized.
        """
        if matrix.path not in self._quantized:
            return None
        return tuple(stored.part for stored in self._parts_of(matrix.path, expert))

    def without_quantized(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint's tensors that are parameters as they are."""
        parts = [stored for path in self._quantized for stored in self._stored[path].values()]
        used = {info.key for stored in parts for info in stored.tensors.values()}
        plain = {key: info for key, info in checkpoint.tensors.items() if key not in used}
        return Checkpoint(checkpoint.folder, MappingProxyType(plain))

    def fill(self, reader: TensorReader, matrix: Matrix, name: str, views: Segments) -> None:
        """Reads a matrix, or all that a parameter fuses, into segments.

        Args:
            reader: of the whole checkpoint.
            matrix: one that is stored in a format.
            name: its name in `views`.
            views: the segments' memory (CPU) by full name.
        """
        for expert in range(max(matrix.num_experts, 1)):
            path = f"{name}.{expert}" if matrix.num_experts else name
            parts = self._parts_of(matrix.path, expert)
            for index, stored in enumerate(parts):
                own_path = f"{path}.{index}" if len(parts) > 1 else path
                names = [segment.name for segment in stored.part.format.segments(*stored.shape)]
                self._fill_part(reader, stored, {each: views[f"{own_path}.{each}"] for each in names})

    def unpacked(self, prefix: str) -> list[str]:
        """The parameters below a path that are numbers in the model but quantized in the checkpoint."""
        return [f"{path.removeprefix(prefix)}.weight" for path in self._unpacked if path.startswith(prefix)]

    def read_numbers(self, reader: TensorReader, parameter: str, out: Tensor) -> None:
        """Reads a quantized matrix as numbers, into `out` [rows, cols] (CPU) in its dtype."""
        (stored,) = self._stored[parameter.removesuffix(".weight")].values()
        assert stored.format is not None
        segments = {
            segment.name: torch.empty(segment.shape, dtype=segment.dtype)
            for segment in stored.format.segments(*stored.shape)
        }
        self._fill_part(reader, stored, segments)
        out.copy_(stored.format.dequantize(segments, 0, stored.shape[0], torch.empty_like(out)))

    def _fill_part(self, reader: TensorReader, stored: _Stored, segments: Segments) -> None:
        tensors = {name: reader.read(info.key) for name, info in stored.tensors.items()}
        if stored.format is None:
            segments["weight"].copy_(tensors["weight"])
        else:
            self.scheme.transcode(stored.module, stored.shape, tensors, segments)

    def _parts_of(self, path: str, expert: int) -> list[_Stored]:
        """The matrices that make one, from its first row to its last."""
        stored = self._stored[path]
        places = [(expert, part) for part in range(self._num_parts[path])]
        for place in places:
            if place not in stored:
                example = next(iter(stored.values())).module
                raise CorruptCheckpointError(
                    f"expert {expert} of '{path}' is missing from {self._folder}, which has '{example}', say",
                    hint="the download may be incomplete: repeat it",
                )
        return [stored[place] for place in places]

    def _check_unpacked(self, skeleton: Skeleton) -> None:
        for path in self._unpacked:
            if not path.startswith(f"{skeleton.layers_name}."):
                raise UnsupportedModelError(f"'{path}' is quantized, which specchat does not read outside the layers")


def _by_module(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """What may be a matrix's tensors: by module, then by what follows its path."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for key, info in checkpoint.tensors.items():
        if match := _TENSOR.fullmatch(key):
            modules.setdefault(match[1], {})[match[2]] = info
    return modules
