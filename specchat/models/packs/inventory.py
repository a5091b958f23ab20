"""What lies in the folder of packs, told by manifests and sizes alone: no torch, and no data are read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.paths import cache_folder

FORMAT_VERSION = 1  # of manifest and journal
LAYOUT_VERSION = 1  # of the data files
VERSIONS = {"format": FORMAT_VERSION, "layout": LAYOUT_VERSION}
MANIFEST = "manifest.json"


def packs_folder() -> Path:
    """Where packs lie. It need not exist yet."""
    return cache_folder() / "packs"


@dataclass(frozen=True)
class FoundPack:
    """A folder among the packs.

    Attributes:
        path: of the folder.
        nbytes: on the disk.
        name: the MODEL that it was first made for; the folder's own name if that is not known.
        idle: why nothing uses it any more, as far as can be told; None if something may.
    """

    path: Path
    nbytes: int
    name: str
    idle: str | None


def find_packs() -> tuple[FoundPack, ...]:
    """All packs, by path; empty where the folder is missing or cannot be listed.

    One that was made for the same model, in the same numbers, as a later one is idle: the model's files, or what
    quantizes them, have changed in between. (Or else a model has several revisions here, or two have the same name.)
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
        return "its making was interrupted; the same command goes on with it"
    if any(body.get(name) != version for name, version in VERSIONS.items()):
        return "another version of specchat made it"
    return None if latest[_purpose(body)] == folder else "there is a later one of the same model"


def _purpose(body: dict[str, Any]) -> tuple[str, ...]:
    """What a pack is for, without the versions of what made it."""
    quantizer = str(body.get("quantizer", "")).partition(" ")[0]
    return str(body.get("name")), str(body.get("dtype")), quantizer


def _manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says; nothing where there is none that could be read."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _age(folder: Path) -> float:
    """When it was finished, in seconds since some time long ago."""
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
            continue  # gone by now
