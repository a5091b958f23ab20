"""What a pack says about itself: the manifest that makes it, and the journal from which an interrupted one goes on."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.models.packs.file_format import (
    NOT_QUANTIZED,
    FileRecord,
    disk_errors,
    write_all,
    write_small,
)
from specchat.models.packs.inventory import MANIFEST, VERSIONS
from specchat.records.limits import READ_CHUNK_BYTES
from specchat.records.model import DTYPE_BYTES, Dtype

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Manifest:
    """What a finished pack says about itself.

    Attributes:
        key: of the pack.
        name: the MODEL that it was first made for, for listings.
        dtype: of the layers' numbers that are not quantized.
        rest: everything outside the layers.
        layers: one file each.
        files: small files that came along (config.json, tokenizer).
        quantizer: what made the layers' matrices, and its version.
    """

    key: str
    name: str
    dtype: Dtype
    rest: FileRecord
    layers: tuple[FileRecord, ...]
    files: tuple[FileRecord, ...]
    quantizer: str = NOT_QUANTIZED

    @property
    def records(self) -> tuple[FileRecord, ...]:
        """All files."""
        return (*self.layers, self.rest, *self.files)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk, the manifest's own aside."""
        return sum(record.file_nbytes for record in self.records)

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically and durably; errors as in `write_tensors`."""
        body = {
            **VERSIONS,
            "key": self.key,
            "name": self.name,
            "dtype": self.dtype,
            "quantizer": self.quantizer,
            "chunk_bytes": READ_CHUNK_BYTES,
            "rest": _to_json(self.rest),
            "layers": [_to_json(record) for record in self.layers],
            "files": [_to_json(record) for record in self.files],
        }
        write_small(folder, MANIFEST, json.dumps({**body, "crc32": _checksum(body)}, indent=1).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None if there is none, or of another version.

    Raises:
        ValueError: it is not what was written.
        ModelError: the file is there and cannot be read.
    """
    data = _read_if_there(folder / MANIFEST)
    if data is None:
        return None
    try:
        body = json.loads(data)
        if body.pop("crc32") != _checksum(body):
            raise ValueError("wrong checksum")
        if {name: body[name] for name in VERSIONS} != VERSIONS or body["chunk_bytes"] != READ_CHUNK_BYTES:
            return None
        dtype: Dtype = body["dtype"]
        if dtype not in DTYPE_BYTES:
            raise ValueError("unknown dtype")
        layers, files = tuple(map(_from_json, body["layers"])), tuple(map(_from_json, body["files"]))
        rest, quantizer = _from_json(body["rest"]), str(body["quantizer"])
        return Manifest(body["key"], body["name"], dtype, rest, layers, files, quantizer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise ValueError(f"{folder / MANIFEST} is not a pack's manifest") from exc


class Journal:
    """Which files of a pack are complete while it is made: one line each, durable before the next file is begun.

    It stays beside the finished manifest, so that a damaged manifest costs no second packing.
    """

    def __init__(self, folder: Path, key: str, records: Sequence[FileRecord]) -> None:
        """Begins the journal anew with what is known to be complete; errors as in `write_tensors`."""
        self._folder = folder
        lines = [{**VERSIONS, "key": key}, *map(_to_json, records)]
        write_small(folder, JOURNAL, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def add(self, record: FileRecord) -> None:
        """Notes a file that is on the disk under its name."""
        path = self._folder / JOURNAL
        with disk_errors(path, "write"):
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            write_all(fd, json.dumps(_to_json(record)).encode() + b"\n", path)
            with disk_errors(path, "write"):
                os.fsync(fd)
        finally:
            os.close(fd)


def read_journal(folder: Path, key: str) -> dict[str, FileRecord]:
    """Records by file name, as far as the journal can be read: its last line may be torn.

    Raises:
        ModelError: the file is there and cannot be read.
    """
    first, *lines = (_read_if_there(folder / JOURNAL) or b"").split(b"\n")
    records: dict[str, FileRecord] = {}
    try:
        if json.loads(first) != {**VERSIONS, "key": key}:
            return {}
        for line in lines:
            record = _from_json(json.loads(line))
            records[record.name] = record
    except (ValueError, KeyError, TypeError, RecursionError):
        return records  # from here on nothing can be trusted; the files meant are written again
    return records


def _read_if_there(path: Path) -> bytes | None:
    """The whole of a small file, or None if there is none.

    Raises:
        ModelError: the file is there and cannot be read.
    """
    with disk_errors(path, "read"):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def _checksum(body: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _to_json(record: FileRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "data_offset": record.data_offset,
        "nbytes": record.nbytes,
        "header_crc32": record.header_crc32,
        "crc32": list(record.crc32s),
    }


def _from_json(value: Any) -> FileRecord:
    """The record in a JSON object.

    Raises:
        ValueError, KeyError, TypeError: it is none, or names a file outside its folder.
    """
    name, crc32s = value["name"], tuple(value["crc32"])
    data_offset, nbytes, header_crc32 = value["data_offset"], value["nbytes"], value["header_crc32"]
    if any(type(number) is not int or number < 0 for number in (data_offset, nbytes, header_crc32, *crc32s)):
        raise ValueError("not a count of bytes or a checksum")
    if type(name) is not str or name in {"", ".."} or Path(name).name != name:
        raise ValueError("not a file's name")
    if len(crc32s) != -(-nbytes // READ_CHUNK_BYTES):
        raise ValueError("not one checksum per chunk")
    return FileRecord(name, data_offset, nbytes, header_crc32, crc32s)
