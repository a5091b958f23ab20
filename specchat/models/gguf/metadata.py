"""Typed access to the metadata of a GGUF file."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.gguf import GgufFile, GgufTensor
from specchat.models.checkpoint.json_file import REDOWNLOAD

_LARGEST = 3.4e38  # of float32


@dataclass(frozen=True)
class Metadata:
    """The values of a file, checked when they are read; `key` is written without the architecture's name.

    Attributes:
        file: GGUF file.
    """

    file: GgufFile

    @property
    def values(self) -> Mapping[str, Any]:
        """All values by full key."""
        return self.file.metadata

    @property
    def is_head_alone(self) -> bool:
        """Whether the file holds an MTP layer without the decoder's layers."""
        return bool(self.integer("nextn_predict_layers", 0)) and not any(
            name.startswith("blk.0.") for name in self.file.tensors
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers; layers that only predict further tokens come after them."""
        return self.integer("block_count") - self.integer("nextn_predict_layers", 0)

    def in_first_layer(self, name: str) -> GgufTensor | None:
        """Return a tensor of the first layer in the file, by its name in the layer; None if the layer has none."""
        first = self.num_layers if self.is_head_alone else 0
        return self.file.tensors.get(f"blk.{first}.{name}")

    def has(self, key: str) -> bool:
        """Return whether the architecture has a value."""
        return self._full(key) in self.values

    def integer(self, key: str, default: int | None = None, *, skips_zeros: bool = False) -> int:
        """Return a whole number; a list of equal numbers, one per layer, counts as one number.

        Args:
            key: name of the value.
            default: number for a missing value; None requires it.
            skips_zeros: whether zeros in a list do not count, because these layers have nothing of the kind.
        """
        value = self.values.get(self._full(key), default)
        if skips_zeros and isinstance(value, list):
            value = [each for each in value if each != 0]
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            self.refuse(f"has layers with different values of {self._full(key)}")
        if type(value) is not int or value < 0:
            self.fail(key, value, "a whole number")
        return value

    def each(self, key: str, count: int, default: int | None = None) -> list[int]:
        """Return a whole number for each of `count` layers; one number in the file counts for all."""
        value = self.values.get(self._full(key), default)
        numbers = value if isinstance(value, list) else [value] * count
        if len(numbers) < count or any(type(number) is not int or number < 0 for number in numbers):
            self.fail(key, value, "a whole number for each layer")
        return numbers[:count]

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.values.get(self._full(key), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            self.fail(key, value, "a finite number")
        return _shortest(float(value))

    def flag(self, key: str) -> bool:
        """Return a flag; False if it is missing."""
        value = self.values.get(self._full(key), False)
        if not isinstance(value, bool):
            self.fail(key, value, "a flag")
        return value

    def flags(self, key: str) -> list[bool] | None:
        """Return a list of flags, one per layer; None if the key is missing or is no list."""
        value = self.values.get(self._full(key))
        return [bool(each) for each in value] if isinstance(value, list) else None

    def integers(self, key: str) -> list[int] | None:
        """Return a list of whole numbers; None if the key is missing."""
        value = self.values.get(self._full(key))
        if value is not None and (not isinstance(value, list) or any(type(each) is not int for each in value)):
            self.fail(key, value, "a list of whole numbers")
        return value

    def numbers(self, key: str) -> list[float] | None:
        """Return a list of numbers, which may be infinite; None if the key is missing."""
        value = self.values.get(self._full(key))
        if value is not None and (not isinstance(value, list) or any(type(each) is not float for each in value)):
            self.fail(key, value, "a list of numbers")
        return value

    def text(self, key: str) -> str | None:
        """Return a text; None if it is missing."""
        value = self.values.get(self._full(key))
        return value if isinstance(value, str) else None

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token, such as "eos"; None if the file names none."""
        value = self.values.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def fail(self, key: str, value: object, wanted: str) -> NoReturn:
        """Report an invalid value.

        Raises:
            CorruptCheckpointError: always.
        """
        raise CorruptCheckpointError(
            f"{self.file.files[0]}: {self._full(key)} is {value!r}, not {wanted}", hint=REDOWNLOAD
        )

    def refuse(self, what: str) -> NoReturn:
        """Report a variant that specchat does not read; `what` follows the name of the file.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"{self.file.files[0]} {what}, which specchat does not read from GGUF files",
            hint="use the model in safetensors",
        )

    def _full(self, key: str) -> str:
        return f"{self.file.architecture}.{key}"


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: files store 1e-5 as 9.999999747378752e-06."""
    if struct.unpack("<f", struct.pack("<f", value))[0] != value:
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next(each for each in candidates if struct.pack("<f", each) == struct.pack("<f", value))
