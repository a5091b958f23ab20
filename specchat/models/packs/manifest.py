"""The manifest that completes a pack, and the journal that lets an interrupted run continue."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.files import read_regular
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
    """Description of a finished pack.

    Attributes:
        key: key of the pack.
        name: MODEL that the pack was first made for, for listings.
        dtype: dtype of the layers' unquantized tensors.
        rest: file of everything outside the layers.
        layers: files of the layers, one each.
        files: copied small files (config.json, tokenizer).
        quantizer: quantizer of the layers' matrices, with its version.
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
        """Bytes on disk, without the manifest."""
        return sum(record.file_nbytes for record in self.records)

    def write(self, folder: Path) -> None:
        """Write the manifest atomically and durably; errors as in `write_tensors`."""
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
    """Read the manifest in `folder`; None if it is missing or of another version.

    Raises:
        ValueError: the manifest is damaged.
        ModelError: the file exists but cannot be read.
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
    """Record of a pack's complete files: one line each, durable before the next file is begun.

    The journal stays next to the finished manifest, so that a damaged manifest costs no second packing.
    """

    def __init__(self, folder: Path, key: str, records: Sequence[FileRecord]) -> None:
        """Start the journal with the files known to be complete; errors as in `write_tensors`."""
        self._folder = folder
        lines = [{**VERSIONS, "key": key}, *map(_to_json, records)]
        write_small(folder, JOURNAL, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def add(self, record: FileRecord) -> None:
        """Add a file that is durable under its name."""
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
    """Read the journal's records by file name, up to the first damaged line.

    Raises:
        ModelError: the file exists but cannot be read.
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
        return records  # later lines cannot be trusted; their files are written again
    return records


def _read_if_there(path: Path) -> bytes | None:
    """Read a small file; None if it does not exist."""
    with disk_errors(path, "read"):
        try:
            return read_regular(path)
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
    """Parse a record from a JSON object.

    Raises:
        ValueError, KeyError, TypeError: the object is no record, or names a file outside its folder.
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
