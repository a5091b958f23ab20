"""Verification of a pack's data: chunk by chunk when first read, or all at once."""

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specchat.errors import ModelError
from specchat.models.packs.file_format import chunk_span, disk_errors
from specchat.models.packs.pack import Pack, fail_on_chunk
from specchat.records.limits import READ_CHUNK_BYTES


class ChunkVerifier:
    """Verifies a pack's chunks when they are first read in this process; thread-safe."""

    def __init__(self, pack: Pack) -> None:
        self._layers = pack.layers
        self._verified: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def is_verified(self, layer: int, chunk: int) -> bool:
        """Return whether the chunk was verified before."""
        return (layer, chunk) in self._verified

    def verify(self, layer: int, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Verify one chunk, unless it was verified before.

        Args:
            layer: index of the decoder layer.
            chunk: index of the chunk in its blob.
            data: bytes of the whole chunk.

        Raises:
            CorruptCheckpointError: the bytes do not match their checksum.
        """
        if self.is_verified(layer, chunk):
            return
        packed = self._layers[layer]
        if zlib.crc32(data) != packed.crc32s[chunk]:
            fail_on_chunk(packed.path, chunk)
        with self._lock:
            self._verified.add((layer, chunk))

    def verify_stored(self, layer: int, begin: int, end: int) -> None:
        """Read and verify the chunks that hold bytes of a layer's file, unless they were verified before.

        Args:
            layer: index of the decoder layer.
            begin: first byte in the file.
            end: end of the bytes in the file.

        Raises:
            CorruptCheckpointError: a chunk does not match its checksum.
            ModelError: the file cannot be read.
        """
        packed = self._layers[layer]
        first, last = ((at - packed.data_offset) // READ_CHUNK_BYTES for at in (begin, end - 1))
        for chunk in range(first, last + 1):
            if not self.is_verified(layer, chunk):
                start, stop = packed.chunk(chunk)
                with disk_errors(packed.path, "read"), packed.path.open("rb", buffering=0) as stream:
                    data = os.pread(stream.fileno(), stop - start, packed.data_offset + start)
                self.verify(layer, chunk, data)

    def verify_layer(self, layer: int, data: bytes | bytearray | memoryview) -> None:
        """Verify all chunks of a whole blob."""
        view = memoryview(data)
        for chunk in range(self._layers[layer].num_chunks):
            begin, end = self._layers[layer].chunk(chunk)
            self.verify(layer, chunk, view[begin:end])


@dataclass(frozen=True)
class Damage:
    """A damaged file of a pack; after its deletion `build_pack` writes it again."""

    path: Path
    reason: str


def verify_pack(pack: Pack, progress: Callable[[int, int], None] = lambda done, total: None) -> Sequence[Damage]:
    """Read all of a pack's data from the disk and verify them.

    Args:
        pack: pack from `open_pack`.
        progress: receives (bytes verified, bytes in total).

    Returns:
        Damaged or unreadable files; empty if the pack is good.
    """
    damages = []
    done, total = 0, sum(record.nbytes for record in pack.manifest.records)
    for record in pack.manifest.records:
        path = pack.folder / record.name
        try:
            if fault := record.fault(pack.folder):
                damages.append(Damage(path, fault))
                continue
            for index, good in enumerate(record.good_chunks(pack.folder, from_disk=True)):
                if not good:
                    damages.append(Damage(path, f"chunk {index} of {path} is damaged: its checksum differs"))
                begin, end = chunk_span(record.nbytes, index)
                done += end - begin
                progress(done, total)
        except ModelError as exc:
            damages.append(Damage(path, exc.message))
    return damages
