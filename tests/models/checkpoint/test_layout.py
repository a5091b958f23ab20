"""How matrices are cut for dequantizing."""

import pytest

from specchat.models.checkpoint.layout import dequantized_rows
from specchat.units import MIB


@pytest.mark.parametrize(
    ("rows", "cols"), [(8192, 28672), (28672, 8192), (128256, 8192), (1024, 8192), (100, 1 << 26), (4096, 1 << 27)]
)
def test_a_gpu_multiplies_whole_blocks_of_rows(rows: int, cols: int):
    """Results whose rows are no multiples of 16 bytes would take slower kernels."""
    step = dequantized_rows(rows, cols, 2, "cuda")
    assert 0 < step <= rows and (step * cols * 2 <= 128 * MIB or step == 1)
    assert step == rows or step % 64 == 0 or step * cols * 2 * 64 > 128 * MIB
