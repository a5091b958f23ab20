"""Tensors that transformers merges: no threads are started, and failures have named errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import make_config, random_model, save

from specchat.errors import CorruptCheckpointError
from specchat.models.hf.conversion import load_converted
from specchat.models.hf.skeleton import Skeleton, build_skeleton


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint that stores experts separately."""
    folder: Path = save(random_model(make_config("mixtral")), tmp_path_factory.mktemp("model")).path
    return load_file(folder / "model.safetensors")


def convert(tensors: dict[str, torch.Tensor]) -> Skeleton:
    skeleton = build_skeleton(make_config("mixtral"), torch.float32)
    load_converted(skeleton, tensors, torch.float32)
    return skeleton


def test_no_threads_are_started(tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch):
    """If memory runs out, transformers would wait forever for a thread that died."""
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *_: pytest.fail("a thread"))
    before = threading.active_count()
    skeleton = convert(tensors)
    assert not any(parameter.is_meta for parameter in skeleton.model.parameters())
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")]
)
def test_lack_of_memory_is_no_corrupt_checkpoint(
    tensors: dict[str, torch.Tensor], error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "stack", fail)
    with pytest.raises(MemoryError):
        convert(tensors)


def test_a_wrong_shape_is_a_corrupt_checkpoint(tensors: dict[str, torch.Tensor]):
    name = next(name for name in tensors if "experts" in name)
    with pytest.raises(CorruptCheckpointError, match="do not match the configuration"):
        convert({**tensors, name: tensors[name][:-1]})
