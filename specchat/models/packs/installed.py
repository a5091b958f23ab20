"""The models on this disk: checkpoints and drafts in the hub's cache, packs, and the stores of other programs."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specchat.errors import ModelNotFoundError, UsageError
from specchat.models.catalog.families import known_families
from specchat.models.hub.cache import cached_gguf, cached_models
from specchat.models.hub.stores import listed_name, stored_models
from specchat.models.packs.inventory import find_packs

Kind = Literal["model", "draft", "pack", "other"]


@dataclass(frozen=True)
class Installed:
    """Something on the disk that belongs to a model.

    Attributes:
        name: MODEL, as `specchat run` takes it; of a pack, that of its model.
        kind: model, known draft, pack, or a repository that specchat cannot run.
        path: folder; of another program's model, its file or folder.
        nbytes: size on disk.
        used_at: time of the last use in seconds since the epoch, or None if unknown.
        note: reason why it is of no use (any more); empty otherwise.
        origin: program that keeps it: hub (the cache of the Hugging Face hub), specchat, or another program.
        removal: way to remove it in another program; empty for what specchat removes.
    """

    name: str
    kind: Kind
    path: Path
    nbytes: int
    used_at: float | None = None
    note: str = ""
    origin: str = "hub"
    removal: str = ""


def find_installed() -> list[Installed]:
    """Return the models and packs on this disk, the largest first; uses no network."""
    return sorted([*_repositories(), *_packs(), *_stored()], key=lambda each: (-each.nbytes, each.name))


def remove_installed(entries: list[Installed]) -> None:
    """Remove folders from the disk."""
    for each in entries:
        shutil.rmtree(each.path)


def installed_named(name: str) -> list[Installed]:
    """Return everything on the disk of this name: a model and its packs, or one pack by its folder's name.

    Raises:
        ModelNotFoundError: there is nothing of this name.
        UsageError: the model belongs to another program.
    """
    stored = listed_name(name) or name
    found = [each for each in find_installed() if {name, stored} & {each.name, each.path.name, str(each.path)}]
    if not found:
        raise ModelNotFoundError(f"nothing on this disk is named '{name}'", hint="specchat models lists what is there")
    for each in found:
        if each.removal:
            raise UsageError(
                f"{each.name} belongs to {each.origin}, whose files specchat never changes",
                hint=f"remove it there: {each.removal}",
            )
    return found


def _repositories() -> Iterator[Installed]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    quants = cached_gguf()
    usable = {name.partition("@")[0] for name in cached_models()} | {name.partition(":")[0] for name in quants}
    drafts = {draft for family in known_families().families for draft in family.drafts}
    for repo in repos:
        if repo.repo_type != "model":
            continue
        kind: Kind = "other" if repo.repo_id not in usable else "draft" if repo.repo_id in drafts else "model"
        names = [name.partition(":")[2] for name in quants if name.partition(":")[0] == repo.repo_id]
        note = f"GGUF: {', '.join(names)}" if names else "" if kind != "other" else "incomplete, or not for specchat"
        yield Installed(repo.repo_id, kind, repo.repo_path, repo.size_on_disk, repo.last_accessed, note)


def _packs() -> Iterator[Installed]:
    for pack in find_packs():
        yield Installed(pack.name, "pack", pack.path, pack.nbytes, _last_use(pack.path), pack.idle or "", "specchat")


def _stored() -> Iterator[Installed]:
    for each in stored_models():
        kind: Kind = "other" if each.problem else "model"
        with suppress(OSError):  # the other program may remove it now
            used_at = each.path.stat().st_atime
            yield Installed(each.name, kind, each.path, each.nbytes, used_at, each.problem, each.origin, each.removal)


def _last_use(folder: Path) -> float | None:
    """Return the time of the last access to a folder's files."""
    try:
        return max(path.stat().st_atime for path in folder.iterdir())
    except (OSError, ValueError):
        return None
