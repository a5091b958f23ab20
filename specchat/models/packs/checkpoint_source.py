"""A checkpoint as the source of a pack."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specchat.closing import Closeable
from specchat.models.checkpoint.dtypes import stored_torch_dtype, torch_dtype
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.open import ModelWeights
from specchat.models.weights.reader import WeightReader


class CheckpointLayers(Closeable):
    """The `LayerSource` of a checkpoint: layers in the model's names and dtype, everything else as saved.

    Args:
        weights: model whose layers are packed.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self._skeleton = weights.skeleton
        self._weights = weights.reader
        self._tensors = TensorReader(weights.checkpoint)
        # Tensors that must be restored have the dtype that they are loaded in: buffers stay in float32.
        dtypes = dict.fromkeys(self._weights.rest_keys(), torch_dtype(weights.dtype))
        dtypes |= dict.fromkeys(self._weights.buffer_keys(), torch.float32)
        self._rest = {key: _Saved(weights.checkpoint.tensors[key], dtype) for key, dtype in dtypes.items()}
        self._blob = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Close this source's own files and free its memory; `weights` stay open."""
        self._tensors.close()
        self._blob = torch.empty(0, dtype=torch.uint8)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._skeleton.layers)

    @property
    def layers_name(self) -> str:
        """The layers' path in the model."""
        return self._skeleton.layers_name

    def layer_meta(self, layer: int) -> Mapping[str, Tensor]:
        """Return the layer's parameters, on meta or filled."""
        return dict(self._skeleton.layers[layer].named_parameters())

    def read_layer(self, layer: int) -> Mapping[str, Tensor]:
        """Return the layer's parameters, with tensors merged as in transformers; valid until the next call.

        Raises:
            CorruptCheckpointError: missing tensors, or tensors of wrong shapes.
            ModelError: an unreadable file.
        """
        layout = LayerLayout.of(self._skeleton.layers[layer])
        if self._blob.numel() < layout.nbytes:
            self._blob = torch.empty(layout.nbytes, dtype=torch.uint8)
        views = layout.views(self._blob)
        self._weights.read_layer(layer, views)
        return views

    def rest_meta(self) -> Mapping[str, Tensor]:
        """Return embeddings, head, norms and persistent buffers as meta tensors, by the checkpoint's names.

        Quantized matrices are represented by their segments, by the model's names.
        """
        return {key: saved.meta() for key, saved in self._rest.items()} | self._weights.segments_meta()

    def rest(self) -> Mapping[str, Tensor]:
        """Return the tensors of `rest_meta`, each read on access: together they may be larger than two layers."""
        return _LazyTensors(self._tensors, self._rest, self._weights)


@dataclass(frozen=True)
class _Saved:
    """A tensor outside the layers; `dtype` is that of a tensor that must be restored."""

    info: TensorInfo
    dtype: torch.dtype

    def meta(self) -> Tensor:
        dtype = stored_torch_dtype(self.info.dtype) if self.info.restore is None else self.dtype
        return torch.empty(self.info.shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class _LazyTensors(Mapping[str, Tensor]):
    reader: TensorReader
    saved: Mapping[str, _Saved]
    weights: WeightReader

    def __getitem__(self, key: str) -> Tensor:
        return self.reader.read(key, self.saved[key].dtype) if key in self.saved else self._segments[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.saved, *self.weights.segments_meta()))

    def __len__(self) -> int:
        return len(self.saved) + len(self.weights.segments_meta())

    @cached_property
    def _segments(self) -> Mapping[str, Tensor]:
        return self.weights.read_segments()
