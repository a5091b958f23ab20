"""The source of a pack's tensors."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class LayerSource(Protocol):
    """A model that provides its tensors layer by layer.

    The result of `read_layer` is valid until the next call. Mappings may create their tensors on access; callers access
    each once. The meta mappings give names, order, shapes and dtypes at no cost, as meta tensors or real ones.
    """

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def layers_name(self) -> str:
        """The layers' path in the model, such as "model.layers"."""

    def layer_meta(self, layer: int) -> Mapping[str, Tensor]:
        """Return the layer's parameters as meta tensors, by name within the layer, in module order."""

    def read_layer(self, layer: int) -> Mapping[str, Tensor]:
        """Return the layer's parameters as CPU tensors."""

    def rest_meta(self) -> Mapping[str, Tensor]:
        """Return everything outside the layers as meta tensors, by full name."""

    def rest(self) -> Mapping[str, Tensor]:
        """Return everything outside the layers as CPU tensors, by full name."""


def with_full_names(source: LayerSource, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer by their full names in the model."""
    return {f"{source.layers_name}.{layer}.{name}": tensor for name, tensor in tensors.items()}
