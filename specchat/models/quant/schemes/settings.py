"""Checks that all schemes share: values of config.json, and shapes and dtypes of tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.fp8 import has_nan

FLOATS = ("F16", "BF16", "F32")  # dtypes of scales
_PLAIN = (*FLOATS, "F64")  # dtypes of matrices that are not quantized
_HINT = "config.json and the weights do not match or are incomplete; download both again"


class SchemeSettings:
    """An object of config.json whose values are checked when they are read.

    Args:
        values: object as parsed from JSON.
        where: path of the object, for messages, such as "quantization_config".
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer, which is required if there is no default."""
        value = self._get(name, default)
        if type(value) is not int:
            self.fail(name, value, "a whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false; null gives the default."""
        value = self._get(name, default)
        if type(value) is not bool:
            self.fail(name, value, "true or false")
        return value

    def is_flag(self, name: str) -> bool:
        """Return whether a value that may also be text is true or false."""
        return isinstance(self._values.get(name), bool)

    def text(self, name: str, default: str) -> str:
        """Return a text in lower case."""
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, value, "text")
        return value.lower()

    def strings(self, name: str) -> tuple[str, ...]:
        """Return a list of texts; empty if the value is null or missing."""
        value = self._get(name, ())
        if not isinstance(value, list | tuple) or any(not isinstance(each, str) for each in value):
            self.fail(name, value, "a list of names")
        return tuple(value)

    def integers(self, name: str, count: int) -> tuple[int, ...] | None:
        """Return a list of `count` integers above 0; None if the value is null or missing."""
        value = self._get(name, None)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(type(each) is not int or each < 1 for each in value)
        ):
            self.fail(name, value, f"{count} whole numbers")
        return tuple(value)

    def objects(self, name: str) -> dict[str, "SchemeSettings"]:
        """Return the objects in an object, by name; empty if the value is null or missing."""
        value = self._get(name, {})
        if not isinstance(value, dict) or any(not isinstance(each, dict) for each in value.values()):
            self.fail(name, value, "an object of objects")
        return {key: SchemeSettings(each, f"{self._where}.{name}.{key}") for key, each in value.items()}

    def child(self, name: str) -> "SchemeSettings | None":
        """Return an object; None if the value is null or missing."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self.fail(name, value, "an object")
        return None if value is None else SchemeSettings(value, f"{self._where}.{name}")

    def check_pattern(self, name: str, pattern: str) -> str:
        """Return a pattern, after checking that it is a regular expression."""
        try:
            re.compile(pattern)
        except re.error:
            self.fail(name, pattern, "a regular expression")
        return pattern

    def group_size(self) -> int | None:
        """Return `group_size`, the columns that share a scale; None for a whole row (-1 in the file)."""
        size = self.integer("group_size", -1)
        if size == 0 or size < -1:
            self.fail("group_size", size, "a number of columns, or -1")
        return None if size == -1 else size

    def has(self, name: str) -> bool:
        """Return whether a value exists and is not null."""
        return self._values.get(name) is not None

    def fail(self, name: str, value: object, wanted: str) -> NoReturn:
        """Report an invalid value.

        Raises:
            CorruptCheckpointError: always.
        """
        raise CorruptCheckpointError(f"config.json: {self._where}.{name} is {value!r}, not {wanted}", hint=_HINT)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value


def refuse(what: str) -> NoReturn:
    """Report a quantization that specchat cannot read.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"quantized with {what}, which specchat does not read",
        hint="use bitsandbytes, GPTQ or AWQ (4 bits; GPTQ also 8), compressed-tensors, block FP8, MXFP4 or NVFP4; "
        "or use the original model with --quant int4",
    )


def expect(
    module: str,
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: Sequence[str],
    *shapes: tuple[int, ...],
) -> TensorInfo:
    """Return the header of a module's tensor after checking its dtype and shape.

    Raises:
        CorruptCheckpointError: the tensor is missing, or has another dtype or shape.
    """
    info = tensors.get(name)
    if info is None:
        raise CorruptCheckpointError(f"tensor '{module}.{name}' of a quantized matrix is missing", hint=_HINT)
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}".rstrip()
        raise CorruptCheckpointError(
            f"tensor '{info.key}' is {info.dtype} {list(info.shape)}, but the configuration says {wanted}", hint=_HINT
        )
    return info


def is_plain(module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether a matrix is stored unquantized, as one `weight`.

    Raises:
        CorruptCheckpointError: the `weight` has another shape.
    """
    info = tensors.get("weight")
    if info is None or info.dtype not in _PLAIN:
        return False
    if info.shape != shape:
        expect(module, tensors, "weight", (info.dtype,), shape)
    return True


def fail_contents(module: str, name: str, why: str, hint: str = _HINT) -> NoReturn:
    """Report invalid contents of a tensor.

    Raises:
        CorruptCheckpointError: always.
    """
    raise CorruptCheckpointError(f"tensor '{module}.{name}' {why}", hint=hint)


def check_fp8(module: str, codes: Tensor) -> None:
    """Check that no value of a module's `weight`, float8_e4m3fn [rows, cols], is NaN: valid checkpoints have none.

    Raises:
        CorruptCheckpointError: a value is NaN.
    """
    if has_nan(codes):
        fail_contents(module, "weight", "contains NaN")


def words(bits: int, count: int) -> int:
    """Return the number of 32-bit words for `count` packed values."""
    return math.ceil(count * bits / 32)


def fill(segment: Tensor, numbers: Tensor) -> None:
    """Copy values into a segment with equally many elements, of any shape."""
    segment.copy_(numbers.reshape(segment.shape))
