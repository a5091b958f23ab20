"""Layers read past the page cache, mapped from it, or read from the checkpoint give equal bits; damage is found."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuts import cut_short
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine, load_model, prepare
from support.plans import changed
from support.streamed import silent, tiny_packs
from support.threads import watched_threads
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.model import TreeModel
from specchat.engine.streaming.cpu import MappedStreamer, MixedStreamer, ThreadStreamer
from specchat.engine.streaming.readers import PackLayerReader, ShardLayerReader, is_unbuffered, open_unbuffered
from specchat.errors import CorruptCheckpointError, ModelError
from specchat.hardware.disk import evict, resident_share
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.packs.pack import Pack
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from specchat.records.plan import Plan

Tier = Literal["ram", "disk"]
ARCHITECTURES = ("llama_tied", "mixtral", "gpt_oss")
NUM_PASSES = 10

pytestmark = pytest.mark.usefixtures("packs_tiny_models")


def make_source(architecture: str, folder: Path) -> ModelSource:
    """Save the model in bf16, so that float32 needs a pack."""
    return save(random_model(make_config(architecture)).to(torch.bfloat16), folder)


def make_pack(source: ModelSource) -> Pack:
    pack = prepare(source, "fp32", progress=silent, warn=silent)
    assert pack is not None
    return pack


def load(
    source: ModelSource, pack: Pack | None, *, resident: Sequence[int] | None, slots: int, tier: Tier | Collection[int]
) -> TreeModel:
    return load_model(
        source,
        dtype=torch.float32,
        device=torch.device("cpu"),
        resident=resident,
        num_slots=slots,
        cache_rows=64,
        chunk_rows=16,
        in_ram=range(99) if tier == "ram" else () if tier == "disk" else tier,
        pack=pack,
    )


def hidden(model: TreeModel, prompt: list[int]) -> torch.Tensor:
    model.cache.truncate(0, 0)
    return model.append(prompt)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tier_gives_the_same_bits(architecture: str, tmp_path: Path):
    source, prompt = make_source(architecture, tmp_path / "model"), random_prompt(20, VOCAB)
    pack = make_pack(source)
    expected = hidden(load(source, None, resident=None, slots=0, tier="disk"), prompt)
    assert torch.equal(hidden(load(source, pack, resident=None, slots=0, tier="disk"), prompt), expected)
    for tier, streamer in (("disk", ThreadStreamer), ("ram", MappedStreamer)):
        for slots, resident in ((1, ()), (2, (1,)), (3, ()), (4, (0, 2))):
            model = load(source, pack, resident=resident, slots=slots, tier=tier)
            assert isinstance(model.streamer, streamer)
            for _ in range(NUM_PASSES):
                assert torch.equal(hidden(model, prompt), expected)
            model.close()


@dataclass(frozen=True)
class Packed:
    """A packed model of five layers and its expected hidden states."""

    source: ModelSource
    pack: Pack
    prompt: list[int]
    states: torch.Tensor


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    folder = tmp_path_factory.mktemp("packed")
    with tiny_packs(folder):
        source, prompt = make_source("llama_tied", folder / "model"), random_prompt(20, VOCAB)
        pack = make_pack(source)
    yield Packed(source, pack, prompt, hidden(load(source, None, resident=None, slots=0, tier="disk"), prompt))


@given(
    tiers=st.lists(st.sampled_from(["device", "ram", "disk", "disk"]), min_size=5, max_size=5),
    slots=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 4), max_size=4),
)
@settings(deadline=None, max_examples=25)
def test_any_mixture_of_tiers_gives_the_same_bits(packed: Packed, tiers: list[str], slots: int, cuts: list[int]):
    """Run whole passes, and between them passes that stop before a layer."""
    resident = [i for i, tier in enumerate(tiers) if tier == "device"]
    in_ram = [i for i, tier in enumerate(tiers) if tier == "ram"]
    model = load(packed.source, packed.pack, resident=resident, slots=slots, tier=in_ram)
    try:
        assert isinstance(model.streamer, MixedStreamer) == ({"ram", "disk"} <= set(tiers))
        for cut in [*cuts, 0]:
            before = model.streamer.counters().num_bytes
            assert torch.equal(hidden(model, packed.prompt), packed.states)
            streamed = sum(layer.nbytes for i, layer in enumerate(packed.pack.layers) if i not in resident)
            assert model.streamer.counters().num_bytes - before == streamed
            for index in set(range(cut)) - set(resident):
                model.streamer.acquire(index)
                model.streamer.release(index)
            model.streamer.restart()
    finally:
        model.close()


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_a_pack_that_is_cut_short_between_passes_is_an_error(tier: str, tmp_path: Path):
    """A mapped file whose pages are gone would end the process without a word."""
    with tiny_packs(tmp_path):
        source, prompt = make_source("llama_tied", tmp_path / "model"), random_prompt(20, VOCAB)
        pack = make_pack(source)
        model = load(source, pack, resident=(0,), slots=1, tier=tier)
        try:
            hidden(model, prompt)
            last = pack.layers[4]
            cut_short(last.path, last.data_offset + last.nbytes // 2)
            with pytest.raises(ModelError, match=r"truncated|another program writes to"):
                for _ in range(2):  # a slot may hold the last layer of the pass before
                    hidden(model, prompt)
        finally:
            model.close()


@pytest.mark.parametrize("small", ["all", "some"])
def test_small_layers_are_read_by_the_computing_thread(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All layers are small and no thread starts, or small ones share slots with layers that threads read ahead."""
    source, prompt = make_source("deepseek_v3", tmp_path / "model"), random_prompt(20, VOCAB)
    pack = make_pack(source)
    expected = hidden(load(source, pack, resident=None, slots=0, tier="disk"), prompt)
    sizes = [layer.nbytes for layer in pack.layers]
    limit = max(sizes) if small == "all" else min(sizes)
    assert sum(size <= limit for size in sizes) == (4 if small == "all" else 1)
    monkeypatch.setattr("specchat.engine.streaming.slots.SMALL_LAYER_BYTES", limit)
    for slots in (1, 2, 3):
        with watched_threads() as threads:
            model = load(source, pack, resident=(), slots=slots, tier="disk")
        assert bool(threads.num_running) == (small == "some")
        for index in range(3):
            assert torch.equal(hidden(model, prompt), expected)
            for layer in range(index):  # as far as a cancelled pass got
                model.streamer.acquire(layer)
                model.streamer.release(layer)
            model.streamer.restart()
        model.close()


def test_cancelled_passes_leave_nothing_behind(tmp_path: Path):
    source, prompt = make_source("llama_tied", tmp_path / "model"), random_prompt(20, VOCAB)
    model = load(source, make_pack(source), resident=(), slots=2, tier="disk")
    expected, rng = hidden(model, prompt), random.Random(3)
    for _ in range(NUM_PASSES):
        model.cache.truncate(0, 0)
        for index in range(rng.randrange(5)):
            model.streamer.acquire(index)
            model.streamer.release(index)
        model.streamer.restart()
        assert torch.equal(hidden(model, prompt), expected)
    model.close()


def test_a_streamable_checkpoint_needs_no_pack(tmp_path: Path):
    source = save(random_model(make_config("llama")), tmp_path / "model")
    assert prepare(source, "fp32", progress=silent, warn=silent) is None
    assert prepare(source, "bf16", progress=silent, warn=silent) is not None


def write_shards(source: ModelSource, folder: Path, num_shards: int, rng: random.Random) -> ModelSource:
    """Write the tensors to shards in any order, between unused tensors: they start at any offset, even odd ones."""
    tensors = [
        (info.key, info.dtype, info.shape, os.pread(file.fileno(), info.nbytes, info.offset))
        for info in open_checkpoint(source.path).tensors.values()
        for file in [info.file.open("rb")]
    ]
    sizes = [rng.randrange(1, 9000) for _ in range(2 * num_shards)]
    tensors += [(f"junk.{i}", "U8", (size,), rng.randbytes(size)) for i, size in enumerate(sizes)]
    rng.shuffle(tensors)
    folder.mkdir()
    shutil.copy(source.path / "config.json", folder)
    for number in range(num_shards):
        header, data = dict[str, object](), b""
        for key, dtype, shape, raw in tensors[number::num_shards]:
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        (folder / f"part-{number}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return replace(source, path=folder)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("in_ram", [(), (1, 3), range(5)], ids=["disk", "mixed", "ram"])
def test_layers_read_from_shards_give_the_same_bits(
    num_shards: int, in_ram: Collection[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("specchat.engine.streaming.readers.READ_WINDOW_BYTES", 2 * 4096)  # so that tensors are cut
    whole, prompt = save(random_model(make_config("llama")), tmp_path / "model"), random_prompt(20, VOCAB)
    expected = hidden(load(whole, None, resident=None, slots=0, tier="disk"), prompt)
    for seed in range(2):
        source = write_shards(whole, tmp_path / str(seed), num_shards, random.Random(seed))
        for slots, resident in ((1, ()), (2, (1,)), (3, ())):
            model = load(source, None, resident=resident, slots=slots, tier=in_ram)
            assert isinstance(model.streamer, ThreadStreamer) and isinstance(model.streamer._reader, ShardLayerReader)
            for _ in range(4):
                assert torch.equal(hidden(model, prompt), expected)
            model.close()


def test_shards_are_read_past_the_page_cache_unless_cached(tmp_path: Path):
    source = save(random_model(make_config("llama")), tmp_path / "model")
    (file,) = source.path.glob("*.safetensors")
    if not is_unbuffered(descriptor := open_unbuffered(file)):
        pytest.skip("the temporary folder is in memory")
    os.close(descriptor)
    for in_ram, is_cached in (((), False), (range(5), True)):
        model = load(source, None, resident=(), slots=2, tier=in_ram)
        evict([file])
        hidden(model, random_prompt(20, VOCAB))
        model.close()
        assert (resident_share([file]) > 0.2) == is_cached


@pytest.mark.parametrize("in_ram", [(), range(4)], ids=["disk", "ram"])
@pytest.mark.parametrize("left", [1 << 16, (1 << 16) + 100], ids=["at a page", "within a page"])
def test_a_shard_that_is_truncated_while_streaming(in_ram: Collection[int], left: int, tmp_path: Path):
    source, prompt = save(random_model(make_config("llama")), tmp_path / "model"), random_prompt(20, VOCAB)
    (file,) = source.path.glob("*.safetensors")
    plan = make_plan(source, None, num_layers=4, resident=(1,))
    plan = changed(plan, in_ram=tuple(i for i in in_ram if i != 1))
    with load_engine(plan, source, None) as engine:
        write(engine, prompt, Sampling(), 2)
        cut_short(file, left)
        with pytest.raises(CorruptCheckpointError, match=r"is truncated|another program writes to"):
            write(engine, prompt, Sampling(), 8)


def test_small_models_get_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specchat.models.packs.prepare.SMALL_BYTES", 64 << 20)
    assert prepare(make_source("mixtral", tmp_path / "model"), "fp32", progress=silent, warn=silent) is None


def test_an_existing_pack_is_reused(tmp_path: Path):
    source = make_source("mixtral", tmp_path / "model")
    first = make_pack(source)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert make_pack(source).folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == written


def streaming_plan(source: ModelSource, tier: Tier) -> Plan:
    return changed(make_plan(source, None, num_layers=5, resident=(1,)), in_ram=(0, 2, 3, 4) if tier == "ram" else ())


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_text_from_a_pack_is_the_text_from_the_checkpoint(tier: Tier, tmp_path: Path):
    source, prompt = make_source("llama_tied", tmp_path / "model"), random_prompt(20, VOCAB)
    with load_engine(make_plan(source, None, num_layers=5), source, None) as engine:
        expected, _ = write(engine, prompt, Sampling(), 12)
    with load_engine(streaming_plan(source, tier), source, None, make_pack(source)) as engine:
        ours, steps = write(engine, prompt, Sampling(), 12)
    assert ours == expected
    assert all(step.streamed_bytes == steps[0].streamed_bytes > 0 for step in steps)


@pytest.mark.parametrize("tier", ["disk", "ram"])
@pytest.mark.parametrize("layer", [1, 3], ids=["resident", "streamed"])
def test_a_flipped_byte_is_found_when_it_is_read(tier: Tier, layer: int, tmp_path: Path):
    source = make_source("llama_tied", tmp_path / "model")
    pack = make_pack(source)
    packed = pack.layers[layer]
    with packed.path.open("r+b") as file:
        file.seek(packed.data_offset + packed.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))
    with (
        pytest.raises(CorruptCheckpointError, match=packed.path.name),
        load_engine(streaming_plan(source, tier), source, None, pack) as engine,
    ):
        write(engine, random_prompt(20, VOCAB), Sampling(), 4)


@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_a_pack_file_that_is_truncated_while_streaming(tier: Tier, tmp_path: Path):
    source, prompt = make_source("llama_tied", tmp_path / "model"), random_prompt(20, VOCAB)
    pack = make_pack(source)
    with load_engine(streaming_plan(source, tier), source, None, pack) as engine:
        write(engine, prompt, Sampling(), 2)
        cut_short(pack.layers[3].path, pack.layers[3].data_offset)
        with pytest.raises(CorruptCheckpointError, match=r"is truncated|another program writes to"):
            write(engine, prompt, Sampling(), 8)


def test_reads_fall_back_where_the_page_cache_cannot_be_bypassed(tmp_path: Path):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no tmpfs here")
    file = Path("/dev/shm") / f"specchat-test-{os.getpid()}"
    file.write_bytes(b"x" * 8192)
    try:
        descriptor = open_unbuffered(file)
        assert os.pread(descriptor, 3, 5) == b"xxx"  # unaligned: only a buffered descriptor takes it
        os.close(descriptor)
    finally:
        file.unlink()


def num_open_files() -> int:
    gc.collect()  # what earlier tests left must not be closed in the middle of this one
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_a_reader_closes_its_files(tmp_path: Path):
    pack = make_pack(make_source("llama_tied", tmp_path / "model"))
    before = num_open_files()
    filler = PackLayerReader(pack)
    for index, layer in enumerate(pack.layers):
        filler.chunks(index, torch.zeros(layer.nbytes, dtype=torch.uint8))
    assert num_open_files() == before + len(pack.layers)
    filler.close()
    assert num_open_files() == before
