"""Checkpoints that come quantized, read as layers of quantized matrices: one matrix in memory at a time."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.modules import Matrix, segment_names
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import apply_recipe


class PrequantizedReader(WeightReader):
    """Reads a checkpoint that comes quantized.

    Args:
        skeleton: of the model; its matrices are replaced here.
        checkpoint: where the bytes are.
        recipe: how the matrices are stored.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, recipe: CheckpointRecipe) -> None:
        self._recipe = recipe
        self._layer_matrices: list[dict[str, Matrix]] = [{} for _ in skeleton.layers]
        self._head: Matrix | None = None
        for matrix in apply_recipe(skeleton, recipe):
            if matrix.layer is None:
                self._head = matrix
            else:
                self._layer_matrices[matrix.layer][matrix.path.removeprefix(_prefix(skeleton, matrix.layer))] = matrix
        self._quantized = TensorReader(checkpoint)
        super().__init__(skeleton, recipe.without_quantized(checkpoint))

    @property
    def is_streamable(self) -> bool:
        """Never: the checkpoint's order of numbers is another, and is changed while packing."""
        return False

    def close(self) -> None:
        """Closes the files."""
        super().close()
        self._quantized.close()

    def read_layer(self, layer: int, views: Mapping[str, Tensor]) -> None:
        """Fills the views of one layer's parameters (CPU tensors).

        Raises:
            CorruptCheckpointError: contents that cannot be; otherwise as in `WeightReader.read_layer`.
        """
        elsewhere = self._filled_here(layer)
        super().read_layer(layer, {name: view for name, view in views.items() if name not in elsewhere})
        for name, matrix in self._layer_matrices[layer].items():
            self._recipe.fill(self._quantized, matrix, name, views)
        prefix = _prefix(self._skeleton, layer)
        for name in self._recipe.unpacked(prefix):
            self._recipe.read_numbers(self._quantized, prefix + name, views[name])

    def read_head(self) -> dict[str, Tensor]:
        """The segments of a quantized head by full name: CPU tensors."""
        segments = {name: torch.empty_like(segment, device="cpu") for name, segment in self.head_meta().items()}
        if self._head is not None:
            self._recipe.fill(self._quantized, self._head, self._head.path, segments)
        return segments

    def _check_complete(self, layer: int, missing: Set[str]) -> None:
        super()._check_complete(layer, missing - self._filled_here(layer))

    def _filled_here(self, layer: int) -> Set[str]:
        """Parameters of a layer that are no tensors of the checkpoint."""
        return segment_names(self._skeleton.layers[layer]) | set(self._recipe.unpacked(_prefix(self._skeleton, layer)))


def _prefix(skeleton: Skeleton, layer: int) -> str:
    return f"{skeleton.layers_name}.{layer}."
