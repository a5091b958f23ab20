"""Blocks that numba's loops dequantize have the bits of those that torch dequantizes."""

import pickle
import threading
from pathlib import Path

import pytest
import torch

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.quant.formats import ggml_compiled as compiled
from specchat.models.quant.formats.base import Segments
from specchat.models.quant.formats.ggml import Blocks, decode, decode_by_torch

pytest.importorskip("numba")
from specchat.models.quant.formats.ggml_numba import LOOPS
from specchat.models.quant.kernels import numba_tasks

# float16: zeros, the smallest and the largest subnormal, 1, the largest, infinities, and NaN
SCALES = (0, 0x8000, 1, 0x83FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E01, 0x7C01)
# Where blocks have float16 values.
SCALES_AT = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def every_scale(kind: str, cols: int, rows: int) -> torch.Tensor:
    """Rows of blocks with random codes; scales are random bytes, and in half of the blocks special values."""
    block = BLOCK_TYPES[kind]
    generator = torch.Generator().manual_seed(sum(kind.encode()))
    count = rows * cols // block.numbers
    blocks = torch.randint(0, 256, (count, block.nbytes), dtype=torch.uint8, generator=generator)
    for which, at in enumerate(SCALES_AT.get(kind, ())):
        for index in range(0, count, 2):
            scale = SCALES[(index // 2 // len(SCALES) ** which) % len(SCALES)]
            blocks[index, at], blocks[index, at + 1] = scale & 255, scale >> 8
    if kind in ("MXFP4", "NVFP4"):
        blocks[:, 0] = torch.arange(count) % 256
    return blocks.view(rows, -1)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of values, and one number for all NaN."""
    words = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    return words.masked_fill(values.isnan(), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(LOOPS))
def test_loops_give_the_bits_of_torch(kind, dtype):
    rows = every_scale(kind, 512, 301)
    found, expected = (torch.full((301, 512), 7.0, dtype=dtype) for _ in range(2))
    assert compiled.fill(kind, rows, found)
    decode_by_torch(kind, rows, expected)
    assert torch.equal(bits(found), bits(expected))
    assert 0.001 < (~expected.isfinite()).float().mean() < 0.7 or kind in ("MXFP4", "NVFP4")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_row_is_filled_once_by_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 31, 400):
            blocks = every_scale("Q4_K", 1024, rows)
            found = torch.full((rows + 1, 1024), 7.0, dtype=torch.bfloat16)
            assert compiled.fill("Q4_K", blocks, found[:rows])
            expected = decode_by_torch("Q4_K", blocks, torch.empty(rows, 1024, dtype=torch.bfloat16))
            assert torch.equal(bits(found[:rows]), bits(expected))
            assert bool((found[rows] == 7).all())
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart_and_at_odd_addresses():
    rows = every_scale("Q8_0", 256, 40)
    apart = torch.zeros(40, 2 * rows.shape[1] + 1, dtype=torch.uint8)[:, 1 : 1 + rows.shape[1]]
    apart.copy_(rows)
    odd = torch.zeros(rows.numel() + 1, dtype=torch.uint8)[1:].view(rows.shape)
    odd.copy_(rows)
    expected = decode_by_torch("Q8_0", rows, torch.empty(40, 256))
    for each in (apart, odd):
        assert torch.equal(bits(decode("Q8_0", each, torch.empty(40, 256))), bits(expected))


def test_products_of_several_threads_have_the_same_bits(monkeypatch):
    form, x, shape = Blocks("Q6_K"), torch.randn(3, 512), (301, 512)
    blocks = torch.randint(0, 100, (301, BLOCK_TYPES["Q6_K"].row_bytes(512)), dtype=torch.uint8)
    segments: Segments = {"blocks": blocks}
    found: list[torch.Tensor] = []

    def multiply() -> None:
        for _ in range(20):
            found.append(form.linear(x, segments, shape, torch.empty(301 * 512 * 4, dtype=torch.uint8)))

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(compiled, "fill", lambda kind, rows, out: False)
    expected = form.linear(x, segments, shape, torch.empty(301 * 512 * 4, dtype=torch.uint8))
    assert len(found) == 60
    assert all(torch.equal(each, expected) for each in found)


def test_memory_with_gaps_is_left_to_torch():
    rows, out = every_scale("Q4_K", 256, 6), torch.empty(12, 256)[::2]
    assert not compiled.fill("Q4_K", rows, out)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", {})


def test_without_numba_torch_dequantizes(nothing_compiled, monkeypatch):
    monkeypatch.setattr(compiled, "_numba", lambda: None)
    rows = every_scale("Q4_K", 256, 5)
    assert not compiled.fill("Q4_K", rows, torch.empty(5, 256))
    decode("Q4_K", rows, out := torch.empty(5, 256))
    assert torch.equal(bits(out), bits(decode_by_torch("Q4_K", rows, torch.empty(5, 256))))


@pytest.mark.parametrize(("kind", "dtype"), [("IQ2_XS", torch.float32), ("Q4_K", torch.float16)])
def test_torch_dequantizes_what_no_loop_does(kind, dtype):
    assert not compiled.fill(kind, every_scale(kind, 256, 5), torch.empty(5, 256, dtype=dtype))


def test_other_libraries_of_threads_leave_several_threads_to_torch(monkeypatch):
    monkeypatch.setattr(compiled, "_openmp", lambda: None)
    rows, out = every_scale("Q4_K", 256, 5), torch.empty(5, 256)
    assert compiled.fill("Q4_K", rows, out)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not compiled.fill("Q4_K", rows, out)


def test_loops_that_do_not_compile_are_tried_once_with_a_warning(nothing_compiled, monkeypatch):
    tries = []

    def build(*args):
        tries.append(args[-1])
        raise RuntimeError("no machine code for this processor")

    monkeypatch.setattr(numba_tasks, "build", build)
    rows = every_scale("Q4_K", 256, 5)
    with pytest.warns(RuntimeWarning, match=r"torch dequantizes Q4_K: no machine code"):
        assert not compiled.fill("Q4_K", rows, torch.empty(5, 256))
    assert not compiled.fill("Q4_K", rows, torch.empty(5, 256))
    assert tries == [str(compiled._folder()), None]


def test_a_folder_that_others_may_write_to_is_not_used(nothing_compiled, monkeypatch, tmp_path):
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "compiled")
    assert compiled.fill("Q8_0", every_scale("Q8_0", 256, 5), torch.empty(5, 256))
    assert not list((tmp_path / "compiled").iterdir())


def test_a_folder_that_cannot_be_written_is_done_without(nothing_compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "file" / "compiled")
    assert compiled.fill("Q8_0", every_scale("Q8_0", 256, 5), torch.empty(5, 256))


def test_machine_code_is_kept_and_damage_to_it_is_done_without(nothing_compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)
    compiled.prepare(["Q8_0"], torch.float32)
    kept = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    for path in kept:
        path.write_bytes(b"damaged")
    compiled._compiled.clear()
    assert compiled.fill("Q8_0", every_scale("Q8_0", 256, 5), torch.empty(5, 256))
    for path in kept:  # names a module that there is not
        path.write_bytes(pickle.dumps(str).replace(b"builtins", b"builtinz"))
    compiled._compiled.clear()
    assert compiled.fill("Q8_0", every_scale("Q8_0", 256, 5), torch.empty(5, 256))
