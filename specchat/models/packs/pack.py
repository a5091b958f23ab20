"""Packs: a copy of a model's weights as one aligned blob per layer, so that passes read at the disk's own speed.

A pack is a folder `packs/<key>/` in the user's cache: `layer-00000.safetensors` ..., `rest.safetensors`, copied small
files, and `manifest.json`, which is written last and completes the pack. It may be deleted at any time, whole or file
by file: `build_pack` writes what is missing. `file_format` defines the files.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from specchat.errors import CorruptCheckpointError
from specchat.files import read_regular
from specchat.models.checkpoint.safetensors import Checkpoint, open_checkpoint
from specchat.models.packs.file_format import (
    NOT_QUANTIZED,
    PAD_PREFIX,
    FileLayout,
    FileRecord,
    chunk_span,
    disk_errors,
)
from specchat.models.packs.inventory import LAYOUT_VERSION, MANIFEST, packs_folder
from specchat.models.packs.manifest import Manifest, read_manifest
from specchat.models.packs.source import LayerSource, with_full_names
from specchat.records.model import Dtype, ModelSource

LOG = logging.getLogger(__name__)

REST = "rest.safetensors"

MODEL_HINT = "check the file's permissions and the disk"


@dataclass(frozen=True)
class PackKey:
    """Everything that a pack's bytes depend on.

    Attributes:
        revision: hub commit, or None for other folders.
        files: per weight file, name and blob id in the hub's cache, or else path, size, mtime in ns and the sha256 of
            the header.
        config_sha256: sha256 of config.json.
        dtype: dtype of the packed layers.
        layout_version: version of the data files.
        quantizer: quantizer of the matrices, with its version.
    """

    revision: str | None
    files: tuple[tuple[str | int, ...], ...]
    config_sha256: str
    dtype: Dtype
    layout_version: int = LAYOUT_VERSION
    quantizer: str = NOT_QUANTIZED

    def digest(self) -> str:
        """Return the key as a folder name of 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def key_for(source: ModelSource, checkpoint: Checkpoint, dtype: Dtype, quantizer: str = NOT_QUANTIZED) -> str:
    """Return the key of a model's pack, which changes with the model's files.

    Args:
        source: source of the model, with config.json.
        checkpoint: opened checkpoint of `source`.
        dtype: dtype of the packed layers.
        quantizer: quantizer of the matrices, with its version.

    Raises:
        ModelError: a file cannot be read.
    """
    config = source.path / "config.json"
    with disk_errors(config, "read", MODEL_HINT):
        config_sha256 = hashlib.sha256(read_regular(config)).hexdigest()
    data_starts: dict[Path, int] = {}
    for info in checkpoint.tensors.values():
        data_starts[info.file] = min(info.offset, data_starts.get(info.file, info.offset))
    files = [_identity(source, file, start) for file, start in sorted(data_starts.items())]
    return PackKey(source.revision, tuple(files), config_sha256, dtype, quantizer=quantizer).digest()


def _identity(source: ModelSource, file: Path, data_start: int) -> tuple[str | int, ...]:
    """Return a fingerprint of a weight file, reading its header at most."""
    with disk_errors(file, "read", MODEL_HINT):
        if source.revision is not None and file.is_symlink() and (blob := file.readlink()).parent.name == "blobs":
            return file.name, blob.name  # the hub's cache names blobs after their content
        with file.open("rb") as stream:
            header = hashlib.sha256(stream.read(data_start)).hexdigest()
        stat = file.stat()
        return str(file.resolve()), stat.st_size, stat.st_mtime_ns, header


@dataclass(frozen=True)
class PackedLayer:
    """One layer's blob in its file.

    Attributes:
        path: file of the layer.
        data_offset: start of the blob in the file, a multiple of 4096 bytes.
        nbytes: length of the blob, a multiple of 4096 bytes; `LayerLayout` describes its contents.
        crc32s: checksums of the blob's chunks.
    """

    path: Path
    data_offset: int
    nbytes: int
    crc32s: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Number of chunks in the blob."""
        return len(self.crc32s)

    def chunk(self, index: int) -> tuple[int, int]:
        """Return begin and end of a chunk within the blob; all but the last have READ_CHUNK_BYTES."""
        return chunk_span(self.nbytes, index)


@dataclass(frozen=True)
class Pack:
    """A pack with valid manifest, sizes and headers; data are verified when first read (`ChunkVerifier`)."""

    folder: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """Key of the pack."""
        return self.manifest.key

    @property
    def name(self) -> str:
        """MODEL that the pack was first made for."""
        return self.manifest.name

    @property
    def dtype(self) -> Dtype:
        """Dtype of the layers' unquantized tensors."""
        return self.manifest.dtype

    @property
    def quantizer(self) -> str:
        """Quantizer of the layers' matrices with its version; "none" if they are unquantized."""
        return self.manifest.quantizer

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.manifest.nbytes

    @property
    def layers(self) -> tuple[PackedLayer, ...]:
        """Blobs of the layers."""
        return tuple(
            PackedLayer(self.folder / record.name, record.data_offset, record.nbytes, record.crc32s)
            for record in self.manifest.layers
        )

    @property
    def rest(self) -> Path:
        """The file of everything outside the layers' parameters."""
        return self.folder / REST

    def fits(self, source: LayerSource) -> bool:
        """Return whether the layers have the layout of `source`; another transformers may order them differently."""
        layouts = [layer_layout(source, layer) for layer in range(source.num_layers)]
        records = self.manifest.layers
        return len(records) == len(layouts) and all(map(FileRecord.describes, records, layouts))

    def checkpoint(self) -> Checkpoint:
        """Open all of the pack's tensors as a checkpoint; the data of layers are not verified.

        Raises:
            CorruptCheckpointError: a file was damaged after the pack was opened.
        """
        whole = open_checkpoint(self.folder)
        tensors = {key: info for key, info in whole.tensors.items() if not key.startswith(PAD_PREFIX)}
        return Checkpoint(self.folder, MappingProxyType(tensors))

    def rest_checkpoint(self) -> Checkpoint:
        """Open the tensors of `rest` as a checkpoint, after verifying their data.

        Raises:
            CorruptCheckpointError: the data do not match their checksums.
            ModelError: the file cannot be read.
        """
        for index, good in enumerate(self.manifest.rest.good_chunks(self.folder)):
            if not good:
                fail_on_chunk(self.rest, index)
        tensors = {key: info for key, info in self.checkpoint().tensors.items() if info.file == self.rest}
        return Checkpoint(self.folder, MappingProxyType(tensors))


def open_pack(key: str, warn: Callable[[str], None] = LOG.warning) -> Pack | None:
    """Open the finished pack of `key` without reading data; None if there is none.

    Args:
        key: key from `key_for`.
        warn: receives a one-line warning about a damaged pack, which `build_pack` repairs.

    Raises:
        ModelError: a file exists but cannot be read.
    """
    folder = packs_folder() / key
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        if manifest.key != key or not _is_complete(manifest):
            raise ValueError(f"{folder / MANIFEST} is another pack's manifest")
    except ValueError as exc:
        warn(f"damaged pack: {exc}")
        return None
    if fault := find_fault(folder, manifest):
        warn(f"damaged pack: {fault}")
        return None
    return Pack(folder, manifest)


def fail_on_chunk(path: Path, chunk: int) -> NoReturn:
    """Report damaged data of a packed file, and how to repair the pack."""
    raise CorruptCheckpointError(
        f"chunk {chunk} of {path} is damaged: its checksum differs",
        hint=f"delete {path} or the whole folder; it is safe to delete, and specchat writes it again",
    )


def _is_complete(manifest: Manifest) -> bool:
    """Return whether the manifest names all files of a pack."""
    names = [record.name for record in manifest.layers]
    return bool(names) and manifest.rest.name == REST and names == [layer_file(i) for i in range(len(names))]


def find_fault(folder: Path, manifest: Manifest) -> str | None:
    """Describe the first fault of a pack's files; None if there is none. Only this check reads small files whole."""
    for record in manifest.records:
        if fault := record.fault(folder):
            return fault
    for record in manifest.files:
        if not all(record.good_chunks(folder)):
            return f"{folder / record.name} differs from its checksum"
    return None


def list_packs(warn: Callable[[str], None] = LOG.warning) -> tuple[Pack, ...]:
    """List all finished packs by key; `warn` receives the damaged ones, unfinished ones are skipped."""
    folder = packs_folder()
    with disk_errors(folder, "read"):
        keys = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    packs = [open_pack(key, warn) for key in keys]
    return tuple(pack for pack in packs if pack is not None)


def layer_file(layer: int) -> str:
    """Return the file name of a packed layer."""
    return f"layer-{layer:05d}.safetensors"


def layer_layout(source: LayerSource, layer: int) -> FileLayout:
    """Return how a layer lies in its file."""
    return FileLayout.of(layer_file(layer), with_full_names(source, layer, source.layer_meta(layer)))
