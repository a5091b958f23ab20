"""What all kinds of quantized checkpoints are checked for: values of config.json, and shapes and dtypes of tensors."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.safetensors import TensorInfo

FLOATS = ("F16", "BF16", "F32")  # of scales
_PLAIN = (*FLOATS, "F64")  # of matrices that are not quantized
_HINT = "config.json and the weights do not belong together, or are incomplete: download both again"


class SchemeSettings:
    """An object of config.json whose values are checked as they are asked for.

    Args:
        values: the object.
        where: its path, for messages, such as "quantization_config".
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number; without a default it has to be there."""
        value = self._get(name, default)
        if type(value) is not int:
            self.fail(name, value, "a whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self._get(name, default)
        if type(value) is not bool:
            self.fail(name, value, "true or false")
        return value

    def is_flag(self, name: str) -> bool:
        """Whether the value is true or false, where it may also be text."""
        return isinstance(self._values.get(name), bool)

    def text(self, name: str, default: str) -> str:
        """A word, in lower case."""
        value = self._get(name, default)
        if not isinstance(value, str):
            self.fail(name, value, "text")
        return value.lower()

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of texts; null and nothing are the empty list."""
        value = self._get(name, ())
        if not isinstance(value, list | tuple) or any(not isinstance(each, str) for each in value):
            self.fail(name, value, "a list of names")
        return tuple(value)

    def integers(self, name: str, count: int) -> tuple[int, ...] | None:
        """A list of `count` whole numbers above 0, or None for null and nothing."""
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
        """The objects in an object, by name; null and nothing are none."""
        value = self._get(name, {})
        if not isinstance(value, dict) or any(not isinstance(each, dict) for each in value.values()):
            self.fail(name, value, "an object of objects")
        return {key: SchemeSettings(each, f"{self._where}.{name}.{key}") for key, each in value.items()}

    def child(self, name: str) -> "SchemeSettings | None":
        """An object, or None for null and nothing."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self.fail(name, value, "an object")
        return None if value is None else SchemeSettings(value, f"{self._where}.{name}")

    def check_pattern(self, name: str, pattern: str) -> str:
        """The pattern, a part of a value, if it is a regular expression."""
        try:
            re.compile(pattern)
        except re.error:
            self.fail(name, pattern, "a regular expression")
        return pattern

    def group_size(self) -> int | None:
        """`group_size`: columns that share a scale; None where the file has -1, which is a whole row."""
        size = self.integer("group_size", -1)
        if size == 0 or size < -1:
            self.fail("group_size", size, "a number of columns, or -1")
        return None if size == -1 else size

    def has(self, name: str) -> bool:
        """Whether there is such a value, and not null."""
        return self._values.get(name) is not None

    def fail(self, name: str, value: object, wanted: str) -> NoReturn:
        """Says what is wrong with a value.

        Raises:
            CorruptCheckpointError: always.
        """
        raise CorruptCheckpointError(f"config.json: {self._where}.{name} is {value!r}, not {wanted}", hint=_HINT)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value


def refuse(what: str) -> NoReturn:
    """Says that a kind of quantization cannot be read.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"quantized with {what}, which specchat does not read",
        hint="it reads bitsandbytes, GPTQ and AWQ (4 bits; GPTQ also 8), compressed-tensors int4, int8 and FP8, and "
        "FP8 in blocks; or take the original and --quant int4",
    )


def expect(
    module: str,
    tensors: Mapping[str, TensorInfo],
    name: str,
    dtypes: Sequence[str],
    *shapes: tuple[int, ...],
) -> TensorInfo:
    """The header of a module's tensor, which must have one of the dtypes and shapes.

    Raises:
        CorruptCheckpointError: it is missing or another.
    """
    info = tensors.get(name)
    if info is None:
        raise CorruptCheckpointError(f"tensor '{module}.{name}' is missing: its matrix is quantized", hint=_HINT)
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        wanted = f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}".rstrip()
        raise CorruptCheckpointError(
            f"tensor '{info.key}' is {info.dtype} {list(info.shape)}, the configuration says {wanted}", hint=_HINT
        )
    return info


def is_plain(module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a matrix is stored unquantized, as one `weight`.

    Raises:
        CorruptCheckpointError: it has another shape.
    """
    info = tensors.get("weight")
    if info is None or info.dtype not in _PLAIN:
        return False
    if info.shape != shape:
        expect(module, tensors, "weight", (info.dtype,), shape)
    return True


def fail_contents(module: str, name: str, why: str, hint: str = _HINT) -> NoReturn:
    """Says that a tensor's numbers cannot be right.

    Raises:
        CorruptCheckpointError: always.
    """
    raise CorruptCheckpointError(f"tensor '{module}.{name}' {why}", hint=hint)


def words(bits: int, count: int) -> int:
    """32-bit words that `count` packed numbers take."""
    return math.ceil(count * bits / 32)


def fill(segment: Tensor, numbers: Tensor) -> None:
    """Copies numbers of as many elements into a segment, whatever the two shapes."""
    segment.copy_(numbers.reshape(segment.shape))
