"""The table of dtypes against torch and the safetensors library."""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from safetensors.torch import load, save

from specchat.models.checkpoint import dtypes
from specchat.records.model import DTYPE_BYTES, Dtype


@pytest.mark.parametrize("name", dtypes.STORED_DTYPES)
def test_names_and_sizes_match_torch_and_safetensors(name: str):
    dtype = dtypes.stored_torch_dtype(name)
    assert dtype.itemsize == dtypes.STORED_DTYPES[name].nbytes
    assert dtypes.stored_name(dtype) == name
    data = save({"x": torch.zeros(3, dtype=dtype)})
    assert f'"dtype":"{name}"'.encode() in data
    if name != "F8_E8M0":  # safetensors writes it, but does not read it
        assert load(data)["x"].dtype == dtype


def test_every_compute_dtype_has_names():
    assert set(DTYPE_BYTES) == set(get_args(Dtype))
    for short, nbytes in DTYPE_BYTES.items():
        dtype = dtypes.torch_dtype(short)
        assert dtype.itemsize == nbytes
        assert dtypes.short_name(str(dtype)) == dtypes.short_name(dtypes.torch_name(short)) == short
    assert dtypes.short_name(str(torch.float64)) is None and dtypes.short_name("None") is None


def test_headers_need_no_torch():
    code = "import sys, specchat.models.checkpoint.reader; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
