"""The kernel of a matmul is measured once, kept, and the same from then on.

python -m pytest -m gpu -s tests/models/quant/test_autotune.py
"""

from __future__ import annotations

import ast
import importlib.util
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from specchat.models.quant.autotune import Autotuner, rows_class
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.fp8 import Fp8
from specchat.models.quant.formats.int8 import Int8, Int8Quantizer
from specchat.models.quant.formats.nf4 import Bnb4, Nf4Quantizer
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels.chunked import Linear, scratch_bytes
from specchat.models.quant.modules import QuantLinear, Scratch

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHAPE = (24, 128)
EVERY_FORMAT = [
    Int8(),
    Bnb4(),
    Bnb4("fp4", 128, nested=False),
    Affine(4, 32, torch.float16, zeros=True),
    Affine(4, 128, torch.bfloat16, reordered=True),
    Affine(8, None, torch.float32),
    Fp8(128, 128, torch.float32),
    Plain(torch.bfloat16),
]


class Clock:
    """Seconds, as `time` would count them."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _calls_take_what_they_say(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except on a GPU, whose products are timed."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr("specchat.models.quant.autotune.time", CLOCK)


@dataclass(frozen=True)
class TwoWays(Int8):
    """A second way that is faster, or slower, than the first."""

    slow: str = field(default="dequantize", compare=False, repr=False)
    calls: list[str] = field(default_factory=list, compare=False, repr=False)

    def kernels(self, *_: object) -> dict[str, Linear]:
        def way(name: str) -> Linear:
            def linear(*args: Any) -> Tensor:
                self.calls.append(name)
                CLOCK.now += 0.01 if name == self.slow else 0.001
                return self.linear(*args)

            return linear

        return {name: way(name) for name in ("dequantize", "other")}


def segments_of() -> dict[str, Tensor]:
    segments = {each.name: torch.empty(each.shape, dtype=each.dtype) for each in Int8().segments(*SHAPE)}
    Int8Quantizer().quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), segments)
    return segments


def product(choices: Autotuner, weight_format: WeightFormat, num_rows: int = 5) -> Tensor:
    """x W^T by the chosen way."""
    x = torch.randn(num_rows, SHAPE[1], generator=torch.Generator().manual_seed(1))
    scratch = torch.empty(scratch_bytes(SHAPE, x.dtype, CPU), dtype=torch.uint8)
    segments = segments_of()
    return choices.linear(weight_format, x, segments, SHAPE, scratch)(x, segments, SHAPE, scratch, None)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("slow", ["dequantize", "other"])
def test_the_fastest_kernel_is_chosen(slow, tmp_path):
    fast = {"dequantize": "other", "other": "dequantize"}[slow]
    form = TwoWays(slow=slow)
    choices = Autotuner(tmp_path / "ways")
    expected = product(choices, Int8())
    assert torch.equal(product(choices, form), expected)
    assert form.calls[-1] == fast and {*form.calls} == {slow, fast}
    (kept,) = json.loads(only_file(tmp_path / "ways").read_text())["choices"]
    assert kept["way"] == fast and kept["times_s"][slow] > kept["times_s"][fast] > 0
    assert "24x128" in kept["product"] and "Ways" in kept["product"] and "8 rows" in kept["product"]


def test_a_choice_stays_even_if_its_kernel_becomes_slow(tmp_path):
    form = TwoWays()
    choices = Autotuner(tmp_path)
    product(choices, form)
    measuring = len(form.calls)
    later = TwoWays(slow="other", calls=form.calls)
    for other in (choices, Autotuner(tmp_path), Autotuner(tmp_path)):  # this run, and the next ones
        product(other, later)
    assert form.calls[measuring:] == ["other"] * 3
    assert torch.equal(product(choices, form, 6), product(Autotuner(tmp_path), form, 6))


def test_each_kind_of_matmul_is_measured_separately(tmp_path):
    form = TwoWays()
    choices = Autotuner(tmp_path)
    for num_rows, kinds in ((5, 1), (8, 1), (9, 2), (4, 3), (3, 3), (1, 4)):
        product(choices, form, num_rows)
        assert len(json.loads(only_file(tmp_path).read_text())["choices"]) == kinds
    product(choices, TwoWays(group=64))
    assert len(json.loads(only_file(tmp_path).read_text())["choices"]) == 5


DAMAGED = [b"", b"\xff\x00", b"[]", b'{"choices": 3}', b'{"choices": [{"product": "x"}]}', b'{"choices": [{"produ']


@pytest.mark.parametrize("content", DAMAGED, ids=repr)
def test_a_damaged_file_is_measured_again_and_replaced(content, tmp_path):
    product(Autotuner(tmp_path), TwoWays())
    file = only_file(tmp_path)
    good = json.loads(file.read_text())
    file.write_bytes(content)
    product(Autotuner(tmp_path), TwoWays())
    assert only_file(tmp_path) == file
    again = json.loads(file.read_text())
    assert [each["product"] for each in again["choices"]] == [each["product"] for each in good["choices"]]


@pytest.mark.parametrize("values", [{"way": "gone"}, {"way": ["other"]}, {"way": None}], ids=repr)
def test_an_unknown_kernel_in_the_file_is_measured_again(values, tmp_path):
    product(Autotuner(tmp_path), TwoWays())
    file = only_file(tmp_path)
    content = json.loads(file.read_text())
    content["choices"][0] |= values
    file.write_text(json.dumps(content))
    product(Autotuner(tmp_path), TwoWays())
    assert json.loads(file.read_text())["choices"][0]["way"] == "other"


def test_two_programs_keep_each_others_choices(tmp_path):
    one, other = Autotuner(tmp_path), Autotuner(tmp_path)
    product(one, TwoWays(), 1)
    product(other, TwoWays(), 2)
    product(one, TwoWays(), 4)
    assert len(json.loads(only_file(tmp_path).read_text())["choices"]) == 3


def test_an_unwritable_folder_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    form = TwoWays()
    choices = Autotuner(tmp_path / "file" / "ways")
    for _ in range(3):
        assert torch.equal(product(choices, form), product(choices, Int8()))
    assert form.calls[-3:] == ["other"] * 3
    assert form.calls.count("dequantize") == form.calls.count("other") - 3  # measured once


@pytest.mark.parametrize("weight_format", EVERY_FORMAT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_one_kernel(weight_format, dtype):
    assert [*weight_format.kernels(SHAPE, 1, dtype, CPU)] == ["dequantize"]


def test_a_single_kernel_is_not_measured(tmp_path):
    product(Autotuner(tmp_path), Int8())
    assert not [*tmp_path.iterdir()]


def test_float32_leaves_out_the_fused_kernel(monkeypatch):
    """bitsandbytes' fused kernel does: it is for few rows in 16 bits, in whole blocks, where there is one."""
    cuda, found = torch.device("cuda"), {}
    for kernel in (None, F.linear):
        monkeypatch.setattr("specchat.models.quant.formats.nf4.fused_product", lambda kernel=kernel: kernel)
        for dtype, num_rows, cols in ((FP32, 1, 128), (BF16, 1, 128), (FP16, 64, 128), (BF16, 128, 128), (BF16, 1, 96)):
            found[kernel is None, dtype, num_rows, cols] = [*Bnb4().kernels((24, cols), num_rows, dtype, cuda)]
    fused = {key for key, ways in found.items() if ways == ["dequantize", "fused"]}
    assert fused == {(False, BF16, 1, 128), (False, FP16, 64, 128)}
    assert all(ways == ["dequantize"] for key, ways in found.items() if key not in fused)


def test_the_fused_kernel_is_called_as_the_installed_bitsandbytes_has_it():
    """Its module needs a GPU, so its source is read."""
    root = importlib.util.find_spec("bitsandbytes").submodule_search_locations[0]
    module = ast.parse((Path(root) / "backends" / "cuda" / "ops.py").read_text())
    (kernel,) = (node for node in module.body if getattr(node, "name", "") == "_gemm_4bit_kernel_impl")
    expected = "A B shapeB absmax blocksize quant_type bias absmax_8bit absmax_code absmax_offset"
    assert " ".join(argument.arg for argument in kernel.args.args) == expected


@given(st.integers(1, 5000), st.integers(1, 300))
def test_rows_class_is_the_next_power_of_two(num_rows, cols):
    found = rows_class(torch.empty(1, num_rows, cols, device="meta"), (3, cols))
    assert found & (found - 1) == 0
    assert found // 2 < num_rows <= found


def test_a_module_looks_up_each_kind_once(tmp_path, monkeypatch):
    asked = []
    choices = Autotuner(tmp_path)
    monkeypatch.setattr("specchat.models.quant.modules.autotuner", lambda: asked.append(1) or choices)
    form = TwoWays()
    module = QuantLinear(form, SHAPE, None, Scratch())
    for name, segment in segments_of().items():
        setattr(module, name, torch.nn.Parameter(segment, requires_grad=False))
    for num_rows in (3, 4, 3, 4):
        module(torch.ones(1, num_rows, SHAPE[1]))
    assert len(asked) == 1 and form.calls[-4:] == ["other"] * 4
    module(torch.ones(1, 5, SHAPE[1]))
    assert len(asked) == 2


# --- on a GPU --------------------------------------------------------------------------------------------------------

LARGE = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))
ROWS = (1, 4, 8, 32, 64, 256)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


def on_cuda(quantizer: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Segments of a Gaussian matrix."""
    segments = {each.name: torch.empty(each.shape, dtype=each.dtype) for each in quantizer.format.segments(*shape)}
    quantizer.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02, segments)
    return {name: segment.cuda() for name, segment in segments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [Int8Quantizer(), Nf4Quantizer()], ids=lambda q: q.format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_agree_on_a_gpu(quantizer, dtype, cuda):
    """To the last bit, but for the fused kernel, which is there in 16 bits only and errs by their roundings."""
    if quantizer.format.name == "nf4":
        pytest.importorskip("bitsandbytes")
    shape = (11008, 4096)
    segments = on_cuda(quantizer, shape)
    scratch = torch.empty(scratch_bytes(shape, dtype, cuda), dtype=torch.uint8, device=cuda)
    bias = torch.randn(shape[0], dtype=dtype, device=cuda)
    for num_rows in (1, 3, 8, 64):
        x = torch.randn(1, num_rows, shape[1], dtype=dtype, device=cuda)
        ways = quantizer.format.kernels(shape, num_rows, dtype, cuda)
        print(quantizer.format.name, dtype, num_rows, [*ways])
        expected = ways.pop("dequantize")(x, segments, shape, scratch, bias)
        fused = ways.pop("fused", None)
        for way in ways.values():
            assert torch.equal(way(x, segments, shape, scratch, bias), expected)
        if fused is not None:
            found = fused(x, segments, shape, scratch, bias)
            error = (found - expected).float().norm() / expected.float().norm()
            assert error < {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [Int8Quantizer(), Nf4Quantizer()], ids=lambda q: q.format.name)
def test_measuring_is_short_and_takes_no_extra_memory(quantizer, cuda, tmp_path):
    if quantizer.format.name == "nf4":
        pytest.importorskip("bitsandbytes")
    form, dtype = quantizer.format, torch.bfloat16
    matrices = [(shape, on_cuda(quantizer, shape)) for shape in LARGE]
    scratch_size = max(scratch_bytes(shape, dtype, cuda) for shape in LARGE)
    scratch = torch.empty(scratch_size, dtype=torch.uint8, device=cuda)
    inputs = {(n, cols): torch.randn(n, cols, dtype=dtype, device=cuda) for n in ROWS for cols in (4096, 11008)}
    for shape, segments in matrices:  # libraries load their kernels and take their workspaces
        for way in form.kernels(shape, 64, dtype, cuda).values():
            way(inputs[64, shape[1]], segments, shape, scratch, None)

    def peak_bytes(call: Any) -> int:
        before = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        call()
        return torch.cuda.max_memory_allocated(cuda) - before

    choices, took_s = Autotuner(tmp_path), 0.0
    for shape, segments in matrices:
        for num_rows in ROWS:
            arguments = (inputs[num_rows, shape[1]], segments, shape, scratch)
            plain = peak_bytes(lambda arguments=arguments: form.linear(*arguments, None))
            torch.cuda.synchronize(cuda)
            begin = time.perf_counter()
            assert peak_bytes(lambda arguments=arguments: choices.linear(form, *arguments)) <= plain
            took_s += time.perf_counter() - begin
    for each in json.loads(only_file(tmp_path).read_text())["choices"]:
        print(each["product"], {name: f"{1e6 * s:.0f} us" for name, s in each["times_s"].items()}, "->", each["way"])
    print(f"measured in {took_s:.2f} s")
    assert took_s < 1
