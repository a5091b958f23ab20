"""Quantizing the matrices of a full-precision checkpoint while its layers are read: one matrix in memory at a time."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from specchat.models.hf.skeleton import Skeleton, head_names
from specchat.models.quant.modules import Matrix, segment_names
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import QuantizeRecipe


class QuantizingFiller:
    """A `MatrixFiller` that quantizes the matrices of a full-precision checkpoint.

    Args:
        skeleton: modules whose matrices have been replaced.
        recipe: recipe that chooses the quantizer of each matrix.
        matrices: replaced matrices.
    """

    def __init__(self, skeleton: Skeleton, recipe: QuantizeRecipe, matrices: tuple[Matrix, ...]) -> None:
        self._skeleton = skeleton
        self._recipe = recipe
        self._matrices = by_layer(skeleton, matrices)
        self._outside = outside_layers(matrices)

    def parameters(self, layer: int) -> Set[str]:
        """Return the segments of a layer, by name within the layer."""
        return segment_names(self._skeleton.layers[layer])

    def fill_layer(self, reader: WeightReader, layer: int, views: Mapping[str, Tensor]) -> None:
        """Quantize the matrices of a layer and read its other parameters.

        Args:
            reader: reader of the full-precision checkpoint.
            layer: index of the decoder layer.
            views: memory of the layer's parameters (CPU), by name within the layer.

        Raises:
            CorruptCheckpointError: the faults that `WeightReader.read_layer` reports.
        """
        matrices, segments = self._matrices[layer], self.parameters(layer)
        rest = {name: view for name, view in views.items() if name not in segments}
        merged = {}
        for name, matrix in matrices.items():
            key = reader.key_of(layer, _dense_name(name, matrix))
            if key is None:
                merged[name] = _empty(matrix, reader.dtype)
            else:
                self._quantize(name, matrix, reader.read(key), views)
        reader.read_plain(layer, rest | {_dense_name(name, matrices[name]): merged[name] for name in merged})
        for name, weight in merged.items():
            self._quantize(name, matrices[name], weight, views)

    def rest_keys(self, rest: Mapping[str, str]) -> list[str]:
        """Return all keys outside the layers except those of quantized matrices."""
        quantized = {_dense_name(matrix.path, matrix) for matrix in self._outside}
        return [key for key, name in rest.items() if name not in quantized]

    def read_segments(self, reader: WeightReader) -> dict[str, Tensor]:
        """Quantize the matrices outside the layers, and return their segments.

        The head's matrix may be that of tied embeddings.
        """
        keys, meta = {name: key for key, name in reader.rest.items()}, reader.segments_meta()
        filled: dict[str, Tensor] = {}
        for matrix in self._outside:
            names = head_names(self._skeleton) if matrix.is_head else (_dense_name(matrix.path, matrix),)
            key = next((keys[name] for name in names if name in keys), None)
            if key is not None:  # the reader reports tensors that are missing
                own = {
                    name: torch.empty_like(meta[name], device="cpu")
                    for name in meta
                    if name.startswith(f"{matrix.path}.")
                }
                self._quantize(matrix.path, matrix, reader.read(key), own)
                filled |= own
        return filled

    def places(self, _: int) -> None:
        """Return None: matrices are quantized when they are read."""

    def close(self) -> None:
        """Do nothing: the reader owns all files."""

    def _quantize(self, name: str, matrix: Matrix, weight: Tensor, views: Mapping[str, Tensor]) -> None:
        """Fill the segments of one parameter: `weight` [rows, cols], or one such (or its transpose) per expert."""
        quantizer = self._recipe.quantizer(matrix)
        experts = weight if matrix.num_experts else weight[None]
        for expert, each in enumerate(experts):
            path = f"{name}.{expert}" if matrix.num_experts else name
            dense = each.T.contiguous() if matrix.transposed else each
            names = [segment.name for segment in quantizer.format.segments(*matrix.shape)]
            quantizer.quantize(dense, {segment: views[f"{path}.{segment}"] for segment in names})


def by_layer(skeleton: Skeleton, matrices: tuple[Matrix, ...]) -> list[dict[str, Matrix]]:
    """Return the matrices of each layer, by name within the layer."""
    layers: list[dict[str, Matrix]] = [{} for _ in skeleton.layers]
    for matrix in matrices:
        if matrix.layer is not None:
            layers[matrix.layer][matrix.path.removeprefix(f"{skeleton.layers_name}.{matrix.layer}.")] = matrix
    return layers


def outside_layers(matrices: tuple[Matrix, ...]) -> list[Matrix]:
    """Return the matrices of the head and of blocks that layers share."""
    return [matrix for matrix in matrices if matrix.layer is None]


def _empty(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Allocate a matrix that transformers merges from several tensors, in the model's own layout."""
    shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
    return torch.empty(*([matrix.num_experts] if matrix.num_experts else []), *shape, dtype=dtype)


def _dense_name(name: str, matrix: Matrix) -> str:
    """Return the name of a matrix's parameter in the unquantized model."""
    return name if matrix.num_experts else f"{name}.weight"
