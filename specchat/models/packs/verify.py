"""Holding a pack's data against its checksums: chunk by chunk as they are first read, or all at once."""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specchat.errors import ModelError
from specchat.models.packs.file_format import chunk_span
from specchat.models.packs.pack import Pack, fail_on_chunk


class ChunkVerifier:
    """Holds a pack's data against their checksums as they are first read in this process; for any thread."""

    def __init__(self, pack: Pack) -> None:
        self._layers = pack.layers
        self._verified: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def is_verified(self, layer: int, chunk: int) -> bool:
        """Whether the chunk has been found good before."""
        return (layer, chunk) in self._verified

    def verify(self, layer: int, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Checks one chunk as it was read, unless it has been checked before.

        Args:
            layer: index of the decoder layer.
            chunk: index of the chunk in its blob.
            data: all of the chunk's bytes.

        Raises:
            CorruptCheckpointError: they are not what was written.
        """
        if self.is_verified(layer, chunk):
            return
        packed = self._layers[layer]
        if zlib.crc32(data) != packed.crc32s[chunk]:
            fail_on_chunk(packed.path, chunk)
        with self._lock:
            self._verified.add((layer, chunk))

    def verify_layer(self, layer: int, data: bytes | bytearray | memoryview) -> None:
        """`verify` for all chunks of a whole blob."""
        view = memoryview(data)
        for chunk in range(self._layers[layer].num_chunks):
            begin, end = self._layers[layer].chunk(chunk)
            self.verify(layer, chunk, view[begin:end])


@dataclass(frozen=True)
class Damage:
    """A file of a pack that is not as it was written; deleting it lets `build_pack` write it again."""

    path: Path
    reason: str


def verify_pack(pack: Pack, progress: Callable[[int, int], None] = lambda done, total: None) -> Sequence[Damage]:
    """Reads all of a pack's data from the disk and checks them.

    Args:
        pack: from `open_pack`.
        progress: told (bytes checked, bytes in all).

    Returns:
        What is damaged or cannot be read; nothing if the pack is good.
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
