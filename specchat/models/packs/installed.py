"""What specchat's models take on this disk: checkpoints and drafts in the hub's cache, and packs."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.families import known_families
from specchat.models.hub.cache import cached_models
from specchat.models.packs.inventory import find_packs

Kind = Literal["model", "draft", "pack", "other"]


@dataclass(frozen=True)
class Installed:
    """Something on the disk that belongs to a model.

    Attributes:
        name: MODEL, as `specchat run` takes it; of a pack, that of its model.
        kind: model, known draft, pack, or a repository that specchat cannot run.
        path: folder.
        nbytes: size on disk.
        used_at: time of the last use in seconds since the epoch, or None if unknown.
        note: reason why it is of no use any more; empty otherwise.
    """

    name: str
    kind: Kind
    path: Path
    nbytes: int
    used_at: float | None = None
    note: str = ""


def find_installed() -> list[Installed]:
    """Return the models in the hub's cache and the packs, the largest first; uses no network."""
    return sorted([*_repositories(), *_packs()], key=lambda each: (-each.nbytes, each.name))


def remove_installed(entries: list[Installed]) -> None:
    """Remove folders from the disk."""
    for each in entries:
        shutil.rmtree(each.path)


def installed_named(name: str) -> list[Installed]:
    """Return everything on the disk of this name: a model and its packs, or one pack by its folder's name.

    Raises:
        ModelNotFoundError: there is nothing of this name.
    """
    found = [each for each in find_installed() if name in (each.name, each.path.name, str(each.path))]
    if not found:
        raise ModelNotFoundError(f"nothing on this disk is named '{name}'", hint="specchat models lists what is there")
    return found


def _repositories() -> Iterator[Installed]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    usable = {name.partition("@")[0] for name in cached_models()}
    drafts = {draft for family in known_families().families for draft in family.drafts}
    for repo in repos:
        if repo.repo_type != "model":
            continue
        kind: Kind = "other" if repo.repo_id not in usable else "draft" if repo.repo_id in drafts else "model"
        note = "" if kind != "other" else "incomplete, or not for specchat"
        yield Installed(repo.repo_id, kind, repo.repo_path, repo.size_on_disk, repo.last_accessed, note)


def _packs() -> Iterator[Installed]:
    for pack in find_packs():
        yield Installed(pack.name, "pack", pack.path, pack.nbytes, _last_use(pack.path), pack.idle or "")


def _last_use(folder: Path) -> float | None:
    """Return the time of the last access to a folder's files."""
    try:
        return max(path.stat().st_atime for path in folder.iterdir())
    except (OSError, ValueError):
        return None
