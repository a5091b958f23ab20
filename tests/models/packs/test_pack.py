"""Packs have the engine's layout, are readable by other libraries, and damage never goes unnoticed."""

import ctypes
import errno
import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.loading import opened

from specchat.errors import AllocationError, CorruptCheckpointError, DoesNotFitError, ModelError
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.packs import inventory
from specchat.models.packs.build import build_pack
from specchat.models.packs.checkpoint_source import CheckpointLayers
from specchat.models.packs.file_format import (
    PAD_PREFIX,
    FileLayout,
    FileRecord,
    disk_errors,
    write_tensors,
)
from specchat.models.packs.inventory import packs_folder
from specchat.models.packs.manifest import Journal, read_journal
from specchat.models.packs.pack import PackKey, key_for, list_packs, open_pack
from specchat.models.packs.prepare import pack_name
from specchat.models.packs.verify import ChunkVerifier, verify_pack
from specchat.models.quant.kernels.bnb import bnb
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import recipe_for
from specchat.records.limits import READ_CHUNK_BYTES
from specchat.records.model import ModelSource
from specchat.units import MIB

KEY = "0123456789abcdef"
FILES = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}"}
FORK = multiprocessing.get_context("fork")  # children that need not import torch again
PATIENCE_S = 60  # what is waited for comes much sooner, unless the machine is busy with other things


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(folder))
    return folder


class Toy:
    """A source of a few odd-sized tensors that notes what was read, across processes."""

    layers_name = "model.layers"

    def __init__(self, log=None, num_layers=3, numbers=1500, seed=0):
        self.num_layers = num_layers
        self._log, self._numbers, self._seed = log, numbers, seed

    def read_layer(self, layer):
        self._note(str(layer))
        generator = torch.Generator().manual_seed(100 * self._seed + layer)
        sizes = {"attn.weight": (self._numbers, 3), "mlp.weight": (self._numbers + layer,), "norm.weight": (7,)}
        return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}

    def layer_meta(self, layer):
        sizes = {"attn.weight": (self._numbers, 3), "mlp.weight": (self._numbers + layer,), "norm.weight": (7,)}
        return {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}

    def rest(self):
        self._note("rest")
        return {"model.embed.weight": torch.arange(500.0).view(50, 10), "model.buffer": torch.tensor([1, 2, 3])}

    def rest_meta(self):
        return {
            "model.embed.weight": torch.empty(50, 10, device="meta"),
            "model.buffer": torch.empty(3, dtype=torch.int64),
        }

    def reads(self):
        return self._log.read_text().split() if self._log.exists() else []

    def _note(self, what):
        if self._log is not None:
            with self._log.open("a") as stream:
                stream.write(what + "\n")


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path / "reads")


def build(source, key=KEY, **kwargs):
    return build_pack(key, source, name="toy", files=FILES, **kwargs)


def contents(folder):
    """All files, but for the journal, whose lines have the order of writing."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "journal.jsonl"}


def layer_file(index):
    return packs_folder() / KEY / f"layer-{index:05d}.safetensors"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def no_warning(text):
    raise AssertionError(text)


# --- how files look -------------------------------------------------------------------------------------------------

sizes = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])


@settings(max_examples=40, deadline=None)
@given(sizes, st.lists(dtypes, min_size=6, max_size=6))
def test_any_tensors_are_read_back_aligned(shapes, kinds):
    tensors = {f"t.{i}": torch.randn(s).to(k) for i, (s, k) in enumerate(zip(shapes, kinds, strict=False))}
    with tempfile.TemporaryDirectory() as folder:
        layout = FileLayout.of("x.safetensors", tensors)
        record = write_tensors(Path(folder), layout, tensors, lambda _: None)
        file = Path(folder) / "x.safetensors"
        assert record.fault(Path(folder)) is None
        assert record.describes(layout)
        assert file.stat().st_size == record.data_offset + record.nbytes
        assert record.data_offset % 4096 == record.nbytes % 4096 == 0
        found = load_file(file)
        placed = open_checkpoint(Path(folder)).tensors
        for key, tensor in tensors.items():
            assert torch.equal(found.pop(key), tensor)
            assert (placed[key].offset - record.data_offset) % 256 == 0
        assert all(key.startswith(PAD_PREFIX) and not pad.any() for key, pad in found.items())
        assert list(Path(folder).iterdir()) == [file]


def test_layers_have_the_engine_s_layout():
    skeleton = build_skeleton(tiny_models.make_config("llama"), torch.bfloat16)
    for layer in skeleton.layers:
        expected = LayerLayout.of(layer)
        layout = FileLayout.of("x", dict(layer.named_parameters()))
        assert tuple(t.offset for t in layout.tensors) == expected.offsets
        assert tuple(t.key for t in layout.tensors) == expected.names
        assert layout.nbytes == expected.nbytes


def test_contents_of_a_finished_pack(toy):
    seen = []
    made = build(toy, progress=seen.append)
    assert (made.key, made.name, made.dtype, made.folder) == (KEY, "toy", "bf16", packs_folder() / KEY)
    assert open_pack(KEY, no_warning) == made
    assert list_packs(no_warning) == (made,)
    assert made.fits(toy)
    assert not made.fits(Toy(num_layers=2))
    assert not made.fits(Toy(numbers=1501))
    assert [layer.path.name for layer in made.layers] == [f"layer-0000{i}.safetensors" for i in range(3)]
    files = [*(layer.path for layer in made.layers), made.rest, *(made.folder / name for name in FILES)]
    assert made.nbytes == sum(path.stat().st_size for path in files)
    assert toy.reads() == ["0", "1", "2", "rest"]
    assert (seen[0].bytes_done, seen[0].layer) == (0, 0)
    assert (seen[-1].bytes_done, seen[-1].layer, seen[-1].num_layers) == (seen[-1].bytes_total, 3, 3)
    assert all(a.bytes_done <= b.bytes_done for a, b in itertools.pairwise(seen))
    assert (made.folder / "config.json").read_bytes() == FILES["config.json"]
    rest = made.rest_checkpoint()
    assert set(rest.tensors) == {"model.embed.weight", "model.buffer"}
    assert len(made.checkpoint().tensors) == 3 * 3 + 2


def test_a_finished_pack_is_not_made_again(toy):
    build(toy)
    before = contents(packs_folder() / KEY)
    build(toy)
    assert toy.reads() == ["0", "1", "2", "rest"]
    assert contents(packs_folder() / KEY) == before


def test_missing_packs_are_none(cache):
    assert open_pack(KEY, no_warning) is None
    assert list_packs(no_warning) == ()
    assert packs_folder() == cache / "packs"


def test_packs_lie_in_the_platform_cache_folder(monkeypatch):
    monkeypatch.delenv("SPECCHAT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    assert packs_folder() == Path("/x/cache/specchat/packs")


# --- models ---------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    ("llama", torch.float32, torch.float32),
    ("llama", torch.bfloat16, torch.float32),
    ("llama", torch.float32, torch.bfloat16),
    ("llama_tied", torch.float32, torch.float32),
    ("gemma3", torch.float32, torch.float32),
    ("phi3", torch.float32, torch.float32),
    ("mixtral", torch.float32, torch.float32),
    ("mixtral", torch.bfloat16, torch.float32),
    ("gpt_oss", torch.float32, torch.bfloat16),
    ("deepseek_v3", torch.float32, torch.bfloat16),
]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def save_model(architecture, folder, dtype=torch.float32):
    config = tiny_models.make_config(architecture)
    return config, tiny_models.save(tiny_models.random_model(config).to(dtype), folder)


def read_everything(config, checkpoint, dtype):
    """Layer blobs, and what is outside the layers, as the engine reads them."""
    skeleton = build_skeleton(config, dtype)
    blobs = []
    with WeightReader(skeleton, checkpoint) as reader:
        for index, layer in enumerate(skeleton.layers):
            blobs.append(torch.zeros(LayerLayout.of(layer).nbytes, dtype=torch.uint8))
            reader.read_layer(index, LayerLayout.of(layer).views(blobs[-1]))
        reader.read_rest(torch.device("cpu"))
    named = [*skeleton.model.named_parameters(), *skeleton.model.named_buffers()]
    return blobs, {name: tensor for name, tensor in named if not tensor.is_meta}


@pytest.mark.parametrize(("architecture", "saved", "wanted"), ROUND_TRIPS, ids=str)
def test_a_pack_gives_the_logits_of_its_checkpoint(tmp_path, architecture, saved, wanted):
    config, source = save_model(architecture, tmp_path / "model", saved)
    checkpoint = open_checkpoint(source.path)
    skeleton = build_skeleton(config, wanted)
    key = key_for(source, checkpoint, SHORT[wanted])
    with CheckpointLayers(opened(skeleton, checkpoint)) as layers:
        made = build_pack(key, layers, name="x", warn=no_warning)
        assert made.fits(layers)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert made.dtype == SHORT[wanted]

    blobs, rest = read_everything(config, checkpoint, wanted)
    for layer, blob in zip(made.layers, blobs, strict=True):
        assert (layer.data_offset % 4096, layer.nbytes) == (0, blob.nbytes)
        assert layer.path.read_bytes()[layer.data_offset :] == blob.numpy().tobytes()
    again, rest_again = read_everything(config, made.checkpoint(), wanted)
    assert all(map(torch.equal, again, blobs))
    assert rest.keys() == rest_again.keys()
    assert all(torch.equal(rest[name], rest_again[name]) for name in rest)
    assert not verify_pack(made)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_transformers_and_safetensors_read_the_files(tmp_path, architecture):
    config, source = save_model(architecture, tmp_path / "model")
    model = tiny_models.random_model(config)
    with CheckpointLayers(opened(build_skeleton(config, torch.float32), open_checkpoint(source.path))) as layers:
        made = build_pack(KEY, layers, name="x")
    expected = dict(model.model.layers.state_dict(prefix="model.layers."))
    for layer in made.layers:
        with safe_open(layer.path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118  not a mapping
                if not key.startswith(PAD_PREFIX):
                    assert torch.equal(file.get_tensor(key), expected.pop(key))
    assert not expected
    embeddings = load_file(made.rest)["model.embed_tokens.weight"]
    assert torch.equal(embeddings, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (r"layers\.2.*w2", r"model\.layers\.2\..*experts\.0\.w2\.weight"),
        (r"layers\.1.*experts\.3\.", r"model\.layers\.1\..*experts\.3\.w1\.weight"),
        (r"experts\.2\.w3", r"model\.layers\.0\..*experts\.2\.w3\.weight"),
    ],
    ids=["a matrix in one layer", "the last expert in one layer", "a matrix of one expert in all layers"],
)
def test_experts_that_lack_tensors_are_refused_before_anything_is_read(lost, named, tmp_path):
    config, source = save_model("mixtral", tmp_path / "model")
    path = source.path / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not re.search(lost, k)}, path)
    checkpoint, skeleton = open_checkpoint(source.path), build_skeleton(config, torch.float32)
    with pytest.raises(CorruptCheckpointError, match=f"'{named}' is missing"):
        CheckpointLayers(opened(skeleton, checkpoint))


class Watch:
    """The most anonymous memory that the process held while it lasted, beyond what it held before; bytes."""

    def __enter__(self):
        self._before = self._held()
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look(self):
        while not self._over.wait(0.001):
            self.peak = max(self.peak, self._held() - self._before)

    @staticmethod
    def _held():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_packing_holds_few_layers_in_memory(architecture, quant, tmp_path):
    """One layer as it is written, and of the original at most one, whether experts are merged and quantized or not."""
    import transformers as hf

    settings_ = {"hidden_size": 2048, "num_hidden_layers": 4, "vocab_size": 2000, "num_key_value_heads": 16}
    settings_ |= {"num_attention_heads": 16, "intermediate_size": 6144 if architecture == "llama" else 1024}
    config = {"llama": hf.LlamaConfig, "mixtral": hf.MixtralConfig}[architecture](**settings_)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model")
    del model
    bnb()  # its import takes memory too
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else it would be made of what is left over
    skeleton = build_skeleton(config, torch.bfloat16)
    with (
        CheckpointLayers(opened(skeleton, open_checkpoint(tmp_path / "model"), recipe_for(quant))) as layers,
        Watch() as watch,
    ):
        build_pack(KEY, layers, name="x", dtype="bf16")
    assert layer_bytes > 100 * MIB
    print(f"\n{architecture} {quant}: {watch.peak / layer_bytes:.2f} layers")
    assert watch.peak < (1.5 if quant == "none" else 2) * layer_bytes


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.T.contiguous()], ids=["cut", "turned"])
def test_an_expert_of_another_shape_is_named(change, tmp_path):
    config, source = save_model("mixtral", tmp_path / "model")
    path = source.path / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if re.search(r"1\..*experts\.2\.w3", key))
    save_file(tensors | {key: change(tensors[key])}, path)
    skeleton = build_skeleton(config, torch.float32)
    layers = CheckpointLayers(opened(skeleton, open_checkpoint(source.path)))
    with layers, pytest.raises(CorruptCheckpointError, match=re.escape(key)):
        layers.read_layer(1)


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_key_of_a_local_folder(tmp_path):
    _, source = save_model("llama", tmp_path / "model")
    weights, config = source.path / "model.safetensors", source.path / "config.json"

    def key(path=source.path, dtype="fp32"):
        return key_for(ModelSource("x", path), open_checkpoint(path), dtype)

    first = key()
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first == key() == key(source.path / ".." / "model")
    keys = [first, key(dtype="bf16")]
    os.utime(weights, ns=(1, 1))
    keys.append(key())
    config.write_text(config.read_text().replace("512", "511"))
    keys.append(key())
    stat = weights.stat()
    flip(weights, weights.read_bytes().index(b"model.") + 2)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_key_of_a_hub_snapshot_ignores_its_path(tmp_path):
    _, source = save_model("llama", tmp_path / "model")

    def snapshot(place, blob, commit="c0ffee"):
        folder = tmp_path / place / "snapshots" / commit
        folder.mkdir(parents=True)
        (tmp_path / place / "blobs").mkdir()
        shutil.copy(source.path / "config.json", folder)
        shutil.copyfile(source.path / "model.safetensors", tmp_path / place / "blobs" / blob)
        (folder / "model.safetensors").symlink_to(f"../../blobs/{blob}")
        return key_for(ModelSource("org/x", folder, revision=commit), open_checkpoint(folder), "fp32")

    first = snapshot("a", "blob1")
    assert snapshot("b", "blob1") == first
    assert len({first, snapshot("c", "blob2"), snapshot("d", "blob1", "beef")}) == 3


def test_keys_stay_the_same_across_releases():
    key = PackKey("c0ffee", (("model.safetensors", "b10b"),), "00", "bf16", layout_version=1, quantizer="none")
    assert key.digest() == "50030e7c75ff9636beb5e92035333ea0"


def test_the_key_of_an_unreadable_model_is_an_error(tmp_path):
    _, source = save_model("llama", tmp_path / "model")
    checkpoint = open_checkpoint(source.path)
    (source.path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        key_for(source, checkpoint, "fp32")


# --- interrupted and damaged ----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_in_layer(layer):
    def progress(at):
        if at.layer == layer and at.bytes_done:
            raise Stopped

    return progress


def test_an_interrupted_pack_is_continued(toy):
    with pytest.raises(Stopped):
        build(toy, progress=stop_in_layer(2))
    assert open_pack(KEY, no_warning) is None
    assert list_packs(no_warning) == ()
    assert not list((packs_folder() / KEY).glob("*.tmp"))
    seen = []
    made = build(toy, progress=seen.append)
    assert toy.reads() == ["0", "1", "2", "2", "rest"]
    assert seen[0].bytes_done == made.layers[0].nbytes + made.layers[1].nbytes
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert not verify_pack(made)


def test_another_layout_under_the_same_key_is_written_again(toy):
    build(toy)
    other = Toy(numbers=800, num_layers=2)
    made = build(other)
    assert made.fits(other)
    assert not layer_file(2).exists()
    assert not verify_pack(made)


def damage_truncate(path):
    os.truncate(path, path.stat().st_size - 4096)


def damage_grow(path):
    with path.open("ab") as stream:
        stream.write(b"x")


def damage_header(path):
    flip(path, 20)


def damage_foreign(path):
    path.write_bytes(b"not a tensor in sight" * 1000)


def damage_delete(path):
    path.unlink()


def damage_other_layer(path):
    shutil.copy(layer_file(0), path)


DAMAGES = [damage_truncate, damage_grow, damage_header, damage_foreign, damage_delete, damage_other_layer]


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_a_damaged_file_is_rewritten_after_a_warning(toy, damage):
    build(toy)
    before = contents(packs_folder() / KEY)
    damage(layer_file(1))
    told = []
    assert open_pack(KEY, told.append) is None
    assert list_packs(told.append) == ()
    assert all("damaged pack" in line and "layer-00001.safetensors" in line for line in told)
    assert len(told) == 2
    build(toy)
    assert toy.reads() == ["0", "1", "2", "rest", "1"]
    assert contents(packs_folder() / KEY) == before


@pytest.mark.parametrize("damage", [damage_truncate, damage_header, damage_delete])
def test_a_damaged_rest_is_rewritten(toy, damage):
    made = build(toy)
    damage(made.rest)
    assert open_pack(KEY, lambda _: None) is None
    assert not verify_pack(build(toy))
    assert toy.reads()[4:] == ["rest"]


@pytest.mark.parametrize("name", FILES)
def test_small_files_are_checked_on_opening(toy, name):
    made = build(toy)
    flip(made.folder / name, 1)
    told = []
    assert open_pack(KEY, told.append) is None
    assert name in told[0]
    build(toy)
    assert (made.folder / name).read_bytes() == FILES[name]
    assert toy.reads() == ["0", "1", "2", "rest"]


def test_a_truncated_or_changed_manifest_is_refused(toy):
    made = build(toy)
    file = made.folder / "manifest.json"
    good = file.read_bytes()
    chance = random.Random(0)
    for _ in range(150):
        data = bytearray(good)
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        assert open_pack(KEY, lambda _: None) in (None, made)
    file.write_bytes(good.replace(KEY.encode(), b"0" * 16))
    assert open_pack(KEY, lambda _: None) is None
    assert build(toy) == made
    assert toy.reads() == ["0", "1", "2", "rest"]  # the journal knew


@pytest.mark.parametrize("text", ["[]", "{}", '{"crc32": 1}', "null", "[" * 100_000, "\xff"])
def test_a_foreign_manifest_is_refused(toy, text):
    made = build(toy)
    (made.folder / "manifest.json").write_text(text, encoding="latin-1")
    told = []
    assert open_pack(KEY, told.append) is None
    assert "is not a pack's manifest" in told[0]
    assert build(toy) == made


def test_a_pack_of_another_version_is_rebuilt(toy, monkeypatch):
    made = build(toy)
    monkeypatch.setitem(inventory.VERSIONS, "layout", 99)
    assert open_pack(KEY, no_warning) is None
    assert build(toy) == made
    assert len(toy.reads()) == 8


def test_a_manifest_moved_to_another_folder_is_refused(toy):
    made = build(toy)
    shutil.copytree(made.folder, made.folder.with_name("feed"))
    told = []
    assert open_pack("feed", told.append) is None
    assert "another pack's" in told[0]


def test_a_truncated_journal_is_read_up_to_the_damage(tmp_path):
    records = [FileRecord(f"layer-0000{i}.safetensors", 4096, 4096, 7, (i,)) for i in range(3)]
    journal = Journal(tmp_path, KEY, [])
    for record in records:
        journal.add(record)
    assert read_journal(tmp_path, "other") == {}
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        found = list(read_journal(tmp_path, KEY).values())
        assert found == records[: len(found)]
        assert len(found) >= whole[:length].count(b"\n") - 1
    for name in ("../x", "", "..", "a/b"):
        file.write_bytes(whole.replace(b"layer-00001.safetensors", name.encode()))
        assert list(read_journal(tmp_path, KEY).values()) == records[:1]


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_on_first_read(toy):
    made = build(toy)
    layer = made.layers[1]
    blob = layer.path.read_bytes()[layer.data_offset :]
    verifier = ChunkVerifier(made)
    verifier.verify_layer(1, blob)
    assert verifier.is_verified(1, 0)
    assert not verifier.is_verified(0, 0)
    flip(layer.path, layer.data_offset + 777)
    assert open_pack(KEY, no_warning) == made
    bad = memoryview(layer.path.read_bytes())[layer.data_offset :]
    verifier.verify_layer(1, bad)  # only once per process
    with pytest.raises(CorruptCheckpointError, match=r"chunk 0 of .*layer-00001\.safetensors") as caught:
        ChunkVerifier(made).verify_layer(1, bad)
    assert "safe to delete" in caught.value.hint
    layer.path.unlink()  # as the hint says
    assert open_pack(KEY, lambda _: None) is None
    assert not verify_pack(build(toy))
    assert toy.reads()[4:] == ["1"]


def test_each_chunk_of_a_large_layer_is_verified(tmp_path):
    source = Toy(num_layers=1, numbers=4 * MIB)  # 33 MiB in bf16
    made = build(source)
    (layer,) = made.layers
    assert [layer.chunk(i) for i in range(layer.num_chunks)] == [
        (0, READ_CHUNK_BYTES),
        (READ_CHUNK_BYTES, 2 * READ_CHUNK_BYTES),
        (2 * READ_CHUNK_BYTES, layer.nbytes),
    ]
    blob = bytearray(layer.path.read_bytes()[layer.data_offset :])
    ChunkVerifier(made).verify_layer(0, blob)
    blob[READ_CHUNK_BYTES + 5] ^= 1
    verifier = ChunkVerifier(made)
    verifier.verify(0, 0, memoryview(blob)[:READ_CHUNK_BYTES])
    with pytest.raises(CorruptCheckpointError, match="chunk 1 of"):
        verifier.verify_layer(0, blob)
    verifier.verify(0, 2, memoryview(blob)[2 * READ_CHUNK_BYTES :])
    assert [verifier.is_verified(0, i) for i in range(3)] == [True, False, True]


def test_a_damaged_rest_is_found_before_it_is_used(toy):
    made = build(toy)
    flip(made.rest, made.manifest.rest.data_offset + 3)
    with pytest.raises(CorruptCheckpointError, match=r"chunk 0 of .*rest\.safetensors"):
        made.rest_checkpoint()


def test_verify_pack_finds_all_damage(toy):
    made = build(toy)
    seen = []
    assert not verify_pack(made, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    flip(made.layers[0].path, -1)
    flip(made.rest, made.manifest.rest.data_offset)
    made.layers[2].path.unlink()
    damages = verify_pack(made)
    assert [d.path.name for d in damages] == ["layer-00000.safetensors", "layer-00002.safetensors", "rest.safetensors"]
    for damage in damages:
        assert damage.path.name in damage.reason
        damage.path.unlink(missing_ok=True)
    assert not verify_pack(build(toy))


@pytest.mark.parametrize(
    "name", ["../x.json", "manifest.json", "model.safetensors.index.json", "layer-00000.safetensors"]
)
def test_small_files_must_not_look_like_weights(toy, name):
    with pytest.raises(AssertionError):
        build_pack(KEY, toy, name="x", files={name: b""})


# --- several processes, and sudden deaths ---------------------------------------------------------------------------


def run_child(function, *args):
    child = FORK.Process(target=function, args=args, daemon=True)
    child.start()
    return child


class Halting(Toy):
    """Tells when it is asked for its second layer, and has it once it may go on."""

    def __init__(self, log):
        super().__init__(log)
        self.halts, self.may_go_on = FORK.Event(), FORK.Event()

    def read_layer(self, layer):
        tensors = super().read_layer(layer)
        if layer == 1:
            self.halts.set()
            self.may_go_on.wait(PATIENCE_S)
        return tensors


def build_and_report(source, told):
    made = build(source, warn=told.put)
    told.put("good" if not verify_pack(made) else "damaged")


def start_and_let_another_wait(first_source, second_source):
    """Two processes that pack the same: the first is half way, and the second, which waits, has said so."""
    told = FORK.Queue()
    first = run_child(build_and_report, first_source, told)
    assert first_source.halts.wait(PATIENCE_S)
    second = run_child(build_and_report, second_source, told)
    assert "waiting" in told.get(timeout=PATIENCE_S)
    return first, second, told


def test_two_processes_build_one_pack(toy):
    source = Halting(toy._log)
    first, second, told = start_and_let_another_wait(source, toy)
    source.may_go_on.set()
    assert [told.get(timeout=PATIENCE_S) for _ in range(2)] == ["good", "good"]
    for child in (first, second):
        child.join(PATIENCE_S)
    assert told.empty()
    assert toy.reads() == ["0", "1", "2", "rest"]


def test_a_second_process_continues_when_the_first_dies(toy):
    first, second, told = start_and_let_another_wait(Halting(toy._log), toy)
    first.kill()
    assert told.get(timeout=PATIENCE_S) == "good"
    second.join(PATIENCE_S)
    assert told.empty()
    assert toy.reads() == ["0", "1", "1", "2", "rest"]


def die_at(source, point):
    """Packs, and dies by SIGKILL at the point-th call that changes the disk, a torn write included."""
    calls = 0

    def deadly(name, call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == point:
                if name == "write":
                    call(args[0], args[1][: random.Random(point).randrange(len(args[1]) + 1)])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("open", "write", "fsync", "replace", "unlink", "close", "mkdir"):
        setattr(os, name, deadly(name, getattr(os, name)))
    build(source)
    return calls


def count_calls(source, results):
    results.put(die_at(source, None))


def assert_never_wrong(expected):
    """A pack that opens is the one expected; so are the files that the next attempt would keep."""
    folder = packs_folder() / KEY
    if open_pack(KEY, lambda _: None) is not None:
        assert contents(folder) == expected
    for name, record in read_journal(folder, KEY).items():
        assert record.fault(folder) or (folder / name).read_bytes() == expected[name]


def kill_twice_and_finish(points, expected):
    shutil.rmtree(packs_folder(), ignore_errors=True)
    for point in points:
        child = run_child(die_at, Toy(), point)
        child.join(PATIENCE_S)
        assert child.exitcode in (-signal.SIGKILL, 0)
        assert_never_wrong(expected)
    build(Toy(), warn=no_warning)
    assert contents(packs_folder() / KEY) == expected


def expected_and_calls():
    results = FORK.Queue()
    run_child(count_calls, Toy(), results)
    calls = results.get(timeout=PATIENCE_S)
    return contents(packs_folder() / KEY), calls


def test_a_build_killed_at_random_points_is_continued():
    expected, calls = expected_and_calls()
    assert calls > 80
    chance = random.Random(3)
    for _ in range(8):
        kill_twice_and_finish([chance.randint(1, calls), chance.randint(1, calls)], expected)


@pytest.mark.slow
def test_a_build_killed_at_every_point_is_continued():
    expected, calls = expected_and_calls()
    for point in range(1, calls + 1):
        kill_twice_and_finish([point], expected)


def pack_model(folder):
    checkpoint = open_checkpoint(folder)
    with CheckpointLayers(opened(build_skeleton(load_config(folder), torch.float32), checkpoint)) as layers:
        build(layers)


@pytest.mark.slow
def test_a_real_model_killed_at_random_times_is_continued(tmp_path):
    _, source = save_model("mixtral", tmp_path / "model")
    begin = time.monotonic()
    pack_model(source.path)
    took_s = time.monotonic() - begin
    expected = contents(packs_folder() / KEY)
    chance = random.Random(5)
    for _ in range(20):
        shutil.rmtree(packs_folder())
        child = run_child(pack_model, source.path)
        time.sleep(chance.uniform(0, took_s))
        child.kill()
        child.join(PATIENCE_S)
        assert_never_wrong(expected)
        pack_model(source.path)
        assert contents(packs_folder() / KEY) == expected


def test_a_repair_killed_midway_is_continued(toy):
    build(toy)
    expected = contents(packs_folder() / KEY)
    for point in range(1, 60, 7):
        damage_truncate(layer_file(1))
        child = run_child(die_at, Toy(), point)
        child.join(PATIENCE_S)
        assert_never_wrong(expected)
        build(Toy(), warn=no_warning)
        assert contents(packs_folder() / KEY) == expected


# --- the disk -------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_an_error_before_writing(toy, monkeypatch):
    made = build(toy)
    damage_delete(layer_file(0))
    damage_truncate(layer_file(1))
    before = contents(made.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 0, 10 * MIB))
    with pytest.raises(DoesNotFitError, match=r"needs 40\.0 KiB more .*10\.0 MiB are free") as caught:
        build(toy)
    assert "SPECCHAT_CACHE_DIR" in caught.value.hint
    assert contents(made.folder) == before
    assert toy.reads() == ["0", "1", "2", "rest"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, DoesNotFitError),
        (errno.EFBIG, DoesNotFitError),
        (errno.EIO, ModelError),
        (errno.EACCES, ModelError),
    ],
)
def test_disk_errors_midway_keep_complete_files(toy, monkeypatch, call, code, error):
    original = getattr(os, call)

    def failing(*args, **kwargs):
        if toy.reads()[-1:] == ["2"]:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(error, match=r"layer-00002\.safetensors: ") as caught:
        patch.setattr(os, call, failing)
        build(toy)
    assert type(caught.value) is error
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert open_pack(KEY, no_warning) is None
    assert not layer_file(2).exists()
    assert not list((packs_folder() / KEY).glob("*.tmp"))
    assert not verify_pack(build(toy))
    assert toy.reads() == ["0", "1", "2", "2", "rest"]


def test_a_full_disk_keeps_complete_files(toy, cache, monkeypatch):
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(cache)]
    is_root = os.geteuid() == 0 and shutil.which("mount")
    if not is_root or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        with monkeypatch.context() as patch, pytest.raises(DoesNotFitError, match="No space left on device"):
            patch.setattr("specchat.models.packs.build._SPARE_DISK_BYTES", -(1 << 30))
            build(Toy(toy._log, num_layers=12))
        written = len(toy.reads()) - 1
        assert written >= 2
        assert not list((packs_folder() / KEY).glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(cache)], check=True)
        made = build(Toy(toy._log, num_layers=12))
        assert not verify_pack(made)
        assert toy.reads().count(str(written)) == 2
        assert len(toy.reads()) == 12 + 1 + 1
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


@pytest.fixture
def as_nobody(monkeypatch):
    """A cache folder of root's that the process, no longer root, may look into; yields the switch."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("SPECCHAT_CACHE_DIR", folder)
        was = os.geteuid()

        def switch():
            if was == 0:
                os.seteuid(65534)

        yield switch
        os.seteuid(was)
        for path in Path(folder).rglob("*"):
            path.chmod(0o755)


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "manifest.json", "config.json"])
def test_an_unreadable_file_is_an_error(toy, as_nobody, name):
    made = build(toy)
    (made.folder / name).chmod(0)
    as_nobody()
    with pytest.raises(ModelError, match=rf"cannot read .*{name}: Permission denied"):
        open_pack(KEY, no_warning)


def test_verify_pack_names_an_unreadable_file(toy, as_nobody):
    made = build(toy)
    made.layers[1].path.chmod(0)
    as_nobody()
    (damage,) = verify_pack(made)
    assert damage.path == made.layers[1].path
    assert "Permission denied" in damage.reason


def test_an_unwritable_cache_is_an_error(toy, as_nobody):
    packs_folder().mkdir()
    packs_folder().chmod(0o555)
    as_nobody()
    with pytest.raises(ModelError, match=r"cannot make .*Permission denied") as caught:
        build(toy)
    assert "SPECCHAT_CACHE_DIR" in caught.value.hint


def test_foreign_files_in_the_folder_stay(toy):
    folder = packs_folder() / KEY
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "layer-00001.safetensors").write_bytes(b"foreign")
    (folder / "layer-00009.safetensors").write_bytes(b"left over")
    (folder / "layer-00000.safetensors.tmp").write_bytes(b"torn")
    made = build(toy)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "layer-00009.safetensors").exists()
    assert not list(folder.glob("*.tmp"))
    assert not verify_pack(made)


def test_a_pack_can_be_deleted_at_any_time(toy):
    made = build(toy)
    shutil.rmtree(made.folder)
    assert open_pack(KEY, no_warning) is None
    assert build(toy) == made

    def delete(at):
        if at.layer == 1:
            shutil.rmtree(made.folder, ignore_errors=True)

    shutil.rmtree(made.folder)
    with pytest.raises(ModelError, match=str(made.folder)):
        build(toy, progress=delete)
    assert build(toy) == made


def test_the_manifest_is_readable_json(toy):
    manifest = json.loads((build(toy).folder / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("format", "layout", "quantizer", "key", "name", "dtype")} == {
        "format": 1,
        "layout": 1,
        "quantizer": "none",
        "key": KEY,
        "name": "toy",
        "dtype": "bf16",
    }
    assert len(manifest["layers"]) == 3
    assert manifest["chunk_bytes"] == 16 * MIB


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DoesNotFitError), (errno.ENOMEM, AllocationError), (errno.EIO, ModelError)]
)
def test_system_errors_become_named_errors(number, kind):
    with pytest.raises(kind, match="cannot read x: ") as caught, disk_errors(Path("x"), "read"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind and caught.value.hint


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (ModelSource("org/name", Path("models--org--name/snapshots/0a1"), "0a1"), "org/name"),
        (ModelSource("mtp", Path("models--org--name/snapshots/0a1"), "0a1", part="mtp"), "the MTP layer of org/name"),
        (ModelSource("mtp", Path("snapshots/mine"), part="mtp"), "the MTP layer of mine"),
    ],
    ids=["model", "head on the hub", "head in a folder"],
)
def test_the_pack_of_a_head_names_its_target(source: ModelSource, name: str):
    assert pack_name(source) == name
