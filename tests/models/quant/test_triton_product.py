"""The Triton kernel that multiplies few rows with scaled integers, in Triton's interpreter, compiled, and on a GPU.

    python -m pytest -m gpu tests/models/quant/test_triton_product.py

Tests without a GPU need Triton too, as those of test_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.triton_products import Product, check, large_products, small_products

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_product_equals_torch_in_triton_s_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "support.triton_products"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 30


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("bits, block_rows", [(8, 16), (8, 32), (8, 64), (4, 16), (4, 64)])
@pytest.mark.slow
def test_the_product_compiles_for_gpus(
    bits: int, block_rows: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tensor cores multiply, codes are read ahead, nothing spills, and no number is so small that it becomes zero."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from specchat.models.quant.kernels import triton_product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"bits": bits, "group": 128, "has_zeros": bits == 4, "rounds": bits == 4, "is_whole": True}
    constants |= {"tile": triton_product.TILE, "block_rows": block_rows, "block_cols": 128}
    pointers = {"x": "*bf16", "codes": "*u8" if bits == 4 else "*i8", "scales": "*bf16", "zeros": "*i8", "out": "*bf16"}
    sizes = dict.fromkeys(("m", "rows", "cols", "code_cols", "num_groups"), "i32")
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 4, 6, 7, 8)}
    signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
    source = ASTSource(triton_product._kernel, signature, constants, aligned)
    options = {"num_warps": triton_product._WARPS[block_rows], "num_stages": triton_product._STAGES}
    made = triton.compile(source, GPUTarget("cuda", capability, 32), options | {"enable_fp_fusion": False})
    ptx = made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
    assert "mma.sync" in ptx or "wgmma.mma" in ptx
    assert "cp.async" in ptx and ".local" not in ptx and ".ftz" not in ptx


@pytest.mark.gpu
@pytest.mark.parametrize("product", [*small_products((torch.float16, torch.bfloat16)), *large_products()], ids=str)
def test_a_gpu_multiplies_few_rows_with_integers(product: Product):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(product, torch.device("cuda:0"))
