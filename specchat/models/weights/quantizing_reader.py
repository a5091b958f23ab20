"""Full-precision checkpoints, read as the quantized layers that are made of them: one matrix in memory at a time."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.hf.skeleton import Skeleton, head_names
from specchat.models.quant.modules import Matrix, segment_names
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.prequantized_reader import PrequantizedReader
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import QuantizeRecipe, apply_recipe


def open_reader(
    skeleton: Skeleton, checkpoint: Checkpoint, recipe: QuantizeRecipe | CheckpointRecipe | None = None
) -> WeightReader:
    """The reader of a checkpoint; with a recipe, the skeleton's matrices are replaced as it says.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """
    match recipe:
        case QuantizeRecipe() if _is_quantized(checkpoint):
            apply_recipe(skeleton, recipe)
            return WeightReader(skeleton, checkpoint)
        case QuantizeRecipe():
            return QuantizingReader(skeleton, checkpoint, recipe)
        case CheckpointRecipe():
            return PrequantizedReader(skeleton, checkpoint, recipe)
        case None:
            return WeightReader(skeleton, checkpoint)


def _is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether the files have segments in the place of matrices: a synthetic model, made so straight away."""
    return any(key.endswith(".codes") for key in checkpoint.tensors)


class QuantizingReader(WeightReader):
    """Reads a full-precision checkpoint's layers and quantizes them.

    Args:
        skeleton: the modules as the checkpoint has them; its matrices are replaced here.
        checkpoint: where the bytes are.
        recipe: what becomes of the matrices.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, recipe: QuantizeRecipe) -> None:
        super().__init__(skeleton, checkpoint)
        self._recipe = recipe
        self._head_key = self._find_head_key()
        self._layer_matrices: list[dict[str, Matrix]] = [{} for _ in skeleton.layers]
        self._head: Matrix | None = None
        for matrix in apply_recipe(skeleton, recipe):
            if matrix.layer is None:
                self._head = matrix
            else:
                name = matrix.path.removeprefix(f"{skeleton.layers_name}.{matrix.layer}.")
                self._layer_matrices[matrix.layer][name] = matrix

    @property
    def is_streamable(self) -> bool:
        """Never: quantizing for every pass would be slower than streaming what it saves."""
        return False

    def read_layer(self, layer: int, views: Mapping[str, Tensor]) -> None:
        """Fills the views of one layer's parameters (CPU tensors); matrices that lie in the checkpoint one by one.

        Raises:
            CorruptCheckpointError: as in `WeightReader.read_layer`.
        """
        segments = segment_names(self._skeleton.layers[layer])
        rest = {name: view for name, view in views.items() if name not in segments}
        merged = {}
        for name, matrix in self._layer_matrices[layer].items():
            key = self._plan.direct[layer].get(_dense_name(name, matrix))
            if key is None:
                merged[name] = self._empty(matrix)
            else:
                self._quantize(name, matrix, self._reader.read(key), views)
        matrices = self._layer_matrices[layer]
        super().read_layer(layer, rest | {_dense_name(name, matrices[name]): merged[name] for name in merged})
        for name, weight in merged.items():
            self._quantize(name, matrices[name], weight, views)

    def _empty(self, matrix: Matrix) -> Tensor:
        """Memory for a matrix that transformers merges of several tensors: as the model has it."""
        shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
        return torch.empty(*([matrix.num_experts] if matrix.num_experts else []), *shape, dtype=self._dtype)

    def _quantize(self, name: str, matrix: Matrix, weight: Tensor, views: Mapping[str, Tensor]) -> None:
        """Fills the segments of one parameter: `weight` [rows, cols], or one such (or its transpose) per expert."""
        quantizer = self._recipe.quantizer(matrix)
        experts = weight if matrix.num_experts else weight[None]
        for expert, each in enumerate(experts):
            path = f"{name}.{expert}" if matrix.num_experts else name
            dense = each.T.contiguous() if matrix.transposed else each
            names = [segment.name for segment in quantizer.format.segments(*matrix.shape)]
            quantizer.quantize(dense, {segment: views[f"{path}.{segment}"] for segment in names})

    def _find_head_key(self) -> str | None:
        """The checkpoint's tensor that the head multiplies with: its own, or the embeddings."""
        keys = {name: key for key, name in self._plan.rest.items()}
        return next((keys[name] for name in head_names(self._skeleton) if name in keys), None)

    def rest_keys(self) -> Iterable[str]:
        """All but a head that is quantized."""
        head_name = None if self._head is None else f"{self._head.path}.weight"
        return [key for key, name in self._plan.rest.items() if name != head_name]

    def read_head(self) -> dict[str, Tensor]:
        """Reads the head's matrix and quantizes it."""
        if self._head is None or self._head_key is None:
            return {}
        segments = {name: torch.empty_like(segment, device="cpu") for name, segment in self.head_meta().items()}
        self._quantize(self._head.path, self._head, self._reader.read(self._head_key), segments)
        return segments


def _dense_name(name: str, matrix: Matrix) -> str:
    """The parameter that a matrix is, or is the weight of, where it is not quantized."""
    return name if matrix.num_experts else f"{name}.weight"
