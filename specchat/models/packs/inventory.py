"""The list of packs on disk, from manifests and sizes alone: no torch, and no data are read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.files import read_regular
from specchat.paths import cache_folder

FORMAT_VERSION = 1  # version of manifest and journal
LAYOUT_VERSION = 1  # version of the data files
VERSIONS = {"format": FORMAT_VERSION, "layout": LAYOUT_VERSION}
MANIFEST = "manifest.json"


def packs_folder() -> Path:
    """Return the folder of packs, which need not exist yet."""
    return cache_folder() / "packs"


@dataclass(frozen=True)
class FoundPack:
    """A folder among the packs.

    Attributes:
        path: folder of the pack.
        nbytes: size on disk in bytes.
        name: MODEL that the pack was first made for, or the folder's name if unknown.
        idle: reason why the pack is no longer used; None if it may be in use.
    """

    path: Path
    nbytes: int
    name: str
    idle: str | None


def find_packs() -> tuple[FoundPack, ...]:
    """Return all packs by path; empty if the folder is missing or cannot be listed.

    A pack is idle if a later one has the same model name, dtype and quantizer: the model's files or the quantizer's
    version have changed since. (Several revisions of a model, or two models of one name, look the same.)
    """
    try:
        folders = sorted(path for path in packs_folder().iterdir() if path.is_dir())
    except OSError:
        return ()
    manifests = {folder: _manifest(folder) for folder in folders}
    latest = {_purpose(body): folder for folder, body in sorted(manifests.items(), key=lambda item: _age(item[0]))}
    return tuple(
        FoundPack(folder, _num_bytes(folder), str(body.get("name", folder.name)), _idle(folder, body, latest))
        for folder, body in manifests.items()
    )


def _idle(folder: Path, body: dict[str, Any], latest: dict[tuple[str, ...], Path]) -> str | None:
    if not body:
        return "packing was interrupted; the same command continues it"
    if any(body.get(name) != version for name, version in VERSIONS.items()):
        return "made by another version of specchat"
    return None if latest[_purpose(body)] == folder else "replaced by a later pack of the same model"


def _purpose(body: dict[str, Any]) -> tuple[str, ...]:
    """Return name, dtype and quantizer of a pack, without the quantizer's version."""
    quantizer = str(body.get("quantizer", "")).partition(" ")[0]
    return str(body.get("name")), str(body.get("dtype")), quantizer


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's contents; empty if it is missing or unreadable."""
    try:
        body = json.loads(read_regular(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _age(folder: Path) -> float:
    """Return the time when the pack was finished, in seconds since the epoch."""
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _num_bytes(folder: Path) -> int:
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        try:
            yield path.lstat().st_size
        except OSError:
            continue  # deleted meanwhile
