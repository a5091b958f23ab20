"""Packs: a model's weights written once more, one aligned blob per layer, so that passes read at the disk's own speed.

A pack is a folder `packs/<key>/` in the user's cache: `layer-00000.safetensors` ..., `rest.safetensors`, small files
that came along, and `manifest.json`, which is written last and makes the pack. It may be deleted at any time, whole or
file by file: `build_pack` writes what is missing. How the files look is `pack_format`'s business.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, Protocol

from torch import Tensor

from specchat.config import Dtype, ModelSource
from specchat.errors import CorruptCheckpointError, DoesNotFitError, ModelError
from specchat.models.checkpoint.dtypes import TORCH_DTYPE
from specchat.models.checkpoint.safetensors import Checkpoint, open_checkpoint
from specchat.models.pack_census import LAYOUT_VERSION, MANIFEST, packs_folder
from specchat.models.pack_format import (
    NOT_QUANTIZED,
    PAD_PREFIX,
    TEMPORARY_SUFFIX,
    FileLayout,
    FileRecord,
    chunk_span,
    disk_errors,
    write_small,
    write_tensors,
)
from specchat.models.pack_manifest import JOURNAL, Journal, Manifest, read_journal, read_manifest
from specchat.units import format_bytes

_LOG = logging.getLogger(__name__)

REST = "rest.safetensors"
_NOT_BESIDE = {MANIFEST, JOURNAL}
_OWN_FILE = re.compile(rf"(layer-\d+|rest)\.safetensors|.*{re.escape(TEMPORARY_SUFFIX)}")
_MODEL_HINT = "check the file's permissions and the disk"
_SPARE_DISK_BYTES = 64 << 20  # for manifest, journal and whatever else writes meanwhile


# --- what identifies a pack ----------------------------------------------------------------------------------------


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
    with disk_errors(config, "read", _MODEL_HINT):
        config_sha256 = hashlib.sha256(config.read_bytes()).hexdigest()
    data_starts: dict[Path, int] = {}
    for info in checkpoint.tensors.values():
        data_starts[info.file] = min(info.offset, data_starts.get(info.file, info.offset))
    files = [_identity(source, file, start) for file, start in sorted(data_starts.items())]
    return PackKey(source.revision, tuple(files), config_sha256, dtype, quantizer=quantizer).digest()


def _identity(source: ModelSource, file: Path, data_start: int) -> tuple[str | int, ...]:
    """What tells one state of a weight file from another, at the cost of reading its header at most."""
    with disk_errors(file, "read", _MODEL_HINT):
        if source.revision is not None and file.is_symlink() and (blob := file.readlink()).parent.name == "blobs":
            return file.name, blob.name  # the hub's cache names blobs after their content
        with file.open("rb") as stream:
            header = hashlib.sha256(stream.read(data_start)).hexdigest()
        stat = file.stat()
        return str(file.resolve()), stat.st_size, stat.st_mtime_ns, header


# --- where a pack's tensors come from ------------------------------------------------------------------------------


class LayerSource(Protocol):
    """A model whose tensors can be had layer by layer.

    What `read_layer` returns is used up before the next call. Mappings may make their tensors when asked for them, and
    are asked once for each. The meta mappings tell names, order, shapes and dtypes at no cost: meta tensors, or any.
    """

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def layers_name(self) -> str:
        """The layers' path in the model, such as "model.layers"."""

    def layer_meta(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters as they will be packed: by name within the layer, in module order."""

    def read_layer(self, layer: int) -> Mapping[str, Tensor]:
        """The layer's parameters: CPU tensors."""

    def rest_meta(self) -> Mapping[str, Tensor]:
        """Everything outside the layers' parameters, by full name."""

    def rest(self) -> Mapping[str, Tensor]:
        """The same, as CPU tensors."""


# --- a finished pack -----------------------------------------------------------------------------------------------


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
        """Begin and end of a chunk within the blob; CHUNK_BYTES apart except for the last."""
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
        layouts = [_layer_layout(source, layer) for layer in range(source.num_layers)]
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


def open_pack(key: str, warn: Callable[[str], None] = _LOG.warning) -> Pack | None:
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
    if fault := _fault(folder, manifest):
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
    return bool(names) and manifest.rest.name == REST and names == [_layer_file(i) for i in range(len(names))]


def _fault(folder: Path, manifest: Manifest) -> str | None:
    """The first thing wrong with a pack's files. Small ones are read whole: nothing checks them later."""
    for record in manifest.records:
        if fault := record.fault(folder):
            return fault
    for record in manifest.files:
        if not all(record.good_chunks(folder)):
            return f"{folder / record.name} differs from its checksum"
    return None


def list_packs(warn: Callable[[str], None] = _LOG.warning) -> tuple[Pack, ...]:
    """All finished packs, by key; damaged ones are told to `warn`, unfinished ones left out."""
    folder = packs_folder()
    with disk_errors(folder, "read"):
        keys = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    packs = [open_pack(key, warn) for key in keys]
    return tuple(pack for pack in packs if pack is not None)


# --- making one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackProgress:
    """How far packing is; bytes count data, those found complete from an earlier attempt included.

    Attributes:
        layer: the one being written; num_layers while the rest is.
    """

    layer: int
    num_layers: int
    bytes_done: int
    bytes_total: int


def build_pack(
    key: str,
    source: LayerSource,
    *,
    name: str,
    files: Mapping[str, bytes] | None = None,
    dtype: Dtype | None = None,
    quantizer: str = NOT_QUANTIZED,
    progress: Callable[[PackProgress], None] = lambda _: None,
    warn: Callable[[str], None] = _LOG.warning,
) -> Pack:
    """The pack of `key`, made, completed or mended as far as necessary; layer by layer, one in memory at a time.

    Files that an interrupted attempt completed are kept. Another process that packs the same key is waited for.

    Args:
        key: from `key_for`; whatever identifies the tensors of `source`.
        source: the tensors.
        name: the MODEL, for listings.
        files: small files to lie beside the weights (config.json, tokenizer), by plain name; no weights, no index.
        dtype: of the layers' numbers; None for that of their first tensor.
        quantizer: what makes the layers' matrices, and its version; part of `key`.
        progress: told at the start and as data are written.
        warn: told in one line when another process has to be waited for.

    Raises:
        DoesNotFitError: the disk is, or would become, full; what is packed so far is kept.
        ModelError: the source cannot be read or the pack not written; likewise.
    """
    files = files or {}
    assert not any(Path(file).name != file or file in _NOT_BESIDE or ".safetensors" in file for file in files), files
    folder = packs_folder() / key
    with disk_errors(folder, "make"):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, warn):
        pack = open_pack(key, warn=lambda _: None)  # another process may just have finished it
        if pack is None or not pack.fits(source):
            _Builder(folder, source, files, progress).build(name, dtype, quantizer)
            pack = open_pack(key)
    if pack is None:
        raise ModelError(
            f"{folder} was changed while it was being written", hint="repeat; nothing else may write there"
        )
    return pack


@contextmanager
def _locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that dies. The lock lies beside the deletable folder.

    The lock's empty file stays: whoever deleted it could take it from another process that is about to lock it.
    """
    import filelock

    path = folder.parent / f"{folder.name}.lock"
    lock = filelock.FileLock(path)
    with disk_errors(path, "lock"):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            warn(f"another specchat is packing this model into {folder}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Builder:
    """One attempt at a pack, under its lock."""

    def __init__(
        self,
        folder: Path,
        source: LayerSource,
        files: Mapping[str, bytes],
        progress: Callable[[PackProgress], None],
    ) -> None:
        self._folder = folder
        self._source = source
        self._files = files
        self._progress = progress
        self._layouts = [_layer_layout(source, layer) for layer in range(source.num_layers)]
        self._layouts.append(FileLayout.of(REST, source.rest_meta()))
        self._bytes_total = sum(layout.nbytes for layout in self._layouts)
        self._bytes_done = 0

    def build(self, name: str, dtype: Dtype | None, quantizer: str) -> None:
        """Writes what is missing, then the small files, and last the manifest, which makes the pack."""
        records = self._complete_files()
        stale = self._stale_files(records)
        self._check_disk(records, stale)
        self._clear(stale)
        journal = Journal(self._folder, self._folder.name, list(records.values()))
        self._bytes_done = sum(record.nbytes for record in records.values())
        self._report(0)
        for index, layout in enumerate(self._layouts):
            if layout.name not in records:
                records[layout.name] = self._write(index, layout)
                journal.add(records[layout.name])
        dtypes = {value: short for short, value in TORCH_DTYPE.items()}
        dtype = dtype or dtypes[self._layouts[0].tensors[0].dtype]
        small = tuple(write_small(self._folder, file, data) for file, data in sorted(self._files.items()))
        *layers, rest = (records[layout.name] for layout in self._layouts)
        Manifest(self._folder.name, name, dtype, rest, tuple(layers), small, quantizer).write(self._folder)

    def _complete_files(self) -> dict[str, FileRecord]:
        """Data files of an earlier attempt that are on record, of the right layout and, by size and header, whole."""
        known = read_journal(self._folder, self._folder.name)
        try:
            manifest = read_manifest(self._folder)
        except ValueError:
            manifest = None  # `open_pack` has told
        if manifest is not None and manifest.key == self._folder.name:
            known |= {record.name: record for record in manifest.records}
        return {
            layout.name: known[layout.name]
            for layout in self._layouts
            if layout.name in known
            and known[layout.name].describes(layout)
            and known[layout.name].fault(self._folder) is None
        }

    def _stale_files(self, records: Mapping[str, FileRecord]) -> list[Path]:
        """Data files that are torn, foreign or left over; what else lies in the folder is not ours."""
        with disk_errors(self._folder, "list"):
            paths = sorted(self._folder.iterdir())
        return [path for path in paths if _OWN_FILE.fullmatch(path.name) and path.name not in records]

    def _clear(self, stale: list[Path]) -> None:
        """Removes the manifest, which no longer holds, and then the stale files."""
        for path in [self._folder / MANIFEST, *stale]:
            with disk_errors(path, "delete"):
                path.unlink(missing_ok=True)

    def _check_disk(self, records: Mapping[str, FileRecord], stale: list[Path]) -> None:
        """Stops before anything is touched if the disk would become full."""
        missing = [layout for layout in self._layouts if layout.name not in records]
        wanted = sum(layout.nbytes + len(layout.header()) for layout in missing)
        wanted += sum(map(len, self._files.values()))
        with disk_errors(self._folder, "measure the disk of"):
            free = shutil.disk_usage(self._folder).free + sum(path.lstat().st_size for path in stale)
        if wanted + _SPARE_DISK_BYTES > free:
            raise DoesNotFitError(
                f"the pack needs {format_bytes(wanted)} more on the disk of {self._folder}, "
                f"where {format_bytes(free)} are free",
                hint="free some space, or set SPECCHAT_CACHE_DIR to a folder on a larger disk",
            )

    def _write(self, index: int, layout: FileLayout) -> FileRecord:
        """Writes one layer, or behind the last one the rest."""
        source = self._source
        is_layer = index < source.num_layers
        tensors = _with_full_names(source, index, source.read_layer(index)) if is_layer else source.rest()

        def wrote(num_bytes: int) -> None:
            self._bytes_done += num_bytes
            self._report(index)

        return write_tensors(self._folder, layout, tensors, wrote)

    def _report(self, index: int) -> None:
        self._progress(PackProgress(index, self._source.num_layers, self._bytes_done, self._bytes_total))


def _layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _layer_layout(source: LayerSource, layer: int) -> FileLayout:
    return FileLayout.of(_layer_file(layer), _with_full_names(source, layer, source.layer_meta(layer)))


def _with_full_names(source: LayerSource, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{source.layers_name}.{layer}.{name}": tensor for name, tensor in tensors.items()}
