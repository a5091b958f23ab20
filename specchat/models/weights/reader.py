"""Reading weights from a checkpoint into memory that the caller owns: one contiguous blob per decoder layer."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from specchat.closing import Closeable
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.dtypes import stored_name
from specchat.models.checkpoint.mapped_file import MappedFile
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo
from specchat.models.hf.conversion import LazyTensor, ModulePlace, load_converted, plan_weights
from specchat.models.hf.skeleton import Skeleton, build_skeleton, path_of
from specchat.models.quant.lookup import QuantEmbedding
from specchat.models.quant.modules import QuantLinear, quant_linears, segment_names
from specchat.models.weights.layout import bind

_NUMBERED = re.compile(r"(.*\.|)(\d+)(\..*)")  # experts.3.w1.weight


class MatrixFiller(Protocol):
    """A source of the quantized matrices of a model, which are not tensors of the checkpoint."""

    def parameters(self, layer: int) -> Set[str]:
        """Return the parameters of a layer that this filler fills, by name within the layer."""

    def fill_layer(self, reader: "WeightReader", layer: int, views: Mapping[str, Tensor]) -> None:
        """Fill all parameters of a layer.

        Args:
            reader: reader of the other parameters.
            layer: index of the decoder layer.
            views: memory of the layer's parameters (CPU), by name within the layer.
        """

    def rest_keys(self, rest: Mapping[str, str]) -> list[str]:
        """Return the keys outside the layers whose tensors are read unchanged.

        Args:
            rest: checkpoint key -> parameter, outside the layers.
        """

    def read_segments(self, reader: "WeightReader") -> dict[str, Tensor]:
        """Return the segments of all quantized matrices outside the layers by full name, as CPU tensors."""

    def places(self, layer: int) -> Mapping[str, TensorInfo] | None:
        """Return the place of each filled parameter whose bytes are stored as the model has them.

        Returns:
            Places by name within the layer; None if a parameter of the layer must be converted.
        """

    def close(self) -> None:
        """Close the files."""


class WeightReader(Closeable):
    """A reader of one model's weights, layer by layer.

    Args:
        skeleton: modules to fill; they define names, shapes and dtype.
        checkpoint: checkpoint with the tensors.
        filler: filler of the matrices that are not tensors of the checkpoint.
        is_pack: whether the tensors of layers have been renamed, merged and cast already.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        filler: MatrixFiller | None = None,
        *,
        is_pack: bool = False,
    ) -> None:
        self._skeleton = skeleton
        self._checkpoint = checkpoint
        self._filler = filler
        segments = segment_names(skeleton.model)
        plain = (parameter for name, parameter in skeleton.model.named_parameters() if name not in segments)
        self._dtype: torch.dtype = next(plain).dtype
        self._plan = plan_weights(skeleton, checkpoint.tensors, is_pack=is_pack)
        self._reader = TensorReader(checkpoint)
        self._scratch: Skeleton | None = None
        self._check_layers()

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
        if self._filler is not None:
            self._filler.close()

    def fill_matrices_with(self, filler: MatrixFiller) -> None:
        """Leave the matrices to a filler; call this when modules are replaced after the checkpoint was checked."""
        self._filler = filler

    def read(self, key: str) -> Tensor:
        """Return one tensor of the checkpoint as saved (CPU)."""
        return self._reader.read(key)

    def key_of(self, layer: int, name: str) -> str | None:
        """Return the checkpoint key of a layer's parameter; None where several tensors are merged into it."""
        return self._plan.direct[layer].get(name)

    @property
    def rest(self) -> Mapping[str, str]:
        """Checkpoint keys outside the layers, each with its parameter or buffer."""
        return self._plan.rest

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model computes in."""
        return self._dtype

    @cached_property
    def is_streamable(self) -> bool:
        """Whether every layer can be read straight from its file: no tensors to merge, cast or quantize."""
        if self._filler is not None:
            return not any(self._plan.converted) and all(places is not None for places in self._filled)
        infos = [self._checkpoint.tensors[key] for layer in self._plan.direct for key in layer.values()]
        same = all(info.dtype == stored_name(self._dtype) and info.restore is None for info in infos)
        return same and not any(self._plan.converted)

    def places(self, layer: int) -> dict[str, TensorInfo]:
        """Return the file position of parameters (not buffers) of a layer; the checkpoint must be streamable."""
        if self._filler is not None:
            return dict(self._filled[layer] or {})
        names = dict(self._skeleton.layers[layer].named_parameters())
        return {name: self._checkpoint.tensors[key] for name, key in self._plan.direct[layer].items() if name in names}

    def held(self, layer: int) -> dict[str, Tensor]:
        """Read the parameters of a layer without a place, such as norms that must be cast; they are small."""
        placed = self.places(layer).keys()
        parameters = self._skeleton.layers[layer].named_parameters()
        views = {name: torch.empty_like(p, device="cpu") for name, p in parameters if name not in placed}
        self.read_plain(layer, views)
        return views

    @cached_property
    def _filled(self) -> list[Mapping[str, TensorInfo] | None]:
        """Places of the parameters that the filler fills, for each layer."""
        assert self._filler is not None
        return [self._filler.places(layer) for layer in range(len(self._skeleton.layers))]

    def read_layer(self, layer: int, views: Mapping[str, Tensor]) -> None:
        """Fill the views of one layer's parameters (CPU), and cast if the checkpoint has another dtype.

        Raises:
            CorruptCheckpointError: tensors to be merged into a parameter are missing, or do not fit together.
        """
        if self._filler is None:
            self.read_plain(layer, views)
        else:
            self._filler.fill_layer(self, layer, views)

    def read_plain(self, layer: int, views: Mapping[str, Tensor]) -> None:
        """Fill views of one layer's parameters (CPU) from tensors of the checkpoint.

        Raises:
            CorruptCheckpointError: tensors to be merged into a parameter are missing, or do not fit together.
        """
        direct = {name: key for name, key in self._plan.direct[layer].items() if name in views}
        for name, key in direct.items():
            self._reader.read_into(key, views[name])
        converted = self._read_converted(layer, views) if self._plan.converted[layer] else set()
        self._check_complete(layer, views.keys() - direct.keys() - converted)

    def read_rest(self, device: torch.device, on_host: torch.nn.Module | None = None) -> MappedFile | None:
        """Fill everything except the decoder layers' parameters: embeddings, norms, head and all buffers.

        Args:
            device: destination.
            on_host: module with one matrix that stays in host memory, memory-mapped unless it must be cast.

        Returns:
            File of the mapped matrix, which the caller checks before each use and closes; None if nothing is mapped.
        """
        model = self._skeleton.model
        segments = segment_names(model)
        mapped = None if on_host is None else self._key_of(f"{path_of(model, on_host)}.weight")
        tensors = {key: self._reader.read(key, self._dtype) for key in self.rest_keys() if key != mapped}
        file = None
        if mapped is not None:
            tensors[mapped], file = self._reader.mapped(mapped, self._dtype)
        load_converted(self._skeleton, tensors, self._dtype)
        bind(model, self.read_segments())
        if not isinstance(model.get_output_embeddings(), QuantLinear):
            model.tie_weights()
        self._read_layer_buffers()
        stays = set() if on_host is None else {id(t) for t in (*on_host.parameters(), *on_host.buffers())}
        layer_parameters = {id(p) for layer in self._skeleton.layers for p in layer.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in layer_parameters:
                continue
            if parameter.is_meta:
                raise CorruptCheckpointError(f"tensor '{name}' is missing from {self._checkpoint.folder}")
            place = torch.device("cpu") if id(parameter) in stays else device
            parameter.data = parameter.data.to(device=place, dtype=None if name in segments else self._dtype)
            parameter.requires_grad_(False)
        _move_buffers(model, device, stays)
        return file

    def read_buffers(self, device: torch.device) -> None:
        """Fill the buffers of the layers, and move all buffers to a device; no parameter is read."""
        self._read_layer_buffers()
        _move_buffers(self._skeleton.model, device, set())

    def _read_layer_buffers(self) -> None:
        for layer, names in zip(self._skeleton.layers, self._plan.direct, strict=True):
            for name, buffer in layer.named_buffers():
                if name in names:
                    buffer.copy_(self._reader.read(names[name]))

    def _key_of(self, name: str) -> str | None:
        """Return the checkpoint key of a parameter outside the layers; None if it is missing."""
        return next((key for key, filled in self._plan.rest.items() if filled == name), None)

    def rest_keys(self) -> Iterable[str]:
        """Return the checkpoint keys outside the layers whose tensors are read unchanged."""
        if self._filler is not None:
            return self._filler.rest_keys(self._plan.rest)
        quantized = self.segments_meta()
        return [key for key, name in self._plan.rest.items() if name not in quantized]

    def buffer_keys(self) -> Iterable[str]:
        """Yield the checkpoint keys of buffers within the layers."""
        for layer, names in zip(self._skeleton.layers, self._plan.direct, strict=True):
            yield from (names[name] for name, _ in layer.named_buffers() if name in names)

    def segments_meta(self) -> dict[str, Tensor]:
        """Return the segments of quantized matrices outside the layers by full name, on meta or filled.

        They belong to embeddings, to the head and to blocks that layers share.
        """
        model = self._skeleton.model
        head = model.get_output_embeddings()
        parts = [(path, model.get_submodule(path)) for path in self._skeleton.shared_paths]
        parts += [(path, part) for path, part in model.named_modules() if isinstance(part, QuantEmbedding)]
        parts += [] if head is None else [(path_of(model, head), head)]
        found = [linear for path, part in parts for linear in quant_linears(part, path)]
        return {f"{path}.{name}": segment for path, linear in found for name, segment in linear.segments.items()}

    def read_segments(self) -> dict[str, Tensor]:
        """Return the segments of quantized matrices outside the layers by full name, as CPU tensors."""
        if self._filler is not None:
            return self._filler.read_segments(self)
        keys = {name: key for key, name in self._plan.rest.items()}
        return {name: self._reader.read(keys[name]) for name in self.segments_meta() if name in keys}

    def _check_complete(self, layer: int, missing: Set[str]) -> None:
        if self._filler is not None:
            missing = missing - self._filler.parameters(layer)
        if missing:
            name = f"{self._skeleton.layers_name}.{layer}.{min(missing)}"
            raise CorruptCheckpointError(
                f"tensor '{name}' is missing from {self._checkpoint.folder}", hint="download or copy the folder again"
            )

    def _read_converted(self, layer: int, views: Mapping[str, Tensor]) -> set[str]:
        """Fill the parameters that merge several tensors, such as fused experts.

        Returns:
            Names of the filled parameters.
        """
        filled = set()
        for name, keys in self._plan.converted[layer].items():
            if self._plan.places.keys() >= set(keys):
                if name in views:
                    self._read_stacked(layer, name, keys, views[name])
                    filled.add(name)
            else:
                filled |= self._convert(layer, keys, views)
        return filled

    def _read_stacked(self, layer: int, name: str, keys: Sequence[str], view: Tensor) -> None:
        """Read the tensors that a parameter [experts, rows, ...] stacks, each into its place."""
        for key, place in self._stacked(layer, name, keys, view.shape):
            rows = view.shape[1] // place.num_parts
            self._reader.read_into(key, view[place.expert, place.part * rows : (place.part + 1) * rows])

    def _stacked(
        self, layer: int, name: str, keys: Sequence[str], shape: Sequence[int]
    ) -> list[tuple[str, ModulePlace]]:
        """Return the tensors that a parameter of this shape, [experts, rows, ...], stacks, and check their shapes."""
        num_experts, num_rows, *others = shape
        places = [self._plan.places[key] for key in keys]
        num_parts = places[0].num_parts
        missing = {(e, p) for e in range(num_experts) for p in range(num_parts)} - {(p.expert, p.part) for p in places}
        self._check_complete(layer, {f"{name}.{expert}" for expert, _ in missing})
        for key, place in zip(keys, places, strict=True):
            rows = num_rows // num_parts
            wanted, found = (rows, *others), tuple(self._checkpoint.tensors[key].shape)
            if place.expert >= num_experts or found != wanted or rows * num_parts != num_rows:
                raise CorruptCheckpointError(
                    f"tensor '{key}' has shape {found}, but the configuration says {num_experts} experts of {wanted}"
                )
        return list(zip(keys, places, strict=True))

    def stored_places(self, layer: int, names: Sequence[str]) -> list[list[TensorInfo]] | None:
        """Return the places in the files of parameters of a layer that are each stored apart, such as segments.

        Returns:
            One tensor for each parameter; None if one of them must be converted.
        """
        if self._filler is not None:
            filled = self._filled[layer] or {}
            return [[filled[name]] for name in names] if filled.keys() >= set(names) else None
        tensors, parameters = self._checkpoint.tensors, self._skeleton.layers[layer]
        keys = [self.key_of(layer, name) for name in names]
        found = [tensors[key] for key in keys if key is not None]
        stored = [stored_name(parameters.get_parameter(name).dtype) for name in names]
        if [info.dtype for info in found] != stored or any(info.restore for info in found):
            return None
        return [[info] for info in found]

    def stack_places(self, layer: int, name: str) -> list[list[TensorInfo]] | None:
        """Return the places in the files of a parameter [experts, ...] of a layer, expert by expert.

        Returns:
            The tensors, or parts of one, whose bytes follow each other in an expert's part of the parameter; None if
            the parameter must be converted.

        Raises:
            CorruptCheckpointError: tensors to be stacked are missing, or do not fit together.
        """
        parameter = self._skeleton.layers[layer].get_parameter(name)
        if (key := self.key_of(layer, name)) is not None:
            found = [[each] for each in _split(self._checkpoint.tensors[key], len(parameter))]
        else:
            keys = self._plan.converted[layer].get(name, ())
            if self._filler is not None or not keys or not self._plan.places.keys() >= set(keys):
                return None
            stacked = sorted(self._stacked(layer, name, keys, parameter.shape), key=_in_order)
            infos = [self._checkpoint.tensors[key] for key, _ in stacked]
            num_parts = len(infos) // len(parameter)
            found = [infos[begin : begin + num_parts] for begin in range(0, len(infos), num_parts)]
        stored = stored_name(parameter.dtype)
        same = all(info.dtype == stored and info.restore is None for infos in found for info in infos)
        return found if same else None

    def _convert(self, layer: int, keys: Sequence[str], views: Mapping[str, Tensor]) -> set[str]:
        """Merge tensors by transformers' conversion, on a second skeleton, because it replaces the parameters it fills.

        Tensors are read when the conversion needs them. Beside the layer, that takes twice the parameter's memory.
        """
        if self._scratch is None:
            self._scratch = build_skeleton(self._skeleton.config, self._dtype)
        tensors = {key: LazyTensor(partial(self._reader.read, key)) for key in keys}
        load_converted(self._scratch, tensors, self._dtype)
        return _move_filled(self._scratch.layers[layer], views)

    def _check_layers(self) -> None:
        for index, layer in enumerate(self._skeleton.layers):
            direct = self._plan.direct[index]
            parameters = dict(layer.named_parameters())
            if not self._plan.converted[index]:  # the filled parameters are only known after a conversion
                self._check_complete(index, parameters.keys() - direct.keys())
            for name, parameter in parameters.items():
                if name not in direct:
                    continue
                info = self._checkpoint.tensors[direct[name]]
                if tuple(info.shape) != tuple(parameter.shape):
                    raise CorruptCheckpointError(
                        f"tensor '{info.key}' has shape {tuple(info.shape)}, but the configuration says "
                        f"{tuple(parameter.shape)}"
                    )
        self._check_parts()

    def _check_parts(self) -> None:
        """Check that layers of equal shapes have the same tensors, and that no numbered tensor is missing."""
        direct, parts = self._plan.direct, [_parts(*each) for each in enumerate(self._plan.converted)]
        shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in self._skeleton.layers]
        for layer, shape in enumerate(shapes):
            if parts[layer]:
                alike = [other for other, another in enumerate(shapes) if another == shape and parts[other]]
                names = set().union(*(direct[other].keys() & shape.keys() for other in alike))
                expected = _complete(set().union(*(parts[other] for other in alike)))
                self._check_complete(layer, (names - direct[layer].keys()) | (expected - parts[layer]))


def _move_buffers(model: Any, device: torch.device, stays: Set[int]) -> None:
    """Move all buffers to a device, but for those with these ids."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in stays:
                module._buffers[name] = buffer.to(device)


def _split(info: TensorInfo, num_parts: int) -> list[TensorInfo]:
    """Return the places of a tensor's first dimension, one by one."""
    nbytes = info.nbytes // num_parts
    part = replace(info, shape=info.shape[1:], nbytes=nbytes)
    return [replace(part, offset=info.offset + index * nbytes) for index in range(num_parts)]


def _in_order(stacked: tuple[str, ModulePlace]) -> tuple[int, int]:
    return stacked[1].expert, stacked[1].part


def _parts(layer: int, converted: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the names in the checkpoint of all tensors to be merged, within the layer."""
    return {key.split(f".{layer}.", 1)[-1] for keys in converted.values() for key in keys}


def _complete(parts: set[str]) -> set[str]:
    """Add the missing numbered parts: each number up to the highest must have every suffix that occurs."""
    numbers: dict[str, int] = {}
    suffixes: dict[str, set[str]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, parts)):
        numbers[match[1]] = max(int(match[2]), numbers.get(match[1], 0))
        suffixes.setdefault(match[1], set()).add(match[3])
    missing = {
        f"{prefix}{number}{suffix}"
        for prefix, last in numbers.items()
        for number in range(last + 1)
        for suffix in suffixes[prefix]
    }
    return parts | missing


def _move_filled(scratch: Any, views: Mapping[str, Tensor]) -> set[str]:
    """Move the filled parameters of a scratch layer into `views`, and return their names."""
    filled = [(name, parameter.data) for name, parameter in scratch.named_parameters() if not parameter.is_meta]
    for name, data in filled:
        if name in views:
            views[name].copy_(data)
        path, _, leaf = name.rpartition(".")
        empty = torch.empty_like(data, device="meta")
        scratch.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    return {name for name, _ in filled}
