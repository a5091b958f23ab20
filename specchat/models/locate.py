"""From a model's name to a folder with its files, wherever it comes from: a folder, the hub, or made here."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from specchat.errors import (
    ModelNotFoundError,
)
from specchat.models.catalog.ref import SHAPE_PREFIX, ModelRef, demo_source
from specchat.models.catalog.shape import Shape
from specchat.models.catalog.suggest import FORMS, folder_hint
from specchat.records.model import ModelSource

if TYPE_CHECKING:
    pass
from specchat.models.hub.cache import look_up_cached, snapshot_source
from specchat.models.hub.download import LOG, Download, fetch, look_up_online
from specchat.models.hub.errors import hub_errors

# What a model needs before it can be used: a download, or to be made.
Missing = Download | Shape


def look_up(ref: ModelRef, *, offline: bool, warn: Callable[[str], None] = LOG.warning) -> ModelSource | Missing:
    """Where the files of `ref` are, or what it takes to have them; nothing is downloaded or made.

    Args:
        ref: from `parse_model`.
        offline: the network is not touched (HF_HUB_OFFLINE=1 has the same effect).
        warn: told in one line when the hub cannot be asked and a cached copy is used.

    Raises:
        ModelNotFoundError: no such folder, repository or revision, or no weights in it.
        ModelGatedError: a login or an accepted licence is needed.
        ModelNotCachedError: offline, and not completely in the cache.
        PickledCheckpointError: weights only as pickles.
        ModelError: the hub cannot be reached or failed.
    """
    if ref.kind == "demo":
        return demo_source("target")
    if ref.kind == "folder":
        return _look_up_folder(ref)
    if ref.kind == "shape":
        assert ref.shape is not None
        return ref.shape
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return look_up_cached(ref)
    return look_up_online(ref, warn)


def obtain(
    missing: Missing,
    *,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = LOG.warning,
) -> ModelSource:
    """Downloads or makes what `look_up` found missing, once the user has agreed.

    Args:
        missing: from `look_up`.
        progress: told (bytes done, bytes to download or to write), maybe from other threads, one at a time.
        warn: told in one line what is written for a shape.

    Raises:
        ModelError: the hub cannot be reached or failed.
        DoesNotFitError: the disk is too small.
    """
    if isinstance(missing, Download):
        return snapshot_source(missing.ref, fetch(missing, progress))
    from specchat.models.synthetic.layers import materialise  # with torch

    return materialise(missing, progress=progress, warn=warn)


def sketch(missing: Missing, folder: Path) -> ModelSource:
    """The configuration of what `look_up` found missing: enough to plan for it, at the cost of one small file.

    Args:
        missing: from `look_up`.
        folder: an existing one, for the configuration of a shape.

    Raises:
        ModelError: the hub cannot be reached or failed.
    """
    if isinstance(missing, Download):
        from huggingface_hub import hf_hub_download

        ref = missing.ref
        assert ref.repo_id is not None
        with hub_errors(ref):
            config = hf_hub_download(ref.repo_id, "config.json", revision=missing.revision)
        return snapshot_source(ref, Path(config).parent)
    from specchat.models.synthetic.layers import LABEL, shape_files  # with torch

    path = folder / missing.label.replace("/", "-")
    path.mkdir()
    (path / "config.json").write_bytes(shape_files(missing)["config.json"])
    return ModelSource(name=f"{SHAPE_PREFIX}{missing.label}", path=path, label=LABEL)


def _look_up_folder(ref: ModelRef) -> ModelSource:
    assert ref.path is not None
    if ref.path.is_file():
        hint = folder_hint(ref.path) if (ref.path.parent / "config.json").is_file() else FORMS
        raise ModelNotFoundError(f"{ref.path} is a file, not a model's folder", hint=hint)
    if not ref.path.is_dir():
        raise ModelNotFoundError(f"there is no folder {ref.path}", hint="a hub id has the form org/name, without ./")
    if not (ref.path / "config.json").is_file():
        raise ModelNotFoundError(f"{ref.path} has no config.json", hint="give the folder that holds config.json")
    return ModelSource(name=ref.text, path=ref.path)
