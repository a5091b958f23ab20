"""Safetensors checkpoints without loading them: where each tensor lies, with every header checked.

Headers need no torch, so a plan costs milliseconds for a checkpoint of any size. Nothing here opens a pickle.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotFoundError,
    PickledCheckpointError,
    UnsupportedModelError,
)
from specchat.models.checkpoint.dtypes import STORED_DTYPES, UNREAD_DTYPES
from specchat.models.checkpoint.json_file import (
    LFS_MAGIC,
    REDOWNLOAD,
    fail_on_lfs_pointer,
    fail_to_read,
    parse_object,
    read_json,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MISTRAL_PREFIX = "consolidated"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SHARD_NAME = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,6})\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes are.

    Attributes:
        key: its name in the checkpoint.
        dtype: safetensors' name, such as BF16.
        shape: as saved; () for a single number.
        file: the shard.
        offset: first byte, counted from the start of the file; any alignment.
        nbytes: length in bytes.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files whose headers have been checked.

    Attributes:
        folder: as given.
        tensors: by key, in the order of files and offsets.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every header read and checked; no tensor is.

    Args:
        folder: has model.safetensors, or model.safetensors.index.json and its shards, or any *.safetensors files.

    Raises:
        ModelNotFoundError: no such folder, or no weights in it.
        PickledCheckpointError: weights only as pickles.
        CorruptCheckpointError: an index, header or file size that cannot be what was saved.
        UnsupportedModelError: a tensor in a number format that specchat does not read.
    """
    names, weight_map = _shard_names(folder)
    tensors = _merge(folder / name for name in names)
    _check_index(folder, weight_map, tensors)
    return Checkpoint(folder, MappingProxyType(tensors))


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_checkpoint` would read; those that an index names may be missing.

    Raises:
        ModelNotFoundError: no such folder, or no weights in it.
        PickledCheckpointError: weights only as pickles.
        CorruptCheckpointError: an unreadable index, or shards missing by their numbering.
    """
    return [folder / name for name in _shard_names(folder)[0]]


def _shard_names(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names, and key -> file name where an index says so (else empty)."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder", hint="give the folder that holds config.json")
    # transformers prefers the single file too, so both read the same weights where a folder has both.
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE], {}
    if (folder / INDEX_FILE).exists():
        weight_map = _read_weight_map(folder / INDEX_FILE)
        return sorted(set(weight_map.values())), weight_map
    return _names_without_index(folder), {}


def _read_weight_map(index: Path) -> dict[str, str]:
    """Key -> file name, as the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index} has no weight_map", hint=REDOWNLOAD)
    for key, name in weight_map.items():
        # A plain file name: an index must not reach outside its folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{index} puts {key!r} into {name!r}, which is no shard", hint=REDOWNLOAD)
    return weight_map


def _names_without_index(folder: Path) -> list[str]:
    """All *.safetensors files of a folder that has no index, sorted."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    # Mistral's own layout repeats the weights under other keys.
    names = [name for name in names if not name.startswith(MISTRAL_PREFIX)] or names
    if names:
        _check_numbering(folder, names)
        return names
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise PickledCheckpointError(
            f"{folder} has its weights only as pickles ({pickles[0]}), which may run code when opened",
            hint="load it in transformers where you trust it, then model.save_pretrained(FOLDER) writes safetensors",
        )
    raise ModelNotFoundError(f"{folder} has no *.safetensors files", hint="specchat reads safetensors checkpoints only")


def _check_numbering(folder: Path, names: list[str]) -> None:
    """Names such as model-00001-of-00003.safetensors say how many there should be."""
    matches = [match for name in names if (match := _SHARD_NAME.fullmatch(name))]
    for match in matches:
        found = sum((other["stem"], other["count"]) == (match["stem"], match["count"]) for other in matches)
        if found != int(match["count"]):
            raise CorruptCheckpointError(
                f"{folder} has {found} of the {int(match['count'])} shards that {match[0]} counts",
                hint="download the missing shards",
            )


def _merge(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(file):
            if info.key in tensors:
                raise CorruptCheckpointError(
                    f"tensor {info.key!r} is in {tensors[info.key].file.name} and in {file}",
                    hint="the folder mixes two checkpoints: keep one of them",
                )
            tensors[info.key] = info
    return tensors


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].file.name != name:
            raise CorruptCheckpointError(
                f"{folder / name} lacks tensor {key!r}, which the index puts there", REDOWNLOAD
            )


def _read_header(file: Path) -> list[TensorInfo]:
    """What one safetensors file holds, by ascending offset."""
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            start = stream.read(len(LFS_MAGIC))
            if start == LFS_MAGIC:
                fail_on_lfs_pointer(file)
            header_bytes = _header_bytes(file, start, file_bytes)
            stream.seek(_LENGTH_BYTES)
            raw = stream.read(header_bytes)
    except FileNotFoundError as exc:
        raise CorruptCheckpointError(f"shard {file} is missing", hint="download the missing shards") from exc
    except OSError as exc:
        fail_to_read(file, exc)
    data_start = _LENGTH_BYTES + header_bytes
    entries = parse_object(raw, f"the header of {file}")
    infos = [_parse_entry(file, key, entry, data_start) for key, entry in entries.items() if key != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(file, infos, data_start, file_bytes)
    return infos


def _header_bytes(file: Path, start: bytes, file_bytes: int) -> int:
    """Length of the JSON header, in bytes, from the first bytes of the file."""
    if file_bytes < _LENGTH_BYTES:
        fail_truncated(file, _LENGTH_BYTES, file_bytes)
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        _fail_on_header(file, f"its length of {header_bytes} bytes is beyond the format's limit")
    if _LENGTH_BYTES + header_bytes > file_bytes:
        fail_truncated(file, _LENGTH_BYTES + header_bytes, file_bytes)
    return header_bytes


def _parse_entry(file: Path, key: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _fail_on_header(file, f"tensor {key!r} is not described by an object")
    dtype = str(entry.get("dtype"))
    shape = _counts(file, key, entry.get("shape"))
    offsets = _counts(file, key, entry.get("data_offsets"))
    if dtype in UNREAD_DTYPES:
        raise UnsupportedModelError(f"tensor {key!r} in {file} is stored as {dtype}, which specchat does not read")
    if dtype not in STORED_DTYPES:
        _fail_on_header(file, f"tensor {key!r} has the unknown dtype {dtype!r}")
    if len(offsets) != 2:
        _fail_on_header(file, f"tensor {key!r} has the data offsets {list(offsets)}")
    begin, end = offsets
    wanted = math.prod(shape) * STORED_DTYPES[dtype].nbytes
    if end - begin != wanted:
        _fail_on_header(file, f"tensor {key!r} of {wanted} bytes is given {end - begin}")
    return TensorInfo(key, dtype, shape, file, data_start + begin, wanted)


def _counts(file: Path, key: str, value: object) -> tuple[int, ...]:
    """`value` as whole numbers >= 0 (JSON's true and false are no numbers)."""
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        _fail_on_header(file, f"tensor {key!r} has a shape or an offset that is not a list of whole numbers")
    return tuple(value)


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The format has neither holes nor overlaps: either means that the header is not the one that was saved."""
    end = data_start
    for info in infos:
        if info.offset != end:
            what = "overlaps the one before it" if info.offset < end else f"leaves {info.offset - end} bytes unused"
            _fail_on_header(file, f"tensor {info.key!r} {what}")
        end += info.nbytes
    if end > file_bytes:
        fail_truncated(file, end, file_bytes)


def fail_truncated(file: Path, expected: int, actual: int) -> NoReturn:
    """Raise a `CorruptCheckpointError` for a file with fewer bytes than its header says."""
    raise CorruptCheckpointError(f"{file} is truncated: {expected} bytes expected, {actual} there", hint=REDOWNLOAD)


def _fail_on_header(file: Path, why: str) -> NoReturn:
    raise CorruptCheckpointError(f"the header of {file} is corrupt: {why}", hint=REDOWNLOAD)
