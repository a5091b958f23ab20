"""Safetensors checkpoints without loading them: which tensor lies where, checked, and its bytes read into given memory.

Headers need no torch, so a plan costs milliseconds for a checkpoint of any size. Nothing here opens a pickle.
"""

import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from specchat.closing import Closing
from specchat.errors import (
    CorruptCheckpointError,
    ModelError,
    ModelNotFoundError,
    PickledCheckpointError,
    UnsupportedModelError,
)
from specchat.units import MIB

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MISTRAL_PREFIX = "consolidated"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# safetensors' name -> torch's name and bytes per number.
_DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# Sound in a file, but nothing that specchat runs stores its weights so.
_UNREAD_DTYPES = frozenset(
    {"U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LFS_MAGIC = b"version https://git-lfs"
_SHARD_NAME = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,6})\.safetensors")
_REDOWNLOAD = "delete the file and download it again"


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        ModelNotFoundError: no such file.
        CorruptCheckpointError: not JSON, or not an object.
        ModelError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"{path} does not exist", hint="give the folder that holds config.json") from exc
    except OSError as exc:
        _fail_to_read(path, exc)
    if data.startswith(_LFS_MAGIC):
        _fail_on_lfs_pointer(path)
    return _parse_object(data, str(path))


class TensorReader(Closing):
    """Reads tensors of a checkpoint from disk, with a bounded amount of memory beside the destination.

    Any number of threads may `read`; `read_into` is for one at a time, for its calls share the staging buffer. Files
    are opened on first use.
    """

    def __init__(self, checkpoint: Checkpoint, staging_bytes: int = 8 * MIB) -> None:
        """Binds the reader to `checkpoint`.

        Args:
            checkpoint: from `open_checkpoint`.
            staging_bytes: the most that one read converts at a time; at least 8, the widest number.
        """
        assert staging_bytes >= 8
        self._tensors = checkpoint.tensors
        self._folder = checkpoint.folder
        self._staging_bytes = staging_bytes
        self._staging: torch.Tensor | None = None
        self._fds: dict[Path, int] = {}
        self._opening = threading.Lock()  # several threads may be the first
        self._closed = False

    def close(self) -> None:
        """Closes the files and gives the staging buffer back; a second call does nothing."""
        self._closed = True
        self._staging = None
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, key: str) -> "torch.Tensor":
        """The tensor as saved, in new CPU memory.

        Raises:
            CorruptCheckpointError: no such tensor, or its file has been cut since it was opened.
            ModelError: the file cannot be read.
        """
        import torch

        info = self._find(key)
        out = torch.empty(info.shape, dtype=_torch_dtype(info), device="cpu")
        self.read_into(key, out)
        return out

    def mapped(self, key: str) -> "torch.Tensor":
        """The tensor as saved, in the pages of its file, of which only those that are used take memory.

        Where its numbers do not begin as torch wants them, or the system maps no such file, it is read.

        Raises:
            CorruptCheckpointError, ModelError: as `read`.
        """
        import torch

        info = self._find(key)
        dtype, file_bytes = _torch_dtype(info), os.fstat(self._fd(info.file)).st_size
        if info.offset % dtype.itemsize:
            return self.read(key)
        if file_bytes < info.offset + info.nbytes:
            _fail_truncated(info.file, info.offset + info.nbytes, file_bytes)
        try:
            pages = torch.from_file(str(info.file), shared=False, size=file_bytes, dtype=torch.uint8)
        except RuntimeError:
            return self.read(key)
        return pages[info.offset : info.offset + info.nbytes].view(dtype).view(info.shape)

    def read_into(self, key: str, out: "torch.Tensor") -> None:
        """Fills `out` with the tensor's numbers in row-major order, converted to its dtype.

        Args:
            key: the tensor's name.
            out: as many numbers as saved, of any shape, strides, dtype and device. Contiguous CPU memory of the saved
                dtype is read into directly; anything else goes through the staging buffer, piece by piece.

        Raises:
            CorruptCheckpointError: no such tensor, another number of elements, or a file cut since it was opened.
            ModelError: the file cannot be read.
        """
        info = self._find(key)
        if out.numel() != math.prod(info.shape):
            raise CorruptCheckpointError(
                f"tensor {key!r} in {info.file} has shape {list(info.shape)}, the model wants {list(out.shape)}",
                hint="config.json and the weights do not belong together: download both again",
            )
        out = out.detach()
        if out.dtype == _torch_dtype(info) and out.device.type == "cpu" and out.is_contiguous():
            self._fill(info, 0, _bytes_of(out))
        else:
            self._convert(info, out)

    def _find(self, key: str) -> TensorInfo:
        info = self._tensors.get(key)
        if info is None:
            raise CorruptCheckpointError(
                f"the checkpoint in {self._folder} has no tensor {key!r}",
                hint="the download may be incomplete: repeat it",
            )
        return info

    def _convert(self, info: TensorInfo, out: "torch.Tensor") -> None:
        """Reads through the staging buffer: as many numbers at a time as it holds, cast and copied into `out`."""
        width = _DTYPES[info.dtype][1]
        step = self._staging_bytes // width
        done = 0  # bytes of the tensor
        for piece in _flat_pieces(out):
            for start in range(0, piece.numel(), step):
                part = piece[start : start + step]
                raw = self._staging_view(part.numel() * width)
                self._fill(info, done, _bytes_of(raw))
                # Not asynchronous: the staging buffer is overwritten by the next round.
                part.copy_(raw.view(_torch_dtype(info)))
                done += raw.numel()

    def _staging_view(self, num_bytes: int) -> "torch.Tensor":
        """The first `num_bytes` of the staging buffer, which torch aligns for every dtype."""
        import torch

        if self._staging is None:
            self._staging = torch.empty(self._staging_bytes, dtype=torch.uint8, device="cpu")
        return self._staging[:num_bytes]

    def _fill(self, info: TensorInfo, skip: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from its byte `skip` on."""
        fd = self._fd(info.file)
        done = 0
        while done < len(buffer):  # one call moves at most 2 GiB on Linux
            try:
                count = os.preadv(fd, [buffer[done:]], info.offset + skip + done)
            except OSError as exc:
                _fail_to_read(info.file, exc)
            if count == 0:
                _fail_truncated(info.file, info.offset + info.nbytes, os.fstat(fd).st_size)
            done += count

    def _fd(self, file: Path) -> int:
        assert not self._closed, "read from a closed TensorReader"
        with self._opening:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as exc:
                    _fail_to_read(file, exc)
            return self._fds[file]


def _torch_dtype(info: TensorInfo) -> "torch.dtype":
    import torch

    dtype = getattr(torch, _DTYPES[info.dtype][0])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    import torch

    # Through numpy rather than ctypes: the view keeps the storage alive. reshape of contiguous memory never copies.
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy's types hide the buffer protocol before 3.12
    return memoryview(array)


def _flat_pieces(out: "torch.Tensor") -> Iterator["torch.Tensor"]:
    """One-dimensional views that together cover `out` in row-major order; one if it is contiguous."""
    if out.is_contiguous():
        yield out.view(-1)
    elif out.dim() == 1:
        yield out
    else:
        for part in out.unbind(0):
            yield from _flat_pieces(part)


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
        raise CorruptCheckpointError(f"{index} has no weight_map", hint=_REDOWNLOAD)
    for key, name in weight_map.items():
        # A plain file name: an index must not reach outside its folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptCheckpointError(f"{index} puts {key!r} into {name!r}, which is no shard", hint=_REDOWNLOAD)
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
                f"{folder / name} lacks tensor {key!r}, which the index puts there", _REDOWNLOAD
            )


def _read_header(file: Path) -> list[TensorInfo]:
    """What one safetensors file holds, by ascending offset."""
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            start = stream.read(len(_LFS_MAGIC))
            if start == _LFS_MAGIC:
                _fail_on_lfs_pointer(file)
            header_bytes = _header_bytes(file, start, file_bytes)
            stream.seek(_LENGTH_BYTES)
            raw = stream.read(header_bytes)
    except FileNotFoundError as exc:
        raise CorruptCheckpointError(f"shard {file} is missing", hint="download the missing shards") from exc
    except OSError as exc:
        _fail_to_read(file, exc)
    data_start = _LENGTH_BYTES + header_bytes
    entries = _parse_object(raw, f"the header of {file}")
    infos = [_parse_entry(file, key, entry, data_start) for key, entry in entries.items() if key != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(file, infos, data_start, file_bytes)
    return infos


def _header_bytes(file: Path, start: bytes, file_bytes: int) -> int:
    """Length of the JSON header, in bytes, from the first bytes of the file."""
    if file_bytes < _LENGTH_BYTES:
        _fail_truncated(file, _LENGTH_BYTES, file_bytes)
    header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        _fail_on_header(file, f"its length of {header_bytes} bytes is beyond the format's limit")
    if _LENGTH_BYTES + header_bytes > file_bytes:
        _fail_truncated(file, _LENGTH_BYTES + header_bytes, file_bytes)
    return header_bytes


def _parse_entry(file: Path, key: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _fail_on_header(file, f"tensor {key!r} is not described by an object")
    dtype = str(entry.get("dtype"))
    shape = _counts(file, key, entry.get("shape"))
    offsets = _counts(file, key, entry.get("data_offsets"))
    if dtype in _UNREAD_DTYPES:
        raise UnsupportedModelError(f"tensor {key!r} in {file} is stored as {dtype}, which specchat does not read")
    if dtype not in _DTYPES:
        _fail_on_header(file, f"tensor {key!r} has the unknown dtype {dtype!r}")
    if len(offsets) != 2:
        _fail_on_header(file, f"tensor {key!r} has the data offsets {list(offsets)}")
    begin, end = offsets
    wanted = math.prod(shape) * _DTYPES[dtype][1]
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
        _fail_truncated(file, end, file_bytes)


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; a key given twice is an error, since the first one would be lost silently."""
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_dict_of_unique)
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpointError(f"{what} is not valid JSON: {exc}", hint=_REDOWNLOAD) from exc
    if not isinstance(parsed, dict):
        raise CorruptCheckpointError(f"{what} is not a JSON object", hint=_REDOWNLOAD)
    return parsed


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} given twice")
        result[key] = value
    return result


def _fail_truncated(file: Path, expected: int, actual: int) -> NoReturn:
    raise CorruptCheckpointError(f"{file} is truncated: {expected} bytes expected, {actual} there", hint=_REDOWNLOAD)


def _fail_on_header(file: Path, why: str) -> NoReturn:
    raise CorruptCheckpointError(f"the header of {file} is corrupt: {why}", hint=_REDOWNLOAD)


def _fail_on_lfs_pointer(file: Path) -> NoReturn:
    raise CorruptCheckpointError(
        f"{file} is a Git LFS pointer, not the file itself", hint=f"run: git -C '{file.parent}' lfs pull"
    )


def _fail_to_read(file: Path, exc: OSError) -> NoReturn:
    raise ModelError(
        f"cannot read {file}: {exc.strerror or exc}", hint="check the file's permissions and the disk"
    ) from exc
