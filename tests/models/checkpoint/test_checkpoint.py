"""Checkpoint headers against hand-made files, and tensor reads against safetensors' own loader."""

import gc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from specchat.errors import (
    CorruptCheckpointError,
    ModelError,
    ModelNotFoundError,
    PickledCheckpointError,
    UnsupportedModelError,
)
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import open_checkpoint, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file as an attacker or a broken disk would write it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, **shards: dict[str, torch.Tensor]) -> None:
    """One shard per keyword and the index that belongs to them."""
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, NaN included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def num_open_files() -> int:
    gc.collect()  # what earlier tests left must not be closed in the middle of this one
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@st.composite
def tensors(draw):
    """A few named tensors of random shapes and bytes."""
    found = {}
    for i in range(draw(st.integers(1, 4))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        seed = draw(st.integers(0, 1 << 30))
        generator = torch.Generator().manual_seed(seed)
        if dtype == torch.bool:
            found[f"t{i}"] = torch.rand(shape, generator=generator) < 0.5
        else:
            found[f"t{i}"] = (torch.randn(shape, generator=generator) * 30).to(dtype)
    return found


# ---------------------------------------------------------------- reading


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(saved=tensors(), staging=st.integers(8, 40), pad=st.integers(0, 9), data=st.data())
def test_reads_what_safetensors_reads(tmp_path, saved, staging, pad, data):
    # The padding shifts the data to every alignment.
    save_file(saved, tmp_path / "model.safetensors", metadata={"pad": "x" * pad})
    reference = load_file(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(reference)
    with TensorReader(checkpoint, staging_bytes=staging) as reader:
        for key, wanted in reference.items():
            assert same_bytes(reader.read(key), wanted)
            assert same_bytes(reader.mapped(key)[0], wanted)
            out = torch.zeros(wanted.shape, dtype=data.draw(st.sampled_from(FLOATS)))
            reader.read_into(key, out)
            assert same_bytes(out, wanted.to(out.dtype))


@pytest.mark.parametrize("pad", range(8))
def test_reads_data_at_any_alignment(tmp_path, pad):
    values = torch.arange(6, dtype=torch.float32)
    head = json.dumps({"lead": entry(0, pad), "x": entry(pad, pad + 24, [6], "F32")}).encode()
    write_raw(tmp_path / "model.safetensors", head, b"z" * pad + values.numpy().tobytes())
    with TensorReader(open_checkpoint(tmp_path), staging_bytes=12) as reader:
        for found in (reader.read("x"), reader.mapped("x")[0]):
            assert torch.equal(found, values)
            found.zero_()  # nobody else sees that
        assert torch.equal(reader.mapped("x")[0], values)
        half = torch.empty(6, dtype=torch.float16)
        reader.read_into("x", half)
        assert torch.equal(half, values.half())


def _strided(shape: tuple[int, ...]) -> list[torch.Tensor]:
    rows, columns = shape
    return [
        torch.zeros(rows, columns + 3)[:, 1:-2],
        torch.zeros(columns, rows).t(),
        torch.zeros(rows, columns, 2)[..., 0],
        torch.zeros(rows, columns, dtype=torch.bfloat16).as_subclass(torch.nn.Parameter),
        torch.zeros(rows * columns),
        torch.zeros(rows, 1, columns),
    ]


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("staging", [8, 20, 1 << 20])
def test_fills_any_layout(tmp_path, case, staging):
    values = torch.randn(7, 5)
    save_file({"x": values}, tmp_path / "model.safetensors")
    out = _strided((7, 5))[case]
    with TensorReader(open_checkpoint(tmp_path), staging_bytes=staging) as reader:
        reader.read_into("x", out)
    assert torch.equal(out.detach().reshape(7, 5), values.to(out.dtype))


def test_a_strided_view_leaves_its_neighbours_alone(tmp_path):
    save_file({"x": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    whole = torch.zeros(4, 8)
    with TensorReader(open_checkpoint(tmp_path)) as reader:
        reader.read_into("x", whole[:, 2:6])
    assert whole.sum() == 16
    assert whole[:, 2:6].sum() == 16


def test_staging_memory_is_bounded_and_only_made_when_needed(tmp_path):
    save_file({"x": torch.randn(4096)}, tmp_path / "model.safetensors")
    with TensorReader(open_checkpoint(tmp_path), staging_bytes=1024) as reader:
        reader.read("x")
        assert reader._staging is None
        reader.read_into("x", torch.empty(4096, dtype=torch.float16))
        assert reader._staging.numel() == 1024


def test_reads_shards_through_the_index(tmp_path):
    write_shards(tmp_path, a={"x": torch.ones(3)}, b={"y": torch.zeros(2), "z": torch.ones(1)})
    with TensorReader(open_checkpoint(tmp_path)) as reader:
        assert torch.equal(reader.read("x"), torch.ones(3))
        assert torch.equal(reader.read("y"), torch.zeros(2))


def test_reads_a_set_without_index(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "part_a.safetensors")
    save_file({"y": torch.ones(3)}, tmp_path / "part_b.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"x", "y"}


def test_mistrals_duplicate_files_are_left_out(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "part.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert [info.file.name for info in open_checkpoint(tmp_path).tensors.values()] == ["part.safetensors"]


def test_weight_files_lists_missing_shards_too(tmp_path):
    write_shards(tmp_path, a={"x": torch.ones(3)}, b={"y": torch.zeros(2)})
    (tmp_path / "b.safetensors").unlink()
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_the_single_file_wins_over_an_index(tmp_path):
    write_shards(tmp_path, a={"old": torch.ones(3)})
    save_file({"new": torch.ones(3)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"new"}


def test_symbolic_links_of_the_hub_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"x": torch.ones(3)}, tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    with TensorReader(open_checkpoint(tmp_path / "snapshot")) as reader:
        assert torch.equal(reader.read("x"), torch.ones(3))


def test_close_closes_the_files(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    before = num_open_files()
    reader = TensorReader(open_checkpoint(tmp_path))
    reader.read("x")
    assert num_open_files() == before + 1
    reader.close()
    reader.close()
    assert num_open_files() == before


def test_headers_need_no_torch(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from specchat.models.checkpoint.safetensors import open_checkpoint;"
        f"assert open_checkpoint(Path({str(tmp_path)!r})).tensors['x'].nbytes == 12; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_the_error_for_a_truncated_shard_names_both_sizes(tmp_path, cut):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    full = file.stat().st_size
    os.truncate(file, full - cut)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in caught.value.message
    assert f"expected {full} bytes, found {full - cut}" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_truncated_within_its_header_is_refused(tmp_path, size):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", size)
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_file_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to mmap")

    save_file({"x": torch.arange(5)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch, "from_file", refuse)
    with TensorReader(open_checkpoint(tmp_path)) as reader:
        assert torch.equal(reader.mapped("x")[0], torch.arange(5))


@pytest.mark.parametrize("staging", [8, 12, 1 << 20])
def test_tensors_are_equal_if_their_bytes_are(tmp_path, staging):
    values = torch.arange(-3, 6.0)
    others = {
        "same": values.clone(),
        "last": values + (values > 4),
        "shape": values.clone().view(3, 3),
        "dtype": values.half(),
    }
    save_file({"x": values, **others}, tmp_path / "model.safetensors")
    with TensorReader(open_checkpoint(tmp_path), staging_bytes=staging) as reader:
        assert {name for name in others if reader.are_equal("x", name)} == {"same"}


def test_a_file_truncated_after_opening_is_refused(tmp_path):
    save_file({"x": torch.ones(1000), "y": torch.ones(1000)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with TensorReader(checkpoint, staging_bytes=256) as reader:
        reader.read("x")
        os.truncate(tmp_path / "model.safetensors", checkpoint.tensors["x"].offset + 2001)
        for out in (torch.empty(1000), torch.empty(1000, dtype=torch.float16)):
            with pytest.raises(CorruptCheckpointError, match="truncated"):
                reader.read_into("x", out)
        with pytest.raises(CorruptCheckpointError, match="truncated"):
            reader.mapped("y")


def test_a_file_removed_after_opening_cannot_be_read(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with TensorReader(checkpoint) as reader, pytest.raises(ModelError, match="cannot read"):
        reader.read("x")


def test_read_refuses_another_number_of_elements_and_unknown_keys(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    with TensorReader(open_checkpoint(tmp_path)) as reader:
        with pytest.raises(CorruptCheckpointError, match=r"\[3\], but the model expects \[4\]"):
            reader.read_into("x", torch.empty(4))
        with pytest.raises(CorruptCheckpointError, match="no tensor 'y'"):
            reader.read("y")


BAD_HEADERS = {
    "not JSON": (b"{nonsense", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "no object": (b"[1]", b""),
    "too deep": (b"[" * 100_000, b""),
    "key twice": (
        b'{"a":' + json.dumps(entry(0, 1)).encode() + b',"a":' + json.dumps(entry(0, 1)).encode() + b"}",
        b"x",
    ),
    "entry no object": ({"a": 3}, b""),
    "unknown dtype": ({"a": entry(0, 4, [1], "Q7")}, b"xxxx"),
    "dtype no text": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"xxxx"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"),
    "negative shape": ({"a": entry(0, 4, [-2, -2])}, b"xxxx"),
    "shape of bools": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, b"x"),
    "fractional offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1.0]}}, b"x"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x"),
    "backwards": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, b"x"),
    "span unlike shape": ({"a": entry(0, 8, [3], "F32")}, b"x" * 8),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6),
    "hole": ({"a": entry(0, 2), "b": entry(4, 6)}, b"x" * 6),
    "late start": ({"a": entry(2, 4)}, b"x" * 4),
    "beyond the file": ({"a": entry(0, 1 << 60)}, b"x"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_corrupt_headers_are_refused(tmp_path, case):
    header, data = BAD_HEADERS[case]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("length", [(1 << 64) - 1, 100_000_001, 4000])
def test_an_impossible_header_length_is_refused(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(tmp_path)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_opens_or_raises_a_named_error(tmp_path, data):
    save_file({"x": torch.ones(3), "y": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.safetensors").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        checkpoint = open_checkpoint(tmp_path)
    except (CorruptCheckpointError, UnsupportedModelError):
        return
    with TensorReader(checkpoint) as reader:
        for key in checkpoint.tensors:
            reader.read(key)


def test_a_valid_dtype_that_specchat_does_not_read_is_named(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": entry(0, 8, [1], "C64")}, b"x" * 8)
    with pytest.raises(UnsupportedModelError, match="C64"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_without_tensors_and_trailing_bytes_are_valid(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}}, b"trailing")
    assert not open_checkpoint(tmp_path).tensors


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4976698672\n"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "other.safetensors"])
def test_lfs_pointers_are_named(tmp_path, name):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CorruptCheckpointError, match="LFS pointer") as caught:
        open_checkpoint(tmp_path)
    assert "lfs pull" in caught.value.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(PickledCheckpointError, match=name) as caught:
        open_checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_pickles_beside_safetensors_do_not_matter(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"x"}


def test_a_missing_folder_or_weights_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(tmp_path / "none")


def test_a_missing_shard_of_the_index_is_named(tmp_path):
    write_shards(tmp_path, a={"x": torch.ones(3)}, b={"y": torch.ones(3)})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"b\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_a_dangling_link_is_a_missing_shard(tmp_path):
    write_shards(tmp_path, a={"x": torch.ones(3)}, b={"y": torch.ones(3)})
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "b.safetensors").symlink_to("gone")
    with pytest.raises(CorruptCheckpointError, match=r"b\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_found_by_its_number(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CorruptCheckpointError, match="1 of the 2 shards"):
        open_checkpoint(tmp_path)
    save_file({"y": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"x", "y"}


def test_a_key_of_the_index_that_no_shard_has_is_named(tmp_path):
    write_shards(tmp_path, a={"x": torch.ones(3), "y": torch.ones(3)})
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CorruptCheckpointError, match="lacks tensor 'y'"):
        open_checkpoint(tmp_path)


def test_a_key_in_two_shards_is_refused(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "b.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"tensor 'x' is in a\.safetensors and in .*b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": [1]},
        {"weight_map": {"x": 3}},
        {"weight_map": {"x": "../a.safetensors"}},
        {"weight_map": {"x": "/etc/a.safetensors"}},
        {"weight_map": {"x": "a.bin"}},
    ],
)
def test_invalid_indexes_are_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        open_checkpoint(tmp_path)


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match="Is a directory"):
        open_checkpoint(tmp_path)


def test_read_json_names_the_file(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ModelNotFoundError):
        read_json(file)
    file.write_text('{"a": [1, 2]}')
    assert read_json(file) == {"a": [1, 2]}
    for bad in ("", "{", "[]", "7", '{"a": 1, "a": 2}'):
        file.write_text(bad)
        with pytest.raises(CorruptCheckpointError, match=r"config\.json"):
            read_json(file)
