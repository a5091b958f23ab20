"""Finding the files of a model by its name: in a folder, in the hub's cache, on the hub, stored, or synthetic."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from specchat.errors import ModelNotFoundError, UsageError
from specchat.models.catalog.ref import SHAPE_PREFIX, ModelRef, demo_source
from specchat.models.catalog.shape import Shape
from specchat.models.catalog.suggest import FORMS, folder_hint, is_gguf, no_such_path
from specchat.models.checkpoint.gguf import gguf_files, total_bytes
from specchat.models.gguf.folder import TOKENIZER_FILES, model_folder
from specchat.models.hub.cache import look_up_cached, snapshot_source
from specchat.models.hub.download import LOG, Download, fetch, look_up_online
from specchat.models.hub.gguf_files import find_file
from specchat.models.hub.headers import fetch_configs, fetch_headers
from specchat.models.hub.small_files import fetch_small
from specchat.models.hub.stores import runnable_model
from specchat.records.model import ModelSource
from specchat.units import format_bytes

# A model that must be downloaded, or a synthetic one that must be created.
Missing = Download | Shape


def look_up(
    ref: ModelRef, *, offline: bool, warn: Callable[[str], None] = LOG.warning, tokenizer: Path | None = None
) -> ModelSource | Missing:
    """Find the files of `ref`, or else what is missing; download and create nothing.

    Args:
        ref: parsed MODEL argument.
        offline: whether the network must not be used; HF_HUB_OFFLINE=1 has the same effect.
        warn: receives a one-line warning when a cached copy is used because the hub is unreachable.
        tokenizer: folder of the tokenizer that replaces the one in a GGUF file; None for the file's own.

    Raises:
        UsageError: a tokenizer for a model that is no GGUF file.
        ModelNotFoundError: a missing folder, repository or revision, or one without weights.
        ModelGatedError: a missing login or licence agreement.
        ModelNotCachedError: no complete copy in the cache, while offline.
        PickledCheckpointError: weights only as pickles.
        ModelError: an unreachable or failing hub.
    """
    found = _look_up(ref, offline=offline, warn=warn)
    return _as_model(ref, found, tokenizer) if isinstance(found, ModelSource) else found


def _look_up(ref: ModelRef, *, offline: bool, warn: Callable[[str], None]) -> ModelSource | Missing:
    if ref.kind == "demo":
        return demo_source("target")
    if ref.kind == "folder":
        return look_up_folder(ref)
    if ref.kind == "stored":
        stored = runnable_model(ref.text)
        return ModelSource(name=stored.name, path=stored.path)
    if ref.kind == "shape":
        assert ref.shape is not None
        return ref.shape
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return look_up_cached(ref)
    return look_up_online(ref, warn)


def tokenizer_folder(ref: ModelRef, *, offline: bool) -> Path:
    """Return a folder with the tokenizer of a model, and download the tokenizer's few files if they are missing.

    Raises:
        UsageError: a MODEL argument that is neither a folder nor a hub id.
        ModelError: the folder or the repository does not exist.
    """
    if ref.kind == "hub":
        return fetch_small(ref, TOKENIZER_FILES, offline=offline)
    if ref.path is None:
        raise UsageError(f"--tokenizer {ref.text} is not a folder or a hub id", hint="use ./folder or org/name")
    if not any((ref.path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelNotFoundError(f"{ref.path} has no tokenizer files", hint="give the folder of the original model")
    return ref.path


def obtain(
    missing: Missing,
    *,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = LOG.warning,
    tokenizer: Path | None = None,
) -> ModelSource:
    """Download or create a missing model, after the user's consent.

    Args:
        missing: result of `look_up`.
        progress: receives (bytes done, bytes in total), possibly from other threads, but from one at a time.
        warn: receives one line about the files of a synthetic model.
        tokenizer: folder of the tokenizer that replaces the one in a GGUF file, as for `look_up`.

    Raises:
        ModelError: an unreachable or failing hub.
        DoesNotFitError: the disk is too small.
    """
    if isinstance(missing, Download):
        return _as_model(missing.ref, snapshot_source(missing.ref, fetch(missing, progress)), tokenizer)
    from specchat.models.synthetic.layers import materialise  # imports torch

    return materialise(missing, progress=progress, warn=warn)


def sketch(missing: Missing, folder: Path) -> ModelSource:
    """Download only the configuration of a missing model, in small files, which is enough for most plans.

    Args:
        missing: result of `look_up`.
        folder: existing folder for the files of a synthetic model, all but its weights.

    Raises:
        ModelError: an unreachable or failing hub.
    """
    if isinstance(missing, Download):
        return snapshot_source(missing.ref, fetch_configs(missing))
    from specchat.models.synthetic.layers import LABEL, shape_files  # imports torch

    path = folder / missing.label.replace("/", "-")
    path.mkdir()
    for name, content in shape_files(missing).items():
        (path / name).write_bytes(content)
    return ModelSource(name=f"{SHAPE_PREFIX}{missing.label}", path=path, label=LABEL)


def sketch_weights(missing: Download, folder: Path, tokenizer: Path | None = None) -> ModelSource:
    """Download the configuration and the headers of the weights, for plans that need the sizes of the tensors.

    Args:
        missing: result of `look_up`.
        folder: existing folder; the files come into a new one in it.
        tokenizer: folder of the tokenizer that replaces the one in a GGUF file, as for `look_up`.

    Raises:
        ModelError: an unreachable or failing hub, or an invalid header.
        UnsupportedModelError: a GGUF file of an architecture or with a tokenizer that specchat does not know.
    """
    path = folder / f"{missing.name.replace('/', '-').replace(':', '-')}-{missing.revision}"
    path.mkdir()
    return _as_model(missing.ref, fetch_headers(missing, path), tokenizer)


def _as_model(ref: ModelRef, found: ModelSource, tokenizer: Path | None) -> ModelSource:
    """Return a model's source, with the folder that stands for its GGUF file if it has one.

    Raises:
        ModelNotFoundError: several GGUF files.
        UsageError: a tokenizer for a model that is no GGUF file.
    """
    file = _gguf_of(ref, found.path)
    if file is not None:
        return replace(found, path=model_folder(file, tokenizer))
    if tokenizer is not None:
        raise UsageError(f"--tokenizer is for GGUF files, but {ref.text} is none", hint="leave out --tokenizer")
    return found


def _gguf_of(ref: ModelRef, path: Path) -> Path | None:
    """Return the GGUF file at a path; None for a folder with a model of another kind."""
    if path.is_file():
        return path
    if ref.kind == "hub":
        is_other = ref.variant is None and (path / "config.json").is_file()
        return None if is_other else find_file(path, ref.variant)
    return None if (path / "config.json").is_file() else _only_gguf(path)


def look_up_folder(ref: ModelRef) -> ModelSource:
    """Return the folder or the GGUF file that a path names, without opening it.

    Raises:
        ModelNotFoundError: nothing has the path, or a file that is no GGUF file.
    """
    assert ref.path is not None
    if ref.path.is_file() and is_gguf(ref.path):
        return ModelSource(name=ref.text, path=ref.path)
    if ref.path.is_file():
        hint = folder_hint(ref.path) if (ref.path.parent / "config.json").is_file() else FORMS
        raise ModelNotFoundError(f"{ref.path} is a file, not a model's folder", hint=hint)
    if not ref.path.is_dir():
        message, hint = no_such_path(ref.path)
        raise ModelNotFoundError(message, hint=hint)
    return ModelSource(name=ref.text, path=ref.path)


def _only_gguf(folder: Path) -> Path:
    """Return the only GGUF file in a folder.

    Raises:
        ModelNotFoundError: no GGUF file, or several.
    """
    files = gguf_files(folder)
    if not files:
        raise ModelNotFoundError(
            f"{folder} has no config.json and no GGUF files", hint="give the folder that holds config.json"
        )
    if len(files) > 1:
        listed = ", ".join(f"{file.name} ({format_bytes(total_bytes(file))})" for file in files)
        raise ModelNotFoundError(f"{folder} has several GGUF files: {listed}", hint=f"name one, such as {files[0]}")
    return files[0]
