"""A failed load leaves no thread, no open file and no slot memory behind."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.engines import make_plan
from support.loading import load_engine
from support.plans import changed
from support.streamed import NUM_LAYERS, PackedModel
from support.threads import FAILURES, at_most, watched_threads
from support.tiny_models import make_config, random_model, save

from specchat.engine.engine import Engine
from specchat.errors import AllocationError, UnsupportedModelError
from specchat.records.model import ModelSource
from specchat.records.plan import Plan


@contextmanager
def nothing_stays() -> Iterator[None]:
    """Check that slot memory and file descriptors are released."""
    slots = weakref.WeakSet[mmap.mmap]()

    class Memory(mmap.mmap):
        def __init__(self, *_: object, **__: object) -> None:
            slots.add(self)

    files = open_files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmap.mmap", Memory)
        yield
    gc.collect()
    assert not slots
    assert open_files() == files


def open_files() -> set[str]:
    gc.collect()  # what earlier tests left must not be closed in the middle of this one
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def streaming_plan(source: ModelSource, num_layers: int, in_ram: Sequence[int] = ()) -> Plan:
    return changed(make_plan(source, None, num_layers=num_layers, resident=[0]), in_ram=tuple(in_ram))


def check_every_start(load: Callable[[], Engine], failure: str) -> None:
    """Make the first thread fail to start, then the second, and so on."""
    with nothing_stays(), watched_threads() as threads:
        load().close()
    assert threads.count > 1
    for failing in range(1, threads.count + 1):
        with (
            nothing_stays(),
            at_most(60),
            watched_threads(failing, failure) as threads,
            pytest.raises(AllocationError, match="thread"),
        ):
            load()
        assert threads.count == failing and not threads.num_running


@pytest.mark.parametrize("failure", [FAILURES[0], pytest.param(FAILURES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "in_ram", [pytest.param((), id="disk"), pytest.param((2, 3), id="some mapped", marks=pytest.mark.slow)]
)
def test_pack_reader_threads_that_cannot_start(packed_model: PackedModel, in_ram: tuple[int, ...], failure: str):
    plan, source = streaming_plan(packed_model.source, NUM_LAYERS, in_ram), packed_model.source
    check_every_start(lambda: load_engine(plan, source, None, packed_model.pack), failure)


@pytest.mark.parametrize("failure", [pytest.param(FAILURES[0], marks=pytest.mark.slow), FAILURES[1]])
def test_shard_reader_threads_that_cannot_start(failure: str, tmp_path: Path):
    source = save(random_model(make_config("mistral")), tmp_path / "model")
    check_every_start(lambda: load_engine(streaming_plan(source, 4), source, None), failure)


def test_an_engine_without_a_plan_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A plan checks architectures, but an engine may be loaded under a plan that was made by hand."""
    source = save(random_model(make_config("mistral")), tmp_path / "model")
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("specchat.models.sizes.cache._checked", set())
    monkeypatch.setattr("specchat.engine.selfcheck._TOLERANCE", -1.0)
    with nothing_stays(), pytest.raises(UnsupportedModelError, match="scores trees differently"):
        load_engine(streaming_plan(source, 4), source, None)
