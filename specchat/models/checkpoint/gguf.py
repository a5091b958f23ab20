"""Checked headers of GGUF files: metadata, and type, shape and place of every tensor, without reading the tensors.

Nothing here imports torch, so a plan takes a fraction of a second for a file of any size.
"""

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from specchat.errors import CorruptCheckpointError, ModelNotFoundError, UnsupportedModelError
from specchat.files import open_regular
from specchat.models.checkpoint.ggml_types import BlockType, block_type, type_name
from specchat.models.checkpoint.json_file import LFS_MAGIC, REDOWNLOAD, fail_on_lfs_pointer, fail_to_read, read_json

# The list of GGUF files in the folder that stands for them.
FILE_LIST = "gguf_files.json"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_KEY_BYTES = 8 + 4 + 1  # length of the name, type, value
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of the name, dimensions, type, offset
_MOST_DIMENSIONS = 4  # ggml's own limit
_MOST_LEVELS = 4  # arrays in arrays; no known file has more than one
_MOST_ALIGNMENT = 1 << 20
# Kinds of files that are no models of their own, by `general.type`, or by architecture.
_NOT_MODELS = {
    "adapter": "a LoRA adapter, not a model",
    "mmproj": "the image or audio part of a multimodal model, not its language model",
    "imatrix": "an importance matrix, not a model",
}
_PARTS = {
    "clip": (_NOT_MODELS["mmproj"], "give the GGUF file of the language model"),
}
# Names of files that lie beside a model and are none: its image part, importances, and heads that draft for it. A name
# with MTP in it is mostly that of a whole model that has kept its MTP layer, so only two forms of it are such heads.
_OTHERS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_HEADS = re.compile(r"(?:^|[-_.])(?:eagle-?3(?:\.1)?|dflash2?|dspark)[-_.]", re.IGNORECASE)
_MTP_ALONE = re.compile(r"^mtp[-_]|[-_.]mtp[-_]only(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class GgufTensor:
    """The header entry of one tensor.

    Attributes:
        name: name in the file, such as "blk.0.attn_q.weight".
        shape: number of values per dimension in torch's order, rows first; () for a scalar.
        type: type of the blocks, which lie one after another along the last dimension.
        file: file that holds the tensor.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, or a set of split ones, whose headers have been checked.

    Attributes:
        files: all files of the set, in order.
        metadata: keys and values of the first file.
        tensors: header entries by name.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))


def split_files(file: Path) -> list[Path]:
    """Return all files of the set that a file belongs to, in order; the files need not exist."""
    match = _SPLIT_NAME.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    return [file.with_name(f"{match['stem']}-{i:05}-of-{count:05}{file.suffix}") for i in range(1, count + 1)]


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files in a folder that are models or first files of one, sorted by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    return [path for path in files if split_files(path)[0].name == path.name and not lies_beside(path.name)]


def lies_beside(name: str) -> bool:
    """Return whether a file is not a model but lies beside one, by its name without folders."""
    return drafts(name) or _OTHERS.search(name) is not None


def drafts(name: str) -> bool:
    """Return whether a file is a head that drafts for a model, by its name without folders."""
    return is_mtp_alone(name) or _HEADS.search(name) is not None


def is_mtp_alone(name: str) -> bool:
    """Return whether a file holds the MTP layer of a model without the model, by its name without folders."""
    return _MTP_ALONE.search(name) is not None


def total_bytes(file: Path) -> int:
    """Return the bytes of a GGUF file and the other files of its set."""
    return sum(each.stat().st_size for each in split_files(file) if each.is_file())


def listed_files(folder: Path) -> list[Path] | None:
    """Return the GGUF files that a folder stands for; None for a folder with weights of its own."""
    if not (folder / FILE_LIST).is_file():
        return None
    files = read_json(folder / FILE_LIST).get("files")
    if not isinstance(files, list) or not files:
        raise CorruptCheckpointError(f"{folder / FILE_LIST} is damaged", hint=f"delete {folder}")
    return [Path(str(file)) for file in files]


def open_gguf(file: Path) -> GgufFile:
    """Read and check the headers of a GGUF file and of the other files of its set, but no tensors.

    Args:
        file: GGUF file; any file of a split set names the set.

    Raises:
        ModelNotFoundError: a missing file.
        CorruptCheckpointError: an invalid or truncated header, or a file of the wrong size.
        UnsupportedModelError: a file that is no model, big-endian, or has tensors of a type that specchat does not
            read.
        ModelError: the file cannot be read.
    """
    files = split_files(file)
    headers = [_header_of(each, is_first=each == file) for each in files]
    metadata = headers[0].metadata
    _check_kind(files[0], metadata)
    count = metadata.get("split.count", len(files))
    if count not in (0, len(files)):
        raise CorruptCheckpointError(
            f"{files[0]} is one of {count} files of a model, but its name does not say so",
            hint="give the files their original names, such as x-00001-of-00003.gguf",
        )
    tensors = _merge(files, headers)
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise CorruptCheckpointError(f"{files[0]} has {len(tensors)} of {wanted} tensors", hint=REDOWNLOAD)
    return GgufFile(tuple(files), metadata, MappingProxyType(tensors))


class Content(Protocol):
    """Content of a file, read from its begin; fewer bytes than wanted are the last ones."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""

    def seek(self, offset: int, /) -> int:
        """Go to an offset from the begin, and return it."""


def check_header(file: Path, stream: Content, file_bytes: int) -> None:
    """Check a header that comes from somewhere else, and read no more of it than the header.

    Args:
        file: name for messages.
        stream: content of the file, from its begin.
        file_bytes: size of the file.

    Raises:
        CorruptCheckpointError: an invalid header, or a file of the wrong size.
        UnsupportedModelError: a file that is big-endian, or has tensors of a type that specchat does not read.
    """
    _Cursor(file, stream, file_bytes).header()


def read_bytes(tensor: GgufTensor) -> bytes:
    """Read a small tensor.

    Raises:
        CorruptCheckpointError: the file was truncated after its header was read.
        ModelError: the file cannot be read.
    """
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor.nbytes)
    except OSError as exc:
        fail_to_read(tensor.file, exc)
    if len(data) != tensor.nbytes:
        _fail(tensor.file, "it is truncated")
    return data


@dataclass(frozen=True)
class _Header:
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]


def _check_kind(file: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse files that are no models of their own."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in _NOT_MODELS:
        raise UnsupportedModelError(f"{file} is {_NOT_MODELS[kind]}", hint="give the GGUF file of the language model")
    if isinstance(architecture, str) and architecture in _PARTS:
        what, hint = _PARTS[architecture]
        raise UnsupportedModelError(f"{file} is {what}", hint=hint)
    if not isinstance(architecture, str):
        _fail(file, "it names no architecture")


def _merge(files: Iterable[Path], headers: Iterable[_Header]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for file, header in zip(files, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in tensors:
                _fail(file, f"tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
    return tensors


def _header_of(file: Path, *, is_first: bool) -> _Header:
    """Read one header; headers of unchanged files are read once per process."""
    try:
        stat = file.stat()
    except FileNotFoundError as exc:
        if is_first:
            raise ModelNotFoundError(f"{file} does not exist", hint="check the path of the GGUF file") from exc
        raise CorruptCheckpointError(f"{file} is missing", hint="download the missing files of the set") from exc
    except OSError as exc:
        fail_to_read(file, exc)
    return _read_header(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _read_header(file: Path, file_bytes: int, _: int) -> _Header:
    try:
        with open_regular(file) as stream:
            return _Cursor(file, stream, file_bytes).header()
    except OSError as exc:
        fail_to_read(file, exc)


class _Cursor:
    """A position in a header; every read is checked against the size of the file before memory is allocated."""

    def __init__(self, file: Path, stream: Content, file_bytes: int) -> None:
        self._file = file
        self._stream = stream
        self._left = file_bytes
        self._file_bytes = file_bytes

    def header(self) -> _Header:
        start = self._stream.read(len(LFS_MAGIC))
        if start == LFS_MAGIC:
            fail_on_lfs_pointer(self._file)
        if start[: len(_MAGIC)] != _MAGIC:
            _fail(self._file, "the file does not begin with GGUF")
        self._stream.seek(0)
        self._take(len(_MAGIC))
        self._check_version(self._number("I"))
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        self._check_count("tensors", num_tensors, _LEAST_TENSOR_BYTES)
        self._check_count("keys", num_keys, _LEAST_KEY_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text()
            if key in metadata:
                _fail(self._file, f"key {key!r} occurs twice")
            metadata[key] = self._value(self._number("I"))
        table = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT:
            _fail(self._file, f"the alignment is {alignment!r}")
        start_of_data = -(-(self._file_bytes - self._left) // alignment) * alignment
        tensors = tuple(self._placed(entry, start_of_data) for entry in table)
        _check_layout(self._file, tensors, self._file_bytes)
        return _Header(MappingProxyType(metadata), tensors)

    def _check_version(self, version: int) -> None:
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(
                f"{self._file} is big-endian, which specchat does not read", hint="download the little-endian file"
            )
        raise UnsupportedModelError(
            f"{self._file} is GGUF version {version}; specchat reads versions 2 and 3", hint="download a newer file"
        )

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count * least_bytes > self._left:
            _fail(self._file, f"{count} {what} do not fit into the file")

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._left:
            _fail(self._file, f"it is truncated at byte {self._file_bytes - self._left}")
        data = self._stream.read(num_bytes)
        if len(data) != num_bytes:  # the file shrank while it was read
            _fail(self._file, "it is truncated")
        self._left -= num_bytes
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _value(self, kind: int, level: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY or level >= _MOST_LEVELS:
            _fail(self._file, f"a key has a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            self._check_count("values of an array", count, struct.calcsize(f"<{_SCALARS[inner]}"))
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        self._check_count("values of an array", count, 8)
        return [self._value(inner, level + 1) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, type and offset of a tensor."""
        name, num_dimensions = self._text(), self._number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            _fail(self._file, f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _placed(self, entry: tuple[str, tuple[int, ...], int, int], start_of_data: int) -> GgufTensor:
        name, shape, number, offset = entry
        kind = block_type(number, name)
        if kind is None:
            raise UnsupportedModelError(
                f"tensor {name!r} in {self._file} is stored as {type_name(number)}, which specchat does not read",
                hint="choose another quantization of the model, such as Q4_K_M",
            )
        cols = shape[-1] if shape else 1
        if cols % kind.numbers:
            _fail(self._file, f"tensor {name!r} has rows of {cols} values, which {kind.name} cannot store")
        nbytes = math.prod(shape) // kind.numbers * kind.nbytes
        return GgufTensor(name, shape, kind, self._file, start_of_data + offset, nbytes)


def _check_layout(file: Path, tensors: Iterable[GgufTensor], file_bytes: int) -> None:
    """Check that the tensors do not overlap and lie within the file."""
    end = 0
    for tensor in sorted(tensors, key=lambda each: (each.offset, each.nbytes)):
        if tensor.offset < end:
            _fail(file, f"tensor {tensor.name!r} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
        if end > file_bytes:
            raise CorruptCheckpointError(
                f"{file} is truncated: expected at least {end} bytes, found {file_bytes}", hint=REDOWNLOAD
            )


def _fail(file: Path, why: str) -> NoReturn:
    raise CorruptCheckpointError(f"{file} is not a valid GGUF file: {why}", hint=REDOWNLOAD)
