"""Headers of GGUF files: files of the gguf package's writer, hand-made faults, and random damage."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specchat.errors import CorruptCheckpointError, ModelNotFoundError, SpecchatError, UnsupportedModelError
from specchat.models.checkpoint.gguf import open_gguf, split_files


def write(file: Path, *, kind: str | None = None, arch: str = "llama", endian=gguf.GGUFEndian.LITTLE) -> Path:
    writer = gguf.GGUFWriter(file, arch, endianess=endian)
    writer.add_block_count(3)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "▁b"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.5])
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("plain", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("packed", np.zeros((2, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def raw(file: Path, *, version=3, tensors=(), keys=b"", num_keys=0, num_tensors=None, data=b"") -> Path:
    """A file as a broken disk or an attacker would write it; tensors are (name, dims, type, offset)."""
    table = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        for name, dims, kind, offset in tensors
    )
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if num_tensors is None else num_tensors, num_keys)
    head += keys + table
    file.write_bytes(head + bytes(-len(head) % 32) + data)
    return file


ARCH = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"


def test_tensors_and_metadata_are_those_that_were_written(tmp_path):
    found = open_gguf(write(tmp_path / "x.gguf"))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert found.architecture == "llama"
    assert found.metadata["llama.block_count"] == 3
    assert found.metadata["tokenizer.ggml.tokens"] == ["<s>", "a", "▁b"]
    assert found.metadata["tokenizer.ggml.scores"] == [0.0, -1.0, -2.5]
    places = {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors}
    assert {name: (each.offset, each.nbytes) for name, each in found.tensors.items()} == places
    assert found.tensors["plain"].shape == (3, 4)
    assert (found.tensors["packed"].shape, found.tensors["packed"].type.name) == ((2, 32), "Q8_0")


def test_any_member_names_a_split_set(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", split_max_tensors=1)
    for name in ("one", "two", "three"):
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    for file in files:
        assert split_files(file) == files
        assert set(open_gguf(file).tensors) == {"one", "two", "three"}
    files[1].unlink()
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        open_gguf(files[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "adapter"}, UnsupportedModelError, "LoRA"),
        ({"kind": "mmproj"}, UnsupportedModelError, "image"),
        ({"arch": "clip"}, UnsupportedModelError, "image"),
        ({"kind": "imatrix"}, UnsupportedModelError, "importance matrix"),
        ({"endian": gguf.GGUFEndian.BIG}, UnsupportedModelError, "big-endian"),
    ],
)
def test_files_that_are_no_models_are_refused_by_name(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        open_gguf(write(tmp_path / "x.gguf", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"num_tensors": 1 << 60}, "do not fit"),
        ({"num_keys": 1 << 60}, "do not fit"),
        ({"keys": struct.pack("<Q", 1 << 62), "num_keys": 1}, "not fit|truncated"),
        ({"keys": struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 50), "num_keys": 1}, "not fit"),
        ({"keys": struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77) + bytes(9), "num_keys": 1}, "unknown type"),
        ({"keys": ARCH * 2, "num_keys": 2}, "occurs twice"),
        ({"tensors": [(b"a", (1,) * 5, 0, 0)]}, "dimensions"),
        (
            {"tensors": [(b"a", (4,), 0, 0), (b"a", (4,), 0, 32)], "keys": ARCH, "num_keys": 1, "data": bytes(64)},
            "twice",
        ),
        ({"tensors": [(b"a", (4,), 0, 0), (b"b", (4,), 0, 8)], "data": bytes(64)}, "overlaps"),
        ({"tensors": [(b"a", (33,), 8, 0)], "data": bytes(64)}, "rows of 33"),
        ({"tensors": [(b"a", (1 << 40, 1 << 40), 0, 0)], "data": bytes(64)}, "truncated"),
        ({"tensors": [(b"a", (32,), 41, 0)], "data": bytes(64)}, "Q1_0"),
        ({"tensors": [(b"a", (32,), 999, 0)], "data": bytes(64)}, "ggml type 999"),
        ({}, "names no architecture"),
    ],
)
def test_faults_are_named(options, message, tmp_path):
    with pytest.raises((CorruptCheckpointError, UnsupportedModelError), match=message) as caught:
        open_gguf(raw(tmp_path / "x.gguf", **options))
    assert caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"safetensors, not GGUF", b"version https://git-lfs.github.com/spec/v1"]
)
def test_other_files_are_refused(content, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        open_gguf(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_gguf(tmp_path / "x.gguf")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_never_ends_in_a_traceback(tmp_path, data):
    good = write(tmp_path / "good.gguf").read_bytes()
    damaged = bytearray(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "bad.gguf"
    file.unlink(missing_ok=True)
    file.write_bytes(damaged)
    try:
        found = open_gguf(file)
    except SpecchatError as error:
        assert str(file) in error.message
    else:
        assert all(tensor.offset + tensor.nbytes <= len(damaged) for tensor in found.tensors.values())
