"""Stores of other programs, as these programs write them."""

import hashlib
import json
import shutil
from pathlib import Path

from support.gguf_files import save_gguf
from support.tiny_models import make_config, random_model

MODEL = "application/vnd.ollama.image.model"


def save_tiny_gguf(folder: Path) -> Path:
    """Save a tiny model as a GGUF file, and return the file."""
    file = folder / "tiny-Q8_0.gguf"
    save_gguf(random_model(make_config("llama")), file)
    return file


def point_stores_to(monkeypatch, folder: Path) -> None:
    """Make specchat look for the hub's cache and the stores of other programs below a folder only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("OLLAMA_MODELS", str(folder / "ollama"))
    monkeypatch.setenv("LLAMA_CACHE", str(folder / "llama.cpp"))
    monkeypatch.setattr("specchat.models.hub.stores._PACKAGE", "no_such_package_of_models")


def put_into_ollama(folder: Path, name: str, file: Path, *, layers: tuple[str, ...] = (MODEL,)) -> Path:
    """Store a GGUF file as `ollama create` does, and return the manifest.

    Args:
        folder: folder of models.
        name: HOST/NAMESPACE/MODEL/TAG.
        file: file to copy.
        layers: types of the layers, which all name this file.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blob = folder / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, blob)
    entry = {"digest": f"sha256:{digest}", "size": blob.stat().st_size}
    manifest = folder / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [{"mediaType": each, **entry} for each in layers]}))
    return manifest
