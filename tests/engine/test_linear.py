"""Selection of the linear layers that oneDNN computes."""

import pytest
import torch
from torch import nn

from specchat.engine.linear import use_fast_matmuls
from specchat.models.quant.kernels import matmul


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL computes otherwise anyway")
@pytest.mark.parametrize(("intel", "changed"), [(False, ["large", "half", "inner.large"]), (True, ["half"])])
def test_large_float32_layers_use_onednn_where_mkl_is_slow_and_16_bits_always(monkeypatch, intel, changed):
    monkeypatch.setattr(matmul, "is_intel", lambda: intel)
    model = nn.Module()
    with torch.device("meta"):
        model.large, model.small = nn.Linear(1024, 1024), nn.Linear(1024, 1023, bias=False)
        model.half = nn.Linear(1024, 1024, dtype=torch.bfloat16)
        model.inner = nn.Module()
        model.inner.large = nn.Linear(2048, 1024)
    use_fast_matmuls(model)
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == changed


def test_onednn_layers_use_the_currently_bound_weight(monkeypatch):
    monkeypatch.setattr(matmul, "is_intel", lambda: False)
    module, x = nn.Linear(1024, 1024), torch.randn(1, 2, 1024)
    use_fast_matmuls(module)
    with torch.inference_mode():
        for _ in range(2):
            module.weight = nn.Parameter(torch.randn(1024, 1024), requires_grad=False)
            torch.testing.assert_close(module(x), x @ module.weight.T + module.bias, rtol=1e-3, atol=1e-3)
