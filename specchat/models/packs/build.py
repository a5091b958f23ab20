"""The builder of packs: it writes layer by layer, so that the next run completes an interrupted one."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from specchat.errors import DoesNotFitError, ModelError
from specchat.models.checkpoint.dtypes import short_name
from specchat.models.packs.file_format import (
    NOT_QUANTIZED,
    TEMPORARY_SUFFIX,
    FileLayout,
    FileRecord,
    disk_errors,
    write_small,
    write_tensors,
)
from specchat.models.packs.inventory import MANIFEST, packs_folder
from specchat.models.packs.manifest import JOURNAL, Journal, Manifest, read_journal, read_manifest
from specchat.models.packs.pack import LOG, REST, Pack, layer_layout, open_pack
from specchat.models.packs.source import LayerSource, with_full_names
from specchat.records.model import Dtype
from specchat.units import format_bytes

_NOT_BESIDE = {MANIFEST, JOURNAL}

_OWN_FILE = re.compile(rf"(layer-\d+|rest)\.safetensors|.*{re.escape(TEMPORARY_SUFFIX)}")

_SPARE_DISK_BYTES = 64 << 20  # for manifest, journal and other programs' writes


@dataclass(frozen=True)
class PackProgress:
    """Progress of packing, in bytes of data; complete files of an earlier run count too.

    Attributes:
        layer: index of the layer being written; num_layers for the rest.
        num_layers: number of layers.
        bytes_done: bytes written so far.
        bytes_total: bytes of all data files.
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
    warn: Callable[[str], None] = LOG.warning,
) -> Pack:
    """Build, complete or repair the pack of `key`, with one layer in memory at a time.

    Complete files of an interrupted run are kept. If another process packs the same key, wait for it.

    Args:
        key: key from `key_for`, or another identifier of the tensors in `source`.
        source: tensors to pack.
        name: MODEL argument, for listings.
        files: small files to store next to the weights (config.json, tokenizer), by plain name; no weights, no index.
        dtype: dtype of the layers' unquantized tensors; None for the dtype of their first tensor.
        quantizer: quantizer of the layers' matrices with its version; part of `key`.
        progress: receives the progress at the start and while data are written.
        warn: receives a one-line warning when another process must be waited for.

    Raises:
        DoesNotFitError: the disk is full or would become full; complete files are kept.
        ModelError: the source cannot be read, or the pack cannot be written; complete files are kept.
    """
    files = files or {}
    assert not any(Path(file).name != file or file in _NOT_BESIDE or ".safetensors" in file for file in files), files
    folder = packs_folder() / key
    with disk_errors(folder, "make"):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, warn):
        pack = open_pack(key, warn=lambda _: None)  # another process may have finished it
        if pack is None or not pack.fits(source):
            _Builder(folder, source, files, progress).build(name, dtype, quantizer)
            pack = open_pack(key)
    if pack is None:
        raise ModelError(
            f"another program changed {folder} while it was written", hint="run again; nothing else may write there"
        )
    return pack


@contextmanager
def _locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a pack, which the system releases if the process dies. It lies next to the deletable folder.

    Its empty file stays: deleting it could take the lock from another process that is about to acquire it.
    """
    import filelock

    path = folder.parent / f"{folder.name}.lock"
    lock = filelock.FileLock(path)
    with disk_errors(path, "lock"):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            warn(f"waiting for another specchat that packs this model into {folder}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Builder:
    """One run of building a pack, under its lock."""

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
        self._layouts = [layer_layout(source, layer) for layer in range(source.num_layers)]
        self._layouts.append(FileLayout.of(REST, source.rest_meta()))
        self._bytes_total = sum(layout.nbytes for layout in self._layouts)
        self._bytes_done = 0

    def build(self, name: str, dtype: Dtype | None, quantizer: str) -> None:
        """Write missing data files, then the small files, and last the manifest, which completes the pack."""
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
        dtype = dtype or short_name(str(self._layouts[0].tensors[0].dtype))
        assert dtype is not None, "layers are packed in a dtype that passes compute in"
        small = tuple(write_small(self._folder, file, data) for file, data in sorted(self._files.items()))
        *layers, rest = (records[layout.name] for layout in self._layouts)
        Manifest(self._folder.name, name, dtype, rest, tuple(layers), small, quantizer).write(self._folder)

    def _complete_files(self) -> dict[str, FileRecord]:
        """Return recorded data files of an earlier run that match their layout, size and header."""
        known = read_journal(self._folder, self._folder.name)
        try:
            manifest = read_manifest(self._folder)
        except ValueError:
            manifest = None  # damaged; `open_pack` has printed a warning
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
        """Return incomplete, foreign or left-over data files; other files in the folder are not the pack's."""
        with disk_errors(self._folder, "list"):
            paths = sorted(self._folder.iterdir())
        return [path for path in paths if _OWN_FILE.fullmatch(path.name) and path.name not in records]

    def _clear(self, stale: list[Path]) -> None:
        """Delete the outdated manifest, and then the stale files."""
        for path in [self._folder / MANIFEST, *stale]:
            with disk_errors(path, "delete"):
                path.unlink(missing_ok=True)

    def _check_disk(self, records: Mapping[str, FileRecord], stale: list[Path]) -> None:
        """Fail before changing anything if the disk would become full."""
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
        """Write one layer, or the rest if `index` is past the last layer."""
        source = self._source
        is_layer = index < source.num_layers
        tensors = with_full_names(source, index, source.read_layer(index)) if is_layer else source.rest()

        def wrote(num_bytes: int) -> None:
            self._bytes_done += num_bytes
            self._report(index)

        return write_tensors(self._folder, layout, tensors, wrote)

    def _report(self, index: int) -> None:
        self._progress(PackProgress(index, self._source.num_layers, self._bytes_done, self._bytes_total))
