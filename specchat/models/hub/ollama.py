"""The models of ollama: a manifest per model, and files named after their checksums.

`manifests/HOST/NAMESPACE/MODEL/TAG` is a JSON object with a list of layers. The layer of the type `image.model` is a
GGUF file, `blobs/sha256-CHECKSUM`.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specchat.files import open_regular
from specchat.models.catalog.suggest import is_gguf
from specchat.models.hub.stored import StoredModel

PREFIX = "ollama:"
_ORIGIN = "ollama"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"  # which ollama leaves out of names
_MOST_BYTES = 1 << 20  # of a manifest; usual ones have a few hundred
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_LAYER = "application/vnd.ollama.image."


def ollama_models() -> Iterator[StoredModel]:
    """Yield the models in ollama's folders, also those with a damaged manifest."""
    for folder in _folders():
        for manifest in sorted((folder / "manifests").glob("*/*/*/*")):
            if not manifest.is_dir() and not manifest.name.startswith("."):
                yield _model(folder, manifest)


def _folders() -> list[Path]:
    """Return the folders of models: the chosen one, or else those of the user and of the Linux service."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _model(folder: Path, manifest: Path) -> StoredModel:
    host, namespace, model, tag = manifest.relative_to(folder / "manifests").parts
    path = "/".join(
        [*([] if host == _HOST else [host]), *([] if (host, namespace) == (_HOST, _NAMESPACE) else [namespace])]
    )
    full = f"{path}/{model}" if path else model
    short = full if tag == _TAG else f"{full}:{tag}"
    names = dict.fromkeys((f"{PREFIX}{full}:{tag}", short, f"{full}:{tag}"))
    file, nbytes, problem = _file(folder, manifest)
    return StoredModel(
        f"{PREFIX}{short}", _ORIGIN, file or manifest, nbytes, f"ollama rm {short}", tuple(names), problem
    )


def _file(folder: Path, manifest: Path) -> tuple[Path | None, int, str]:
    """Return a model's GGUF file and its bytes, or the reason why there is none."""
    layers = _layers(manifest)
    if layers is None:
        return None, 0, "its manifest is damaged"
    digests = [str(layer.get("digest")) for layer in layers if layer.get("mediaType") == f"{_LAYER}model"]
    if len(digests) != 1 or not _DIGEST.fullmatch(digests[0]):
        return None, 0, "its manifest names several files" if len(digests) > 1 else "its manifest names no GGUF file"
    file = _blob(folder, digests[0])
    if file is None:
        return None, 0, "its file is missing"
    if not is_gguf(file):
        return file, file.stat().st_size, "not a GGUF file"
    has_adapter = any(layer.get("mediaType") == f"{_LAYER}adapter" for layer in layers)
    return file, file.stat().st_size, "has a LoRA adapter, which specchat does not read" if has_adapter else ""


def _layers(manifest: Path) -> list[dict[str, Any]] | None:
    try:
        with open_regular(manifest) as stream:
            layers = json.loads(stream.read(_MOST_BYTES))["layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return [each for each in layers if isinstance(each, dict)] if isinstance(layers, list) else None


def _blob(folder: Path, digest: str) -> Path | None:
    """Return the file of a checksum; versions before 0.1.37 used a colon in its name."""
    names = (digest.replace(":", "-"), digest)
    return next((file for name in names if (file := folder / "blobs" / name).is_file()), None)
