"""The Triton kernels equal torch, in Triton's interpreter and on a GPU.

    python -m pytest -m gpu tests/models/quant/test_triton.py

Tests without a GPU need Triton too: it comes with torch for CUDA, and takes a gigabyte next to torch for CPUs
(`pip install --no-deps triton`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiles
from support.triton_cases import (
    EXPERT_FORMS,
    Case,
    block_cases,
    check,
    check_blocks,
    check_experts,
    check_product,
    expert_segments,
    large_cases,
    small_cases,
)

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, BlockType
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.unpacked import INT3, KINDS

ROOT = Path(__file__).parents[3]


def test_the_kernel_equals_torch_in_triton_s_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "support.triton_cases"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 150


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_compiles_for_gpus(bits: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No number is so small that it is taken for zero; a thread writes 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specchat.models.quant.kernels import triton_affine

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"bits": bits, "group": 32, "has_zeros": True, "rounds": True, "block": triton_affine._BLOCK}
    pointers = {"codes": "*u8" if bits == 4 else "*i8", "scales": "*fp16", "zeros": "*i8", "out": "*bf16"}
    sizes = dict.fromkeys(("cols", "code_cols", "num_groups"), "i32")
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers) + 2)}
    source = ASTSource(
        triton_affine._kernel, pointers | sizes | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False})
    assert len(made.asm["cubin"]) > 1000
    assert ".ftz" not in made.asm["ptx"]
    assert "st.global.v4.b32" in made.asm["ptx"]


@pytest.mark.parametrize("form, cols", EXPERT_FORMS, ids=str)
def test_what_the_kernel_for_experts_is_told_gives_the_values(form: WeightFormat, cols: int):
    shape = 67, cols
    tile, segments = form.tile_form(shape), expert_segments(form, shape, 3)
    assert tile is not None
    values = torch.tensor(tile.values or (0.0,))
    found = tiles.weights([each.data_ptr() for each in segments.values()], values, tile, shape)
    assert torch.equal(found, form.dequantize(segments, 0, 67, torch.empty(shape)))


@pytest.mark.parametrize("capability", [80, 89, 120])
@pytest.mark.parametrize("form", dict(EXPERT_FORMS), ids=str)
def test_the_kernel_for_experts_compiles(
    form: WeightFormat, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """16-bit products use the tensor cores, and the tile stays in registers."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specchat.models.quant.kernels import triton_experts

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = form.tile_form((128, 192))
    assert tile is not None
    sizes = {"per_row": 8, "block_pairs": 16, "block_rows": 64, "block_cols": 64}
    constants = triton_experts.constants_of(tile) | sizes
    pointers = {"x": "*bf16", "order": "*i64", "starts": "*i64", "addresses": "*i64", "values": "*fp32", "out": "*bf16"}
    numbers = dict.fromkeys(("rows", "cols", "first", "width", "num_experts"), "i32")
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(triton_experts._kernel, signature, constants, aligned)
    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False})
    assert len(made.asm["cubin"]) > 1000
    assert ".ftz" not in made.asm["ptx"]
    assert "mma.sync" in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form, cols", EXPERT_FORMS, ids=str)
def test_a_gpu_gives_the_products_of_experts(form: WeightFormat, cols: int, dtype: torch.dtype):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_experts(form, cols, dtype, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*small_cases(), *large_cases()], ids=str)
def test_a_gpu_gives_the_same_values(case: Case):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(case, torch.device("cuda:0"))


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("kind", [*KINDS, INT3])
@pytest.mark.slow
def test_the_kernels_of_blocks_compile_for_gpus(kind: str, capability: int, tmp_path: Path, monkeypatch):
    """No number is so small that it is taken for zero, and nothing is multiplied and added in one rounding."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specchat.models.quant.kernels import triton_blocks

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block = BLOCK_TYPES.get(kind, BlockType(INT3, 128, 0))
    stored = dict.fromkeys(("codes", "signs", "ninths", "scales"), "*u8") | {"book": "*fp32"}
    widths = dict.fromkeys(("code_cols", "sign_cols", "ninth_cols", "scale_cols"), "i32")
    constants = {"kind": kind, "numbers": block.numbers, "nbytes": block.nbytes}
    fill = stored | {"out": "*bf16", "cols": "i32"} | widths
    multiply = stored | {"x": "*bf16", "out": "*bf16", "rows": "i32", "cols": "i32"} | widths | {"m": "i32"}
    for kernel, signature, own in (
        (triton_blocks._fill_kernel, fill, {"block": triton_blocks.FILL_BLOCK}),
        (triton_blocks._product_kernel, multiply, {"block": triton_blocks.PRODUCT_BLOCK, "padded": 4, "steps": 8}),
    ):
        all_constants = constants | own
        source = ASTSource(kernel, signature | dict.fromkeys(all_constants, "constexpr"), all_constants)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False})
        assert len(made.asm["cubin"]) > 1000
        assert ".ftz" not in made.asm["ptx"] and "fma.rn.f32" not in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*block_cases()], ids=str)
def test_a_gpu_unpacks_the_same_values(case: tuple[Any, ...]):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_blocks(*case, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize("kind", [*KINDS, INT3])
def test_a_gpu_multiplies_few_rows(kind: str, m: int):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_product(kind, (300, 4096), m, torch.device("cuda:0"))
