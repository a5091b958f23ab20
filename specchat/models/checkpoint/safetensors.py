"""Checked headers of safetensors checkpoints: dtype, shape and place of every tensor, without reading the tensors.

Headers need no torch, so a plan takes milliseconds for a checkpoint of any size. Nothing here opens a pickle.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotFoundError,
    PickledCheckpointError,
    UnsupportedModelError,
)
from specchat.files import open_regular
from specchat.models.checkpoint.dtypes import STORED_DTYPES, UNREAD_DTYPES
from specchat.models.checkpoint.gguf import listed_files
from specchat.models.checkpoint.json_file import (
    LFS_MAGIC,
    REDOWNLOAD,
    fail_on_lfs_pointer,
    fail_to_read,
    parse_object,
    read_json,
    shown,
)
from specchat.models.checkpoint.text_parts import shards_beside_text

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MISTRAL_PREFIX = "consolidated"
# File of a head that was trained for a model, beside the model's own weights; in Qwen's layout.
MTP_FILE = "mtp.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LENGTH_BYTES = 8
_LONGEST_NAME = 255  # bytes of a file's name
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SHARD_NAME = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,6})\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """The header entry of one tensor, and the place of its bytes.

    Attributes:
        key: name in the checkpoint.
        dtype: safetensors' name of the dtype, such as BF16.
        shape: saved shape; () for a scalar.
        file: shard that holds the tensor.
        offset: first byte, counted from the start of the file; any alignment.
        nbytes: length in bytes.
        restore: makes the tensor of the model, in a dtype, from its bytes, uint8 [nbytes]; None for bytes that are the
            tensor's values.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    restore: "Callable[[torch.Tensor, torch.dtype], torch.Tensor] | None" = None


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files whose headers have been checked.

    Attributes:
        folder: folder of the files.
        tensors: header entries by key, in the order of files and offsets.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]


def open_checkpoint(folder: Path, *, with_head: bool = False) -> Checkpoint:
    """Read and check all headers of the checkpoint in `folder`, but no tensors.

    Args:
        folder: folder with model.safetensors, with model.safetensors.index.json and its shards, or with any
            *.safetensors files.
        with_head: whether to read shards that hold nothing but an MTP head, too.

    Raises:
        ModelNotFoundError: a missing folder, or no weights in the folder.
        PickledCheckpointError: weights only as pickles.
        CorruptCheckpointError: an invalid index or header, or a file of the wrong size.
        UnsupportedModelError: a tensor in a dtype that specchat does not read.
    """
    names, weight_map = _shard_names(folder, with_head=with_head)
    tensors = _merge(folder / name for name in names)
    _check_index(folder, weight_map, tensors)
    return Checkpoint(folder, MappingProxyType(tensors))


def open_single(file: Path) -> Checkpoint:
    """Read and check the header of one safetensors file beside a model's own, but no tensors.

    Raises:
        CorruptCheckpointError: an invalid header, or a file of the wrong size.
        UnsupportedModelError: a tensor in a dtype that specchat does not read.
    """
    return Checkpoint(file.parent, MappingProxyType(_merge([file])))


def weight_files(folder: Path) -> list[Path]:
    """List the files of a model's weights; files that an index names may be missing.

    Raises:
        ModelNotFoundError: a missing folder, or no weights in the folder.
        PickledCheckpointError: weights only as pickles.
        CorruptCheckpointError: an invalid index, or a gap in the numbering of the shards.
    """
    listed = listed_files(folder)
    return [folder / name for name in _shard_names(folder)[0]] if listed is None else listed


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights, of which some files may be missing.

    Raises:
        PickledCheckpointError: weights only as pickles.
        CorruptCheckpointError: an invalid index, or a gap in the numbering of the shards.
    """
    try:
        weight_files(folder)
    except ModelNotFoundError:
        return False
    return True


def _shard_names(folder: Path, *, with_head: bool = False) -> tuple[list[str], dict[str, str]]:
    """Return the file names, and the index as key -> file name, empty without one; shards beside text are left out."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder", hint="give the folder that holds config.json")
    # transformers prefers the single file too. So both read the same weights if a folder has both layouts.
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE], {}
    if (folder / INDEX_FILE).exists():
        weight_map = read_weight_map(folder / INDEX_FILE)
        unneeded = shards_beside_text(weight_map, with_head=with_head)
        if with_head:  # an older download may lack the head's files, without which the model runs
            beside = shards_beside_text(weight_map)
            unneeded |= {name for name in beside if not (folder / name).exists()}
        weight_map = {key: name for key, name in weight_map.items() if name not in unneeded}
        return sorted(set(weight_map.values())), weight_map
    return _names_without_index(folder), {}


def read_weight_map(index: Path) -> dict[str, str]:
    """Read key -> file name from an index.

    Raises:
        CorruptCheckpointError: no map, or a file outside the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index} has no weight_map", hint=REDOWNLOAD)
    for key, name in weight_map.items():
        # Only plain file names are valid: an index must not reach outside its folder.
        if not isinstance(name, str) or Path(name).name != name or not _is_shard_name(name):
            raise CorruptCheckpointError(
                f"{index} puts {shown(key)} into {shown(name)}, which is not a shard", hint=REDOWNLOAD
            )
    return weight_map


def _is_shard_name(name: str) -> bool:
    try:
        length = len(os.fsencode(name))
    except UnicodeEncodeError:  # JSON may hold halves of surrogate pairs
        return False
    return name.endswith(".safetensors") and length <= _LONGEST_NAME and "\0" not in name


def _names_without_index(folder: Path) -> list[str]:
    """List all *.safetensors files of a folder without an index, sorted."""
    # A head's file must not keep the model from running: it may repeat the head's tensors, or be damaged.
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != MTP_FILE)
    # Mistral's own layout repeats the weights under other keys.
    names = [name for name in names if not name.startswith(MISTRAL_PREFIX)] or names
    if names:
        _check_numbering(folder, names)
        return names
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise PickledCheckpointError(
            f"{folder} has its weights only as pickles ({pickles[0]}), which may run code when opened",
            hint="if you trust it, load it in transformers and call model.save_pretrained(FOLDER) to write safetensors",
        )
    raise ModelNotFoundError(f"{folder} has no *.safetensors files", hint="specchat reads safetensors checkpoints only")


def _check_numbering(folder: Path, names: list[str]) -> None:
    """Check that all shards exist, where names such as model-00001-of-00003.safetensors give their number."""
    matches = [match for name in names if (match := _SHARD_NAME.fullmatch(name))]
    for match in matches:
        found = sum((other["stem"], other["count"]) == (match["stem"], match["count"]) for other in matches)
        if found != int(match["count"]):
            raise CorruptCheckpointError(
                f"{folder} has only {found} of the {int(match['count'])} shards that {match[0]} implies",
                hint="download the missing shards",
            )


def _merge(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(file):
            if info.key in tensors:
                raise CorruptCheckpointError(
                    f"tensor {info.key!r} is in {tensors[info.key].file.name} and in {file}",
                    hint="the folder mixes two checkpoints; keep one of them",
                )
            tensors[info.key] = info
    return tensors


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].file.name != name:
            raise CorruptCheckpointError(
                f"{folder / name} lacks tensor {key!r}, which the index lists there", REDOWNLOAD
            )


def _read_header(file: Path) -> list[TensorInfo]:
    """Return the tensors of one safetensors file, by ascending offset."""
    try:
        with open_regular(file) as stream:
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
    """Return the length of the JSON header in bytes, given the first bytes of the file."""
    if file_bytes < _LENGTH_BYTES:
        fail_truncated(file, _LENGTH_BYTES, file_bytes)
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        _fail_on_header(file, f"its length of {header_bytes} bytes exceeds the format's limit")
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
        _fail_on_header(file, f"tensor {key!r} needs {wanted} bytes, but its data offsets span {end - begin}")
    return TensorInfo(key, dtype, shape, file, data_start + begin, wanted)


def _counts(file: Path, key: str, value: object) -> tuple[int, ...]:
    """Return a list of integers >= 0 as a tuple; true and false do not count as integers."""
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        _fail_on_header(file, f"tensor {key!r} has a shape or data offsets that are not a list of whole numbers")
    return tuple(value)


def _check_layout(file: Path, infos: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """Check that the tensors leave no gaps and do not overlap, as the format demands."""
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
    raise CorruptCheckpointError(f"{file} is truncated: expected {expected} bytes, found {actual}", hint=REDOWNLOAD)


def _fail_on_header(file: Path, why: str) -> NoReturn:
    raise CorruptCheckpointError(f"the header of {file} is corrupt: {why}", hint=REDOWNLOAD)
