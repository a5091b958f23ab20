"""Reading the quantized matrices of a pre-quantized checkpoint: one matrix in memory at a time."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.lookup import TABLE
from specchat.models.quant.modules import Matrix, segment_names
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.quantizing import by_layer, outside_layers
from specchat.models.weights.reader import WeightReader


class PrequantizedFiller:
    """A `MatrixFiller` that transcodes the quantized matrices of a checkpoint.

    Args:
        skeleton: modules whose matrices have been replaced.
        checkpoint: the whole checkpoint.
        recipe: recipe that knows how each matrix is stored.
        matrices: replaced matrices.
    """

    def __init__(
        self, skeleton: Skeleton, checkpoint: Checkpoint, recipe: CheckpointRecipe, matrices: tuple[Matrix, ...]
    ) -> None:
        self._skeleton = skeleton
        self._recipe = recipe
        self._matrices = by_layer(skeleton, matrices)
        self._outside = outside_layers(matrices)
        self._tensors = TensorReader(checkpoint)

    def parameters(self, layer: int) -> Set[str]:
        """Return the parameters of a layer that are not tensors of the checkpoint, by name within the layer."""
        return segment_names(self._skeleton.layers[layer]) | set(self._recipe.unpacked(self._prefix(layer)))

    def fill_layer(self, reader: WeightReader, layer: int, views: Mapping[str, Tensor]) -> None:
        """Transcode the matrices of a layer and read its other parameters.

        Args:
            reader: reader of the checkpoint's plain tensors.
            layer: index of the decoder layer.
            views: memory of the layer's parameters (CPU), by name within the layer; those of other matrices are left
                out.

        Raises:
            CorruptCheckpointError: impossible contents, and the faults that `WeightReader.read_layer` reports.
        """
        elsewhere = self.parameters(layer)
        reader.read_plain(layer, {name: view for name, view in views.items() if name not in elsewhere})
        for name, matrix in self._matrices[layer].items():
            if any(view.startswith(f"{name}.") for view in views):
                self._recipe.fill(self._tensors, matrix, name, views)
        prefix = self._prefix(layer)
        for name in self._recipe.unpacked(prefix):
            if name in views:
                self._recipe.read_dequantized(self._tensors, prefix + name, views[name])

    def places(self, layer: int) -> dict[str, TensorInfo] | None:
        """Return the places of a layer's segments; None if one of its matrices must be transcoded."""
        found: dict[str, TensorInfo] = {}
        if self._recipe.unpacked(self._prefix(layer)):
            return None
        for name, matrix in self._matrices[layer].items():
            places = self._recipe.places(matrix, name)
            if places is None:
                return None
            found |= places
        return found

    def rest_keys(self, rest: Mapping[str, str]) -> list[str]:
        """Return all keys outside the layers; the reader's checkpoint has no keys of quantized matrices."""
        return list(rest)

    def read_segments(self, reader: WeightReader) -> dict[str, Tensor]:
        """Return the segments of quantized matrices outside the layers by full name, as CPU tensors."""
        segments = {name: torch.empty_like(segment, device="cpu") for name, segment in reader.segments_meta().items()}
        for matrix in self._outside:
            name = f"{matrix.path}.{TABLE}" if matrix.is_lookup else matrix.path
            self._recipe.fill(self._tensors, matrix, name, segments)
        return segments

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()

    def _prefix(self, layer: int) -> str:
        return f"{self._skeleton.layers_name}.{layer}."
