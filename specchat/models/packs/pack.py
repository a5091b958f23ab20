"""Packs: a model's weights written once more, one aligned blob per layer, so that passes read at the disk's own speed.

A pack is a folder `packs/<key>/` in the user's cache: `layer-00000.safetensors` ..., `rest.safetensors`, small files
that came along, and `manifest.json`, which is written last and makes the pack. It may be deleted at any time, whole or
file by file: `build_pack` writes what is missing. How the files look is the business of `file_format`.
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
        revision: the hub commit, or None for other folders.
        files: per weight file, its name and blob id in the hub's cache, or else path, size, mtime in ns and the
            sha256 of its header.
        config_sha256: of config.json.
        dtype: of the packed layers.
        layout_version: of the packed files.
        quantizer: what makes the matrices, and its version.
    """

    revision: str | None
    files: tuple[tuple[str | int, ...], ...]
    config_sha256: str
    dtype: Dtype
    layout_version: int = LAYOUT_VERSION
    quantizer: str = NOT_QUANTIZED

    def digest(self) -> str:
        """The key as a folder's name: 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def key_for(source: ModelSource, checkpoint: Checkpoint, dtype: Dtype, quantizer: str = NOT_QUANTIZED) -> str:
    """The name of the pack of a model, the same for as long as its files stay the same.

    Args:
        source: has config.json.
        checkpoint: of `source`.
        dtype: of the packed layers.
        quantizer: what makes the matrices, and its version.

    Raises:
        ModelError: a file cannot be read.
    """
    config = source.path / "config.json"
    with disk_errors(config, "read", MODEL_HINT):
        config_sha256 = hashlib.sha256(config.read_bytes()).hexdigest()
    data_starts: dict[Path, int] = {}
    for info in checkpoint.tensors.values():
        data_starts[info.file] = min(info.offset, data_starts.get(info.file, info.offset))
    files = [_identity(source, file, start) for file, start in sorted(data_starts.items())]
    return PackKey(source.revision, tuple(files), config_sha256, dtype, quantizer=quantizer).digest()


def _identity(source: ModelSource, file: Path, data_start: int) -> tuple[str | int, ...]:
    """What tells one state of a weight file from another, at the cost of reading its header at most."""
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
        path: of the file.
        data_offset: where the blob begins, a multiple of 4096.
        nbytes: its length, a multiple of 4096; laid out as `LayerLayout` has it.
        crc32s: of its chunks.
    """

    path: Path
    data_offset: int
    nbytes: int
    crc32s: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        """Checksums of the blob."""
        return len(self.crc32s)

    def chunk(self, index: int) -> tuple[int, int]:
        """Begin and end of a chunk within the blob; READ_CHUNK_BYTES apart except for the last."""
        return chunk_span(self.nbytes, index)


@dataclass(frozen=True)
class Pack:
    """A pack whose manifest, sizes and headers are good; its data are checked as they are read (`ChunkVerifier`)."""

    folder: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """What it is the pack of."""
        return self.manifest.key

    @property
    def name(self) -> str:
        """The MODEL that it was first made for."""
        return self.manifest.name

    @property
    def dtype(self) -> Dtype:
        """Of the layers."""
        return self.manifest.dtype

    @property
    def quantizer(self) -> str:
        """What made the layers' matrices, and its version; "none" where they are numbers of `dtype`."""
        return self.manifest.quantizer

    @property
    def nbytes(self) -> int:
        """Its size on the disk."""
        return self.manifest.nbytes

    @property
    def layers(self) -> tuple[PackedLayer, ...]:
        """The blobs."""
        return tuple(
            PackedLayer(self.folder / record.name, record.data_offset, record.nbytes, record.crc32s)
            for record in self.manifest.layers
        )

    @property
    def rest(self) -> Path:
        """The file of everything outside the layers' parameters."""
        return self.folder / REST

    def fits(self, source: LayerSource) -> bool:
        """Whether the packed layers are laid out as `source` has them; another transformers may order them anew."""
        layouts = [layer_layout(source, layer) for layer in range(source.num_layers)]
        records = self.manifest.layers
        return len(records) == len(layouts) and all(map(FileRecord.describes, records, layouts))

    def checkpoint(self) -> Checkpoint:
        """All of the pack's tensors; the data of layers are not checked.

        Raises:
            CorruptCheckpointError: a file has been damaged since the pack was opened.
        """
        whole = open_checkpoint(self.folder)
        tensors = {key: info for key, info in whole.tensors.items() if not key.startswith(PAD_PREFIX)}
        return Checkpoint(self.folder, MappingProxyType(tensors))

    def rest_checkpoint(self) -> Checkpoint:
        """The tensors of `rest`, after checking its data.

        Raises:
            CorruptCheckpointError: the data differ from their checksums.
            ModelError: the file cannot be read.
        """
        for index, good in enumerate(self.manifest.rest.good_chunks(self.folder)):
            if not good:
                fail_on_chunk(self.rest, index)
        tensors = {key: info for key, info in self.checkpoint().tensors.items() if info.file == self.rest}
        return Checkpoint(self.folder, MappingProxyType(tensors))


def open_pack(key: str, warn: Callable[[str], None] = LOG.warning) -> Pack | None:
    """The finished pack of `key`, or None; data are not read.

    Args:
        key: from `key_for`.
        warn: told in one line if there is a pack but a damaged one, which `build_pack` mends.

    Raises:
        ModelError: a file is there and cannot be read.
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
    """Says that a packed file's data are not what was written, and how to mend that."""
    raise CorruptCheckpointError(
        f"chunk {chunk} of {path} is damaged: its checksum differs",
        hint=f"delete {path} (or the whole folder): it is safe to delete, and is written again from the model",
    )


def _is_complete(manifest: Manifest) -> bool:
    """Whether the manifest names the files that a pack has."""
    names = [record.name for record in manifest.layers]
    return bool(names) and manifest.rest.name == REST and names == [layer_file(i) for i in range(len(names))]


def find_fault(folder: Path, manifest: Manifest) -> str | None:
    """The first thing wrong with a pack's files. Small ones are read whole: nothing checks them later."""
    for record in manifest.records:
        if fault := record.fault(folder):
            return fault
    for record in manifest.files:
        if not all(record.good_chunks(folder)):
            return f"{folder / record.name} differs from its checksum"
    return None


def list_packs(warn: Callable[[str], None] = LOG.warning) -> tuple[Pack, ...]:
    """All finished packs, by key; damaged ones are told to `warn`, unfinished ones left out."""
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
