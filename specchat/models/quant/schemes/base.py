"""The interface of a scheme of pre-quantized checkpoints."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.chunked import Segments


class CheckpointScheme(Protocol):
    """Storage of matrices in one kind of pre-quantized checkpoint, made from config.json's quantization_config.

    `module` is the matrix's path in the checkpoint ("model.layers.0.mlp.up_proj", and for experts
    "model.layers.0.mlp.experts.3.up_proj"). The keys of its tensors are the names after the path and a dot ("qweight",
    "weight.absmax"). A scheme ignores a tensor named "bias".
    """

    @property
    def name(self) -> str:
        """Name in banner and plan, such as "gptq int4"."""

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix [rows, cols] from headers alone; None for a plain `weight` (not quantized).

        Raises:
            CorruptCheckpointError: tensors are missing or have wrong shapes; the message names the tensor.
            UnsupportedModelError: specchat does not read this variant.
        """


@runtime_checkable
class TranscodingScheme(CheckpointScheme, Protocol):
    """A scheme with formats whose segments are not all bytes of the checkpoint's tensors (`WeightFormat.verbatim`)."""

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of `format_of` (CPU) from the checkpoint's tensors (CPU, as saved).

        Raises:
            CorruptCheckpointError: the tensors' contents are invalid.
        """
