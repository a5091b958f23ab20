"""The registry of checkpoint schemes, chosen by the checkpoint's config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from specchat.models.quant.schemes.awq import AwqScheme
from specchat.models.quant.schemes.base import CheckpointScheme
from specchat.models.quant.schemes.bnb import BnbScheme
from specchat.models.quant.schemes.compressed_tensors import CompressedScheme
from specchat.models.quant.schemes.fp8 import BlockFp8Scheme
from specchat.models.quant.schemes.gptq import GptqScheme
from specchat.models.quant.schemes.settings import SchemeSettings, refuse

_KEYS = ("quantization_config", "compression_config")  # the second is the older name that compressed-tensors used
_SCHEMES: dict[str, Callable[[SchemeSettings], CheckpointScheme]] = {
    "gptq": GptqScheme.of,
    "awq": AwqScheme.of,
    "bitsandbytes": BnbScheme.of,
    "compressed-tensors": CompressedScheme.of,
    "fp8": BlockFp8Scheme.of,
}


def scheme_of(config: Mapping[str, Any]) -> CheckpointScheme | None:
    """Return the scheme of a checkpoint's matrices; None if it is not quantized.

    Args:
        config: object in config.json.

    Raises:
        UnsupportedModelError: specchat does not read this scheme or this variant.
        CorruptCheckpointError: the configuration contradicts itself or has invalid values.
    """
    root = SchemeSettings(config, "")
    for part in (root, root.child("text_config")):  # multimodal models describe it at the top, or with their text half
        found = [part.child(key) for key in _KEYS] if part is not None else []
        for settings in found:
            if settings is not None:
                return _scheme(settings)
    return None


def _scheme(settings: SchemeSettings) -> CheckpointScheme:
    # bitsandbytes' files of 2023 have no quant_method
    old = settings.has("load_in_4bit") or settings.has("load_in_8bit")
    method = settings.text("quant_method", "bitsandbytes" if old else "an unnamed method")
    if method not in _SCHEMES:
        refuse(method)
    return _SCHEMES[method](settings)
