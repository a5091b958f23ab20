"""A source of quantized layers made from full-precision ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from specchat.models.packs.source import LayerSource
from specchat.models.quant.formats.base import Quantizer
from specchat.models.weights.recipe import HEAD_QUANTIZER, QuantizeRecipe
from specchat.records.limits import is_sensitive

_WEIGHT = ".weight"
_ROUTER = "mlp.gate.weight"


class QuantizedLayers:
    """A `LayerSource` that quantizes the matrices of a Llama-like model without fused tensors.

    Args:
        source: layers in full precision; two-dimensional tensors are matrices, besides routers, and three-dimensional
            ones are the matrices of experts.
        recipe: recipe for quantizing the matrices.
        head: full name of the head's weight, which is kept next to the head's segments.
    """

    def __init__(self, source: LayerSource, recipe: QuantizeRecipe, head: str) -> None:
        self._source = source
        self._recipe = recipe
        self._head = head
        self._memory: dict[tuple[str, str], dict[str, Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self._source.num_layers

    @property
    def layers_name(self) -> str:
        """Path of the layers in the model."""
        return self._source.layers_name

    def layer_meta(self, layer: int) -> dict[str, Tensor]:
        """Return the result of `read_layer` as meta tensors, in module order."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._source.layer_meta(layer).items():
            matrices = _matrices(name, tensor)
            for own, matrix in matrices.items():
                tensors |= _empty(own, matrix, self._quantizer(own, layer), "meta")
            tensors |= {} if matrices else {name: tensor}
        return tensors

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return one layer's segments and other tensors, valid until the next call."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._source.read_layer(layer).items():
            matrices = _matrices(name, tensor)
            for own, matrix in matrices.items():
                quantizer = self._quantizer(own, layer)
                segments = self._segments(own, matrix, quantizer)
                _quantize(own, matrix, quantizer, segments)
                tensors |= segments
            tensors |= {} if matrices else {name: tensor}
        return tensors

    def rest_meta(self) -> dict[str, Tensor]:
        """Return the result of `rest` as meta tensors."""
        rest = dict(self._source.rest_meta())
        return rest | _empty("lm_head.weight", rest[self._head], HEAD_QUANTIZER, "meta")

    def rest(self) -> dict[str, Tensor]:
        """Return everything outside the layers, and the head's segments."""
        rest = dict(self._source.rest())
        segments = _empty("lm_head.weight", rest[self._head], HEAD_QUANTIZER, "cpu")
        _quantize("lm_head.weight", rest[self._head], HEAD_QUANTIZER, segments)
        return rest | segments

    def _quantizer(self, name: str, layer: int) -> Quantizer:
        """Return the quantizer of a matrix; experts have a name without `_WEIGHT`."""
        path, ending, _ = name.rpartition(_WEIGHT)
        sensitive = bool(ending) and is_sensitive(path.rpartition(".")[2], layer, self.num_layers)
        return self._recipe.sensitive_quantizer if sensitive else self._recipe.layer_quantizer

    def _segments(self, name: str, tensor: Tensor, quantizer: Quantizer) -> dict[str, Tensor]:
        """Return memory for one matrix, reused by every layer that stores it with the same quantizer."""
        key = name, quantizer.identity
        if key not in self._memory:
            self._memory[key] = _empty(name, tensor, quantizer, "cpu")
        return self._memory[key]


def _matrices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the matrices to quantize in a tensor by name; none for norms and routers."""
    if tensor.ndim == 3:
        return {f"{name}.{expert}": matrix for expert, matrix in enumerate(tensor)}
    return {name: tensor} if tensor.ndim == 2 and name != _ROUTER else {}


def _empty(name: str, matrix: Tensor, quantizer: Quantizer, device: str) -> dict[str, Tensor]:
    """Allocate the segments of a matrix by module path and segment name; contents are undefined."""
    rows, cols = matrix.shape
    return {
        f"{name.removesuffix(_WEIGHT)}.{segment.name}": torch.empty(segment.shape, dtype=segment.dtype, device=device)
        for segment in quantizer.format.segments(rows, cols)
    }


def _quantize(name: str, matrix: Tensor, quantizer: Quantizer, segments: Mapping[str, Tensor]) -> None:
    prefix = f"{name.removesuffix(_WEIGHT)}."
    quantizer.quantize(matrix, {key.removeprefix(prefix): tensor for key, tensor in segments.items()})
