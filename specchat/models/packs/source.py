"""Where the tensors of a pack come from."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class LayerSource(Protocol):
    """A model whose tensors can be had layer by layer.

    What `read_layer` returns is used up before the next call. Mappings may make their tensors when asked for them, and
    are asked once for each. The meta mappings tell names, order, shapes and dtypes at no cost: meta tensors, or any.
    """

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def layers_name(self) -> str:
        """The layers' path in the model, such as "model.layers"."""

    def layer_meta(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters as they will be packed: by name within the layer, in module order."""

    def read_layer(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters: CPU tensors."""

    def rest_meta(self) -> Mapping[str, Tensor]:
        """Everything outside the layers' parameters, by full name."""

    def rest(self) -> Mapping[str, Tensor]:
        """The same, as CPU tensors."""


def with_full_names(source: LayerSource, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer by their full names in the model."""
    return {f"{source.layers_name}.{layer}.{name}": tensor for name, tensor in tensors.items()}
