"""Reading the JSON files of a model folder, with errors that name the file."""

import codecs
import json
from pathlib import Path
from typing import Any, NoReturn

from specchat.errors import (
    CorruptCheckpointError,
    ModelError,
    ModelNotFoundError,
)
from specchat.files import open_regular
from specchat.units import MIB

LFS_MAGIC = b"version https://git-lfs"
MODELOPT_FILE = "hf_quant_config.json"
REDOWNLOAD = "delete the file and download it again"
# Libraries copy nested values by recursion, which ends in an error at some hundred levels.
_MOST_LEVELS = 64
_SHOWN_CHARACTERS = 60
# The largest files are tokenizers, of up to 40 MB.
_MOST_BYTES = 512 * MIB


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ModelNotFoundError: a missing file.
        CorruptCheckpointError: invalid JSON, no object, or values that are nested too deeply.
        ModelError: the file cannot be read.
    """
    values = parse_object(read_data(path), str(path))
    if _is_deeper(values, _MOST_LEVELS):
        raise CorruptCheckpointError(f"{path} is nested too deeply", hint=REDOWNLOAD)
    return values


def read_data(path: Path) -> bytes:
    """Return the bytes of a text file of a model folder, without a byte-order mark.

    Raises:
        ModelNotFoundError: a missing file.
        CorruptCheckpointError: a Git LFS pointer in the place of the file, or a file of an absurd size.
        ModelError: the file cannot be read.
    """
    try:
        with open_regular(path) as stream:
            data = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"{path} does not exist", hint="give the folder that holds config.json") from exc
    except OSError as exc:
        fail_to_read(path, exc)
    if len(data) > _MOST_BYTES:
        raise CorruptCheckpointError(f"{path} is larger than {_MOST_BYTES >> 20} MiB", hint=REDOWNLOAD)
    if data.startswith(LFS_MAGIC):
        fail_on_lfs_pointer(path)
    return data.removeprefix(codecs.BOM_UTF8)


def shown(value: object) -> str:
    """Return a value as JSON for a message, shortened to one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; a duplicate key is an error, because its first value would be lost silently."""
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_dict_of_unique)
    except RecursionError as exc:
        raise CorruptCheckpointError(f"{what} is nested too deeply", hint=REDOWNLOAD) from exc
    except ValueError as exc:
        raise CorruptCheckpointError(f"{what} is not valid JSON: {exc}", hint=REDOWNLOAD) from exc
    if not isinstance(parsed, dict):
        raise CorruptCheckpointError(f"{what} is not a JSON object", hint=REDOWNLOAD)
    return parsed


def _dict_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _is_deeper(value: object, levels: int) -> bool:
    """Return whether objects and lists are nested in more than `levels` levels."""
    level = [value]
    for _ in range(levels):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in nested for item in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in level)


def fail_on_lfs_pointer(file: Path) -> NoReturn:
    """Raise a `CorruptCheckpointError` for a Git LFS pointer in the place of a file."""
    raise CorruptCheckpointError(
        f"{file} is a Git LFS pointer, not the file itself", hint=f"run: git -C '{file.parent}' lfs pull"
    )


def fail_to_read(file: Path, exc: OSError) -> NoReturn:
    """Raise a `ModelError` for a file that the system refuses to read."""
    raise ModelError(
        f"cannot read {file}: {exc.strerror or exc}", hint="check the file's permissions and the disk"
    ) from exc
