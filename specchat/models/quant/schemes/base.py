"""What a scheme of pre-quantized checkpoints is."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.chunked import Segments


class CheckpointScheme(Protocol):
    """How one kind of pre-quantized checkpoint stores its matrices; made from config.json's quantization_config.

    `module` is the matrix's path in the checkpoint ("model.layers.0.mlp.up_proj", and for experts
    "model.layers.0.mlp.experts.3.up_proj"); its tensors are given by what follows the path and a dot ("qweight",
    "weight.absmax"). A tensor named "bias" is none of the scheme's business.
    """

    @property
    def name(self) -> str:
        """What banner and plan say, such as "gptq int4"."""

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """The format of one matrix [rows, cols] from headers alone; None where it is a plain `weight` (skipped).

        Raises:
            CorruptCheckpointError: tensors are missing or have shapes that cannot be; the tensor is named.
            UnsupportedModelError: a variant that specchat does not read.
        """

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fills the segments (CPU, as `format_of` says) from the checkpoint's tensors (CPU, as saved).

        Raises:
            CorruptCheckpointError: the tensors' contents cannot be what was saved.
        """
