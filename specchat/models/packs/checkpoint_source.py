"""A checkpoint, as the source that packs are written from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specchat.closing import Closeable
from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.open import ModelWeights
from specchat.models.weights.reader import WeightReader


class CheckpointLayers(Closeable):
    """A checkpoint as a `pack.LayerSource`: layers under the model's own names and in its dtype, the rest as saved.

    Args:
        weights: model whose layers are packed.
    """

    def __init__(self, weights: ModelWeights) -> None:
        self._skeleton = weights.skeleton
        self._weights = weights.reader
        self._tensors = TensorReader(weights.checkpoint)
        keys = (*self._weights.rest_keys(), *self._weights.buffer_keys())
        self._rest = {key: weights.checkpoint.tensors[key] for key in keys}
        self._blob = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Close this source's own files and free its memory; the weights stay open."""
        self._tensors.close()
        self._blob = torch.empty(0, dtype=torch.uint8)

    @property
    def is_streamable(self) -> bool:
        """Whether the checkpoint's own files are as good as a pack: `WeightReader.is_streamable`."""
        return self._weights.is_streamable

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self._skeleton.layers)

    @property
    def layers_name(self) -> str:
        """The layers' path in the model."""
        return self._skeleton.layers_name

    def layer_meta(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters, whatever they are bound to."""
        return dict(self._skeleton.layers[layer].named_parameters())

    def read_layer(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters, converted where transformers fuses tensors; valid until the next call.

        Raises:
            CorruptCheckpointError: tensors are missing or do not fit.
            ModelError: a file cannot be read.
        """
        layout = LayerLayout.of(self._skeleton.layers[layer])
        if self._blob.numel() < layout.nbytes:
            self._blob = torch.empty(layout.nbytes, dtype=torch.uint8)
        views = layout.views(self._blob)
        self._weights.read_layer(layer, views)
        return views

    def rest_meta(self) -> Mapping[str, Tensor]:
        """Embeddings, head, norms and persistent buffers, under the checkpoint's names and in its dtypes.

        A quantized head is there as its segments, under the model's names.
        """
        saved = {key: _meta(info) for key, info in self._rest.items()}
        return saved | self._weights.head_meta()

    def rest(self) -> Mapping[str, Tensor]:
        """The same, each read when asked for: all together they may be larger than two layers."""
        return _ReadWhenAsked(self._tensors, tuple(self._rest), self._weights)


@dataclass(frozen=True)
class _ReadWhenAsked(Mapping[str, Tensor]):
    reader: TensorReader
    saved: tuple[str, ...]
    weights: WeightReader

    def __getitem__(self, key: str) -> Tensor:
        return self.reader.read(key) if key in self.saved else self._head[key]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.saved, *self.weights.head_meta()))

    def __len__(self) -> int:
        return len(self.saved) + len(self.weights.head_meta())

    @cached_property
    def _head(self) -> Mapping[str, Tensor]:
        return self.weights.read_head()


def _meta(info: TensorInfo) -> Tensor:
    return torch.empty(info.shape, dtype=stored_torch_dtype(info.dtype), device="meta")
