"""What tests of streaming without a GPU share: a packed model with known bytes, and CUDA's pinning calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.packs.pack import Pack
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.reader import WeightReader
from support.loading import prepare
from support.tiny_models import make_config, random_model, save

NUM_LAYERS = 5


class Runtime:
    """CUDA's pinning calls, as far as they are promised: an error code, and nothing pinned twice or left behind."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pinned: dict[int, int] = {}
        self.refusals = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert address % 4096 == 0 and flags == 0 and address not in self.pinned
        if sum(self.pinned.values()) + num_bytes > self.room:
            self.refusals += 1
            return 2  # cudaErrorMemoryAllocation
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def silent(_: object) -> None:
    """Who need not be told of packing."""


@contextmanager
def tiny_packs(folder: Path) -> Iterator[None]:
    """Models are packed however small they are, into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECCHAT_CACHE_DIR", str(folder / "cache"))
        patch.setattr("specchat.models.packs.prepare.SMALL_BYTES", 0)
        yield


class PackedModel:
    """A tiny packed model and the bytes of its layers."""

    def __init__(self, folder: Path) -> None:
        source = save(random_model(make_config("llama_tied")).to(torch.bfloat16), folder / "model")
        pack = prepare(source, "fp32", progress=silent, warn=silent)
        assert pack is not None
        self.pack: Pack = pack
        self.source = source
        config = load_config(source.path)
        self.skeleton = build_skeleton(config, torch.float32)
        self.layouts = [LayerLayout.of(layer) for layer in self.skeleton.layers]
        self.blobs = [torch.zeros(layout.nbytes, dtype=torch.uint8) for layout in self.layouts]
        with self.reader() as reader:
            for index, (layout, blob) in enumerate(zip(self.layouts, self.blobs, strict=True)):
                reader.read_layer(index, layout.views(blob))

    def reader(self) -> WeightReader:
        return WeightReader(self.skeleton, open_checkpoint(self.source.path))
