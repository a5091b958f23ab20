"""Finding the files of a model by its name: in a folder, in the hub's cache, on the hub, or synthetic."""

from collections.abc import Callable
from pathlib import Path

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.ref import SHAPE_PREFIX, ModelRef, demo_source
from specchat.models.catalog.shape import Shape
from specchat.models.catalog.suggest import FORMS, folder_hint, is_gguf
from specchat.models.gguf.folder import gguf_files, model_folder, total_bytes
from specchat.models.hub.cache import look_up_cached, snapshot_source
from specchat.models.hub.download import LOG, Download, fetch, look_up_online
from specchat.models.hub.errors import hub_errors
from specchat.records.model import ModelSource
from specchat.units import format_bytes

# A model that must be downloaded, or a synthetic one that must be created.
Missing = Download | Shape


def look_up(ref: ModelRef, *, offline: bool, warn: Callable[[str], None] = LOG.warning) -> ModelSource | Missing:
    """Find the files of `ref`, or else what is missing; download and create nothing.

    Args:
        ref: parsed MODEL argument.
        offline: whether the network must not be used; HF_HUB_OFFLINE=1 has the same effect.
        warn: receives a one-line warning when a cached copy is used because the hub is unreachable.

    Raises:
        ModelNotFoundError: a missing folder, repository or revision, or one without weights.
        ModelGatedError: a missing login or licence agreement.
        ModelNotCachedError: no complete copy in the cache, while offline.
        PickledCheckpointError: weights only as pickles.
        ModelError: an unreachable or failing hub.
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
    """Download or create a missing model, after the user's consent.

    Args:
        missing: result of `look_up`.
        progress: receives (bytes done, bytes in total), possibly from other threads, but from one at a time.
        warn: receives one line about the files of a synthetic model.

    Raises:
        ModelError: an unreachable or failing hub.
        DoesNotFitError: the disk is too small.
    """
    if isinstance(missing, Download):
        return snapshot_source(missing.ref, fetch(missing, progress))
    from specchat.models.synthetic.layers import materialise  # imports torch

    return materialise(missing, progress=progress, warn=warn)


def sketch(missing: Missing, folder: Path) -> ModelSource:
    """Download or write only the configuration of a missing model, one small file, which is enough for a plan.

    Args:
        missing: result of `look_up`.
        folder: existing folder for the configuration of a synthetic model.

    Raises:
        ModelError: an unreachable or failing hub.
    """
    if isinstance(missing, Download):
        from huggingface_hub import hf_hub_download

        ref = missing.ref
        assert ref.repo_id is not None
        with hub_errors(ref):
            config = hf_hub_download(ref.repo_id, "config.json", revision=missing.revision)
        return snapshot_source(ref, Path(config).parent)
    from specchat.models.synthetic.layers import LABEL, shape_files  # imports torch

    path = folder / missing.label.replace("/", "-")
    path.mkdir()
    (path / "config.json").write_bytes(shape_files(missing)["config.json"])
    return ModelSource(name=f"{SHAPE_PREFIX}{missing.label}", path=path, label=LABEL)


def _look_up_folder(ref: ModelRef) -> ModelSource:
    assert ref.path is not None
    if ref.path.is_file() and is_gguf(ref.path):
        return ModelSource(name=ref.text, path=model_folder(ref.path))
    if ref.path.is_file():
        hint = folder_hint(ref.path) if (ref.path.parent / "config.json").is_file() else FORMS
        raise ModelNotFoundError(f"{ref.path} is a file, not a model's folder", hint=hint)
    if not ref.path.is_dir():
        raise ModelNotFoundError(f"folder {ref.path} does not exist", hint="a hub id has the form org/name, without ./")
    if not (ref.path / "config.json").is_file():
        return _look_up_gguf(ref, gguf_files(ref.path))
    return ModelSource(name=ref.text, path=ref.path)


def _look_up_gguf(ref: ModelRef, files: list[Path]) -> ModelSource:
    """Return the model of the only GGUF file in a folder.

    Raises:
        ModelNotFoundError: no GGUF file, or several.
    """
    if not files:
        raise ModelNotFoundError(
            f"{ref.path} has no config.json and no GGUF files", hint="give the folder that holds config.json"
        )
    if len(files) > 1:
        listed = ", ".join(f"{file.name} ({format_bytes(total_bytes(file))})" for file in files)
        raise ModelNotFoundError(f"{ref.path} has several GGUF files: {listed}", hint=f"name one, such as {files[0]}")
    return ModelSource(name=ref.text, path=model_folder(files[0]))
