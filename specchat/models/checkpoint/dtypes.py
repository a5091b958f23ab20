"""Dtypes of tensors: their names in safetensors, torch and specchat, and the bytes per value.

Only the functions that return torch's dtypes import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, PLAIN_TYPES
from specchat.records.model import DTYPE_BYTES, Dtype

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredDtype:
    """A dtype that specchat reads.

    Attributes:
        torch_name: name in torch and in config.json.
        nbytes: bytes per value.
        short: specchat's name, for a dtype that passes can compute in.
    """

    torch_name: str
    nbytes: int
    short: Dtype | None = None


def _computed(torch_name: str, short: Dtype) -> StoredDtype:
    return StoredDtype(torch_name, DTYPE_BYTES[short], short)


# Keys are safetensors' names.
STORED_DTYPES: Mapping[str, StoredDtype] = {
    "F64": StoredDtype("float64", 8),
    "F32": _computed("float32", "fp32"),
    "F16": _computed("float16", "fp16"),
    "BF16": _computed("bfloat16", "bf16"),
    "F8_E4M3": StoredDtype("float8_e4m3fn", 1),
    "F8_E5M2": StoredDtype("float8_e5m2", 1),
    "F8_E8M0": StoredDtype("float8_e8m0fnu", 1),  # scales that are powers of two
    "I64": StoredDtype("int64", 8),
    "I32": StoredDtype("int32", 4),
    "I16": StoredDtype("int16", 2),
    "I8": StoredDtype("int8", 1),
    "U8": StoredDtype("uint8", 1),
    "BOOL": StoredDtype("bool", 1),
}
# Valid in safetensors, but no model that specchat runs stores its weights in these.
UNREAD_DTYPES = frozenset({"U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

_COMPUTED = {stored.short: stored for stored in STORED_DTYPES.values() if stored.short is not None}
_SHORT = {stored.torch_name: short for short, stored in _COMPUTED.items()}


def torch_name(dtype: Dtype) -> str:
    """Return torch's name of a compute dtype, which config.json uses too."""
    return _COMPUTED[dtype].torch_name


def short_name(name: str) -> Dtype | None:
    """Return specchat's name of a dtype, given torch's; None for a dtype that passes cannot compute in."""
    return _SHORT.get(name.removeprefix("torch."))


def torch_dtype(dtype: Dtype) -> "torch.dtype":
    """Return torch's dtype for a compute dtype."""
    return _in_torch(torch_name(dtype))


def stored_torch_dtype(name: str) -> "torch.dtype":
    """Return torch's dtype, given safetensors' name, or the name of a GGUF block type, whose blocks are bytes."""
    is_packed = name in BLOCK_TYPES and name not in PLAIN_TYPES
    return _in_torch("uint8" if is_packed else STORED_DTYPES[name].torch_name)


def stored_name(dtype: "torch.dtype") -> str:
    """Return safetensors' name of a dtype."""
    return next(name for name, stored in STORED_DTYPES.items() if f"torch.{stored.torch_name}" == str(dtype))


@cache
def _in_torch(name: str) -> "torch.dtype":
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
