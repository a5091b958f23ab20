"""Which kind of quantization a checkpoint has, by its config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from specchat.models.quant.schemes.awq import AwqScheme
from specchat.models.quant.schemes.base import CheckpointScheme
from specchat.models.quant.schemes.bnb import BnbScheme
from specchat.models.quant.schemes.compressed_tensors import CompressedScheme
from specchat.models.quant.schemes.fp8 import BlockFp8Scheme
from specchat.models.quant.schemes.gptq import GptqScheme
from specchat.models.quant.schemes.settings import SchemeSettings, refuse

_KEYS = ("quantization_config", "compression_config")  # the second is compressed-tensors' older name for it
_SCHEMES: dict[str, Callable[[SchemeSettings], CheckpointScheme]] = {
    "gptq": GptqScheme.of,
    "awq": AwqScheme.of,
    "bitsandbytes": BnbScheme.of,
    "compressed-tensors": CompressedScheme.of,
    "fp8": BlockFp8Scheme.of,
}


def scheme_of(config: Mapping[str, Any]) -> CheckpointScheme | None:
    """How a checkpoint's matrices are stored; None if it is not quantized.

    Args:
        config: the object in config.json.

    Raises:
        UnsupportedModelError: a kind, or a variant of one, that specchat does not read.
        CorruptCheckpointError: the configuration contradicts itself or has values that cannot be.
    """
    root = SchemeSettings(config, "")
    for key in _KEYS:
        settings = root.child(key)
        if settings is not None:
            return _scheme(settings)
    return None


def _scheme(settings: SchemeSettings) -> CheckpointScheme:
    # files of 2023 have no quant_method if bitsandbytes made them
    old = settings.has("load_in_4bit") or settings.has("load_in_8bit")
    method = settings.text("quant_method", "bitsandbytes" if old else "an unnamed method")
    if method not in _SCHEMES:
        refuse(method)
    return _SCHEMES[method](settings)
