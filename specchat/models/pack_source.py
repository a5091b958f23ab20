"""A checkpoint, as the source that packs are written from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from specchat.models import hf_compat
from specchat.models.checkpoint import Checkpoint, TensorInfo, TensorReader
from specchat.models.pack_format import DTYPE_NAMES
from specchat.models.weights import LayerLayout, WeightReader


class CheckpointLayers:
    """A checkpoint as a `pack.LayerSource`: layers under the model's own names and in its dtype, the rest as saved.

    Args:
        skeleton: the modules, which say what a layer is; left as it is.
        checkpoint: where the bytes are.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """

    def __init__(self, skeleton: hf_compat.Skeleton, checkpoint: Checkpoint) -> None:
        self._skeleton = skeleton
        self._weights = WeightReader(skeleton, checkpoint)
        self._tensors = TensorReader(checkpoint)
        self._rest = {key: checkpoint.tensors[key] for key in _rest_keys(skeleton, checkpoint)}
        self._blob = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> "CheckpointLayers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and lets the memory go."""
        self._weights.close()
        self._tensors.close()
        self._blob = torch.empty(0, dtype=torch.uint8)

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
        """Embeddings, head, norms and persistent buffers, under the checkpoint's names and in its dtypes."""
        return {key: torch.empty(info.shape, dtype=_dtype_of(info), device="meta") for key, info in self._rest.items()}

    def rest(self) -> Mapping[str, Tensor]:
        """The same, each read when asked for: all together they may be larger than two layers."""
        return _ReadWhenAsked(self._tensors, tuple(self._rest))


@dataclass(frozen=True)
class _ReadWhenAsked(Mapping[str, Tensor]):
    reader: TensorReader
    names: tuple[str, ...]

    def __getitem__(self, key: str) -> Tensor:
        return self.reader.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _rest_keys(skeleton: hf_compat.Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Checkpoint keys of all that is no layer's parameter."""
    plan = hf_compat.plan_weights(skeleton, checkpoint.tensors)
    buffers = [
        direct[name]
        for layer, direct in zip(skeleton.layers, plan.direct, strict=True)
        for name, _ in layer.named_buffers()
        if name in direct
    ]
    return [*plan.rest, *buffers]


def _dtype_of(info: TensorInfo) -> torch.dtype:
    return next(dtype for dtype, name in DTYPE_NAMES.items() if name == info.dtype)
