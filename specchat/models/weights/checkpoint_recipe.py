"""Pre-quantized checkpoints: how each matrix of the model is stored, and how its segments are filled."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo
from specchat.models.hf.conversion import ModulePlace, locate_modules
from specchat.models.hf.matrices import find_lookup, find_matrices
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.modules import Matrix, Part
from specchat.models.quant.schemes.base import CheckpointScheme, TranscodingScheme

_VERSION = 1  # of the transcoded bytes
# A module's path, and the names of the tensors that quantizers store for its matrix. A norm has a "weight" too.
_TENSOR = re.compile(
    r"(.+)\.(qweight|qzeros|blocks|scales|g_idx|SCB|weight(?:[._].*)?|pre_quant_scale|(?:input|output|activation)_\w+)"
)
_IN_STACK = re.compile(r"(.+?)\.(\d{1,9})(?:\.(gate|up))?")


@dataclass(frozen=True)
class _Stored:
    """A matrix in the checkpoint.

    Attributes:
        module: path of its module in the checkpoint.
        shape: (rows, cols) of the matrix.
        tensors: tensors of the module, by the rest of their keys after the path.
        format: quantization format; None for a plain matrix.
    """

    module: str
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]
    format: WeightFormat | None

    @property
    def part(self) -> Part:
        """Row range of a fused matrix that this matrix fills; other ranges may be quantized differently."""
        own = self.format or Plain(stored_torch_dtype(self.tensors["weight"].dtype))
        return Part(self.shape[0], own)


class CheckpointRecipe:
    """The `weights.recipe.Recipe` of a pre-quantized checkpoint: every matrix keeps its stored format.

    Args:
        scheme: scheme that config.json names.
        skeleton: skeleton of the model, before modules are replaced.
        checkpoint: checkpoint whose headers tell how each matrix is stored.

    Raises:
        CorruptCheckpointError: missing tensors of a matrix, or tensors of impossible shapes.
        UnsupportedModelError: a quantized parameter that specchat only reads plain.
    """

    def __init__(self, scheme: CheckpointScheme, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.scheme = scheme
        self.name = scheme.name
        self._folder = checkpoint.folder
        # path of the matrix -> (expert, part) -> matrix in the checkpoint
        self._stored: dict[str, dict[tuple[int, int], _Stored]] = {}
        self._num_parts: dict[str, int] = {}
        tensors = _by_module(checkpoint)
        matrices = {matrix.path: matrix for matrix in find_matrices(skeleton)}
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.model.state_dict().items()}
        places = locate_modules(skeleton, tensors)
        places |= {module: place for module in tensors if (place := _in_stack(module, matrices)) is not None}
        for module, place in places.items():
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
        lookup = find_lookup(skeleton)
        looked_up = set() if lookup is None or not self._looks_up(lookup) else {lookup.path}
        # Modules that need plain weights although the checkpoint quantizes them: routers.
        self._unpacked = sorted(self._quantized - matrices.keys() - looked_up)
        self._check_unpacked(skeleton)

    @property
    def identity(self) -> str:
        """Identity of the transcoding, for the key of a pack."""
        return f"{self.name} {_VERSION}"

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """Return how one matrix is stored; None if it and all matrices that it is fused with are plain.

        Raises:
            CorruptCheckpointError: a missing matrix among fused ones that are quantized.
        """
        if matrix.path not in self._quantized:
            return None
        return tuple(stored.part for stored in self._parts_of(matrix.path, expert))

    def without_quantized(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint without the tensors of quantized matrices."""
        parts = [stored for path in self._quantized for stored in self._stored[path].values()]
        used = {info.key for stored in parts for info in stored.tensors.values()}
        plain = {key: info for key, info in checkpoint.tensors.items() if key not in used}
        return Checkpoint(checkpoint.folder, MappingProxyType(plain))

    def fill(self, reader: TensorReader, matrix: Matrix, name: str, views: Segments) -> None:
        """Transcode a matrix, or all matrices that a parameter fuses, into segments.

        Args:
            reader: reader of the whole checkpoint.
            matrix: matrix that has been replaced.
            name: prefix of the matrix in `views`.
            views: memory of the segments (CPU), by full name.
        """
        for path, stored in self._segments_of(matrix, name):
            names = [segment.name for segment in stored.part.format.segments(*stored.shape)]
            self._fill_part(reader, stored, {each: views[f"{path}.{each}"] for each in names})

    def places(self, matrix: Matrix, name: str) -> dict[str, TensorInfo] | None:
        """Return where the segments of a matrix are stored, by full name; None if they must be transcoded.

        Args:
            matrix: matrix that has been replaced.
            name: prefix of the segments' names.
        """
        found: dict[str, TensorInfo] = {}
        for path, stored in self._segments_of(matrix, name):
            verbatim = {} if stored.format is None else stored.format.verbatim
            if not verbatim:
                return None
            found |= {f"{path}.{segment}": stored.tensors[tensor] for segment, tensor in verbatim.items()}
        return found

    def _segments_of(self, matrix: Matrix, name: str) -> Iterator[tuple[str, _Stored]]:
        """Yield the stored matrices that make up a replaced one, each with the prefix of its segments' names."""
        for expert in range(max(matrix.num_experts, 1)):
            path = f"{name}.{expert}" if matrix.num_experts else name
            parts = self._parts_of(matrix.path, expert)
            for index, stored in enumerate(parts):
                yield f"{path}.{index}" if len(parts) > 1 else path, stored

    def unpacked(self, prefix: str) -> list[str]:
        """Return the parameters below a path that are plain in the model but quantized in the checkpoint."""
        return [f"{path.removeprefix(prefix)}.weight" for path in self._unpacked if path.startswith(prefix)]

    def read_dequantized(self, reader: TensorReader, parameter: str, out: Tensor) -> None:
        """Dequantize a matrix into `out` [rows, cols] (CPU), in the dtype of `out`."""
        (stored,) = self._stored[parameter.removesuffix(".weight")].values()
        assert stored.format is not None
        segments = {
            segment.name: torch.empty(segment.shape, dtype=segment.dtype)
            for segment in stored.format.segments(*stored.shape)
        }
        self._fill_part(reader, stored, segments)
        out.copy_(stored.format.dequantize(segments, 0, stored.shape[0], torch.empty_like(out)))

    def _fill_part(self, reader: TensorReader, stored: _Stored, segments: Segments) -> None:
        if stored.format is not None and stored.format.verbatim:  # without another copy of the bytes in memory
            for segment, tensor in stored.format.verbatim.items():
                info = stored.tensors[tensor]
                reader.read_into(info.key, segments[segment].view(stored_torch_dtype(info.dtype)))
            return
        tensors = {name: reader.read(info.key) for name, info in stored.tensors.items()}
        if stored.format is None:
            segments["weight"].copy_(tensors["weight"])
        else:
            assert isinstance(self.scheme, TranscodingScheme), "other schemes have verbatim formats only"
            self.scheme.transcode(stored.module, stored.shape, tensors, segments)

    def _parts_of(self, path: str, expert: int) -> list[_Stored]:
        """Return the stored matrices that make up one matrix, from its first row to its last."""
        stored = self._stored[path]
        places = [(expert, part) for part in range(self._num_parts[path])]
        for place in places:
            if place not in stored:
                example = next(iter(stored.values())).module
                raise CorruptCheckpointError(
                    f"expert {expert} of '{path}' is missing from {self._folder}, which has '{example}'",
                    hint="the download may be incomplete; download the model again",
                )
        return [stored[place] for place in places]

    def _looks_up(self, matrix: Matrix) -> bool:
        """Return whether a table of embeddings is stored in a format whose rows can be looked up."""
        stored = self._stored.get(matrix.path, {}).values()
        return all(each.format is not None and each.format.looks_up for each in stored)

    def _check_unpacked(self, skeleton: Skeleton) -> None:
        for path in self._unpacked:
            if not path.startswith(f"{skeleton.layers_name}."):
                raise UnsupportedModelError(f"'{path}' is quantized, which specchat does not read outside the layers")


def _in_stack(module: str, matrices: Mapping[str, Matrix]) -> ModulePlace | None:
    """Return the place of one expert of a stack, or of its gate or up half.

    Its module is named by the model's parameter and an index: "gate_up_proj.3", or "gate_up_proj.3.up".
    """
    found = _IN_STACK.fullmatch(module)
    if found is None or found[1] not in matrices or not matrices[found[1]].num_experts:
        return None
    path, expert, half = found[1], int(found[2]), found[3]
    return ModulePlace(path, expert) if half is None else ModulePlace(path, expert, int(half == "up"), 2)


def _by_module(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """Group tensors that may belong to a matrix by module, then by the rest of their keys."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for key, info in checkpoint.tensors.items():
        if match := _TENSOR.fullmatch(key):
            modules.setdefault(match[1], {})[match[2]] = info
    return modules
