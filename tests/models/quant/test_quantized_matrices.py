"""Matrices of every scheme of pre-quantized checkpoints have the values that their libraries compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized import Kind, awq, block_fp8, bnb4, bnb8, compressed, gptq
from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.dtypes import stored_name
from specchat.models.checkpoint.layout import PIECE_NUMBERS
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import Affine, pack_nibbles, unpack_nibbles
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.fp8 import widen
from specchat.models.quant.kernels.chunked import Segments, scratch_bytes
from specchat.models.quant.schemes.registry import scheme_of

MODULE = "model.layers.3.mlp.up_proj"
CPU = torch.device("cpu")

# Shapes that each kind can have; the last is ragged where the kind allows it.
EVEN = ((32, 64), (64, 128), (40, 96))
GPTQ_RAGGED = (*EVEN, (24, 72))  # the last group is smaller
CT_RAGGED = (*EVEN, (10, 32))
ANY = ((32, 64), (64, 96), (7, 33), (130, 250))
FP16, FP32 = torch.float16, torch.float32
CASES: list[tuple[Kind, tuple[tuple[int, int], ...]]] = [
    (gptq(sym=True), GPTQ_RAGGED),
    (gptq(), GPTQ_RAGGED),
    (gptq(version=2), GPTQ_RAGGED),
    (gptq(group=-1), EVEN),
    (gptq(act_order=True), GPTQ_RAGGED),
    (gptq(act_order=True, sym=True, version=2, dtype=torch.bfloat16), GPTQ_RAGGED),
    (gptq(group=-1, act_order=True), EVEN),
    (gptq(8, sym=True), GPTQ_RAGGED),
    (gptq(8, version=2), GPTQ_RAGGED),
    (gptq(8, act_order=True), GPTQ_RAGGED),
    (awq(), EVEN),
    (awq(-1), EVEN),
    (awq(16), EVEN),
    (compressed("pack-quantized", group=32), CT_RAGGED),
    (compressed("pack-quantized", group=32, sym=False), CT_RAGGED),
    (compressed("pack-quantized", group=32, sym=False, act_order=True), CT_RAGGED),
    (compressed("pack-quantized", strategy="channel", dtype=FP16), ANY),
    (compressed("pack-quantized", strategy="channel", sym=False, dtype=FP32), ANY),
    (compressed("pack-quantized", strategy="tensor"), ANY),
    (compressed("pack-quantized", bits=8, group=32), CT_RAGGED),
    (compressed("pack-quantized", bits=8, group=32, sym=False), CT_RAGGED),
    (compressed("pack-quantized", bits=8, strategy="channel", sym=False), ANY),
    (compressed("int-quantized", bits=8, strategy="channel"), ANY),
    (compressed("int-quantized", bits=8, strategy="channel", sym=False, dynamic=False), ANY),
    (compressed("int-quantized", bits=8, strategy="tensor", dtype=FP32), ANY),
    (compressed("float-quantized", bits=8, strategy="tensor", dynamic=False), ANY),
    (compressed("float-quantized", bits=8, strategy="channel"), ANY),
    (compressed("float-quantized", bits=8, strategy="channel", dtype=FP16), ANY),
    (compressed("float-quantized", bits=8, strategy="block", block=[32, 16], dtype=FP32), EVEN),
    (bnb4(), (*ANY[:2], (130, 250))),
    (bnb4(nested=False), (*ANY[:2], (130, 250))),
    (bnb4("fp4"), (*ANY[:2], (130, 250))),
    (bnb4("fp4", nested=False, dtype=FP16), (*ANY[:2], (130, 250))),
    (bnb4(storage="bfloat16"), EVEN),
    (bnb4(storage="float32", nested=False), EVEN),
    (bnb4(block=128), ((64, 128), (96, 256), (40, 96))),
    (bnb8(), ANY),
    (block_fp8(), ((128, 128), (130, 250), (64, 300))),
    (block_fp8(dtype=torch.bfloat16), ((128, 256), (130, 250), (64, 300))),
    (block_fp8((32, 16)), ((64, 48), (70, 40))),
    (block_fp8(None), ANY),
]
ALL = [pytest.param(kind, shape, id=f"{kind.name}-{shape[0]}x{shape[1]}") for kind, shapes in CASES for shape in shapes]
ONE_EACH = [pytest.param(kind, shapes[-1], id=kind.name) for kind, shapes in CASES]


def random_matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows and columns of different sizes, not centred, so that scales and zero points matter."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[0], 1, generator=generator) + 0.2
    return torch.randn(shape, generator=generator) * spread + 0.3 * torch.randn(1, shape[1], generator=generator)


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(f"{MODULE}.{name}", stored_name(t.dtype), tuple(t.shape), Path("x"), 0, t.nbytes)
        for name, t in tensors.items()
    }


def empty_segments(form: WeightFormat, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {each.name: torch.empty(each.shape, dtype=each.dtype) for each in form.segments(*shape)}


def read(kind: Kind, shape: tuple[int, int], tensors: dict[str, Tensor]) -> tuple[WeightFormat, dict[str, Tensor]]:
    """As reading a checkpoint does: format from headers, then the numbers."""
    scheme = scheme_of({"quantization_config": json.loads(json.dumps(kind.config))})
    assert scheme is not None
    form = scheme.format_of(MODULE, shape, headers(tensors))
    assert form is not None
    segments = empty_segments(form, shape)
    scheme.transcode(MODULE, shape, tensors, segments)
    return form, segments


def dequantize(form: WeightFormat, segments: Segments, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return form.dequantize(segments, 0, shape[0], torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_values_equal_the_library_s(kind: Kind, shape: tuple[int, int]):
    tensors = kind.pack(random_matrix(shape), 5)
    expected = kind.unpack(tensors, shape)
    form, segments = read(kind, shape, tensors)
    ours = dequantize(form, segments, shape, expected.dtype)
    if kind.name == "bnb8":  # the library multiplies by the row's largest number and 1/127 one after the other
        torch.testing.assert_close(ours, expected, rtol=2.0**-22, atol=0)
    else:
        assert torch.equal(ours, expected)
    error = (expected.float() - random_matrix(shape)).norm() / random_matrix(shape).norm()
    assert error < 0.35  # the made checkpoint is no noise: 4 bits over a whole matrix are the worst


# Scales of 16 bits, by the name of their tensor: products have to be rounded to them before they are cast.
ROUNDED = [
    (gptq(), "scales"),
    (gptq(8, sym=True), "scales"),
    (gptq(act_order=True, dtype=torch.bfloat16), "scales"),
    (awq(), "scales"),
    (compressed("pack-quantized", group=32, dtype=FP16), "weight_scale"),
    (compressed("pack-quantized", group=32, sym=False, act_order=True), "weight_scale"),
    (compressed("int-quantized", bits=8, strategy="channel", sym=False, dtype=FP16), "weight_scale"),
    (compressed("float-quantized", bits=8, strategy="channel"), "weight_scale"),
]


@pytest.mark.parametrize(("kind", "scales"), [pytest.param(*each, id=each[0].name) for each in ROUNDED])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, FP16], ids=str)
def test_scaled_values_are_rounded_as_in_the_library(kind: Kind, scales: str, wanted: torch.dtype):
    """In the dtype of the scales, and only then cast: no number is another, however it was to be had."""
    shape = (64, 128)
    tensors = kind.pack(random_matrix(shape), 5)
    expected = kind.unpack(tensors, shape)
    assert expected.dtype == tensors[scales].dtype
    form, segments = read(kind, shape, tensors)
    assert torch.equal(dequantize(form, segments, shape, wanted), expected.to(wanted))
    exact = kind.unpack({**tensors, scales: tensors[scales].double()}, shape)
    if wanted != expected.dtype:
        assert not torch.equal(exact.to(wanted), expected.to(wanted)), "rounding would make no difference here"


@pytest.mark.parametrize(("kind", "shape"), ONE_EACH)
def test_values_do_not_depend_on_the_row_range(kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    form, segments = read(kind, shape, kind.pack(random_matrix(shape), 5))
    whole = dequantize(form, segments, shape, torch.float32)
    for numbers in (1, 3 * shape[1]):  # so that a few rows are several pieces
        monkeypatch.setitem(PIECE_NUMBERS, "cpu", numbers)
        assert torch.equal(dequantize(form, segments, shape, torch.float32), whole)
    for begin, end in ((0, 1), (1, 4), (3, shape[0]), (shape[0] - 2, shape[0])):
        out = torch.full((end - begin, shape[1]), float("nan"))
        assert torch.equal(form.dequantize(segments, begin, end, out), whole[begin:end])


@pytest.mark.parametrize(("kind", "shape"), ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_matmul_with_the_matrix(kind: Kind, shape: tuple[int, int], dtype: torch.dtype):
    tensors = kind.pack(random_matrix(shape), 5)
    form, segments = read(kind, shape, tensors)
    weight = dequantize(form, segments, shape, dtype)
    x, bias = random_matrix((5, shape[1]), 1).to(dtype), random_matrix((1, shape[0]), 2)[0].to(dtype)
    scratch = torch.empty(scratch_bytes(shape, dtype, CPU), dtype=torch.uint8)
    ours = form.linear(x[None], segments, shape, scratch, bias)[0]
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, bias), **tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_may_come_unpacked(bits: int):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    kind, shape = compressed("pack-quantized", bits=bits, group=32, sym=False), (24, 64)
    tensors = kind.pack(random_matrix(shape), 5)
    _, segments = read(kind, shape, tensors)
    zeros = unpack_from_int32(tensors["weight_zero_point"], bits, torch.Size((24, 2)), packed_dim=0)
    assert zeros.dtype == torch.int8
    _, others = read(kind, shape, {**tensors, "weight_zero_point": zeros})
    assert torch.equal(others["zeros"], segments["zeros"])


@pytest.mark.parametrize(
    "kind",
    [gptq(), gptq(version=2), gptq(8), gptq(8, version=2), awq()]
    + [compressed("pack-quantized", bits=bits, group=32, sym=False) for bits in (4, 8)],
    ids=lambda kind: kind.name,
)
def test_zero_points_at_both_ends_of_their_range(kind: Kind):
    """Of rows without a negative number, and without a positive one; GPTQ's first version stores 0 as -1."""
    shape = (32, 64)
    weight = random_matrix(shape).abs()
    weight[::2] *= -1
    tensors = kind.pack(weight, 5)
    form, segments = read(kind, shape, tensors)
    assert isinstance(form, Affine)
    ends = {0, 15} if form.bits == 4 else {-128, 127}
    assert ends == {int(segments["zeros"].min()), int(segments["zeros"].max())}
    expected = kind.unpack(tensors, shape)
    assert torch.equal(dequantize(form, segments, shape, expected.dtype), expected)


@pytest.mark.parametrize(("kind", "shape"), ONE_EACH)
def test_large_matrices_are_transcoded_in_pieces(kind: Kind, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    tensors = kind.pack(random_matrix(shape), 5)
    _, whole = read(kind, shape, tensors)
    for name, size in (
        ("schemes.gptq._ROWS", 5),
        ("schemes.compressed_tensors._ROWS", 3),
        ("schemes.awq._WORDS", 2),
        ("formats.fp8._CHECKED_ROWS", 3),
    ):
        monkeypatch.setattr(f"specchat.models.quant.{name}", size)
    _, pieces = read(kind, shape, tensors)
    assert whole.keys() == pieces.keys()
    for name, segment in whole.items():
        assert torch.equal(segment.view(torch.uint8), pieces[name].view(torch.uint8)), name


def test_columns_without_groups_keep_their_order():
    """As compressed-tensors fills `weight_g_idx` before a quantizer has had its say."""
    shape = (32, 64)
    tensors = CT.pack(random_matrix(shape), 5)
    expected = CT.unpack(tensors, shape)
    unset = {**tensors, "weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    form, segments = read(CT, shape, unset)
    assert torch.equal(dequantize(form, segments, shape, expected.dtype), expected)


@pytest.mark.parametrize("order", [True, "group", "dynamic", "Group", False, None, "weight", "static"], ids=str)
def test_values_of_actorder(order: bool | str | None):
    """Some say that columns are out of order in the file, some only how it was made."""
    tensors = headers(CT.pack(random_matrix((32, 64)), 5))
    scheme = scheme_of(weights_changed(CT, actorder=order))
    assert scheme is not None
    if order in (True, "group", "dynamic", "Group"):
        with pytest.raises(CorruptCheckpointError, match="weight_g_idx"):
            scheme.format_of(MODULE, (32, 64), tensors)
    else:
        assert scheme.format_of(MODULE, (32, 64), tensors) == Affine(4, 32, torch.bfloat16)


@given(rows=st.integers(1, 5), cols=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packed_nibbles_unpack_unchanged(rows: int, cols: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    packed = torch.empty(rows, -(-cols // 2), dtype=torch.uint8)
    pack_nibbles(numbers, packed)
    assert torch.equal(unpack_nibbles(packed, cols).view(torch.uint8), numbers)


def test_all_8_bit_floats_are_widened_exactly():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert torch.equal(widen(codes), codes.float())
    assert torch.equal(widen(codes).signbit(), codes.float().signbit())  # minus zero too


# --- what is refused -------------------------------------------------------------------------------------------------


def changed(kind: Kind, **values: Any) -> dict[str, Any]:
    return {"quantization_config": {**kind.config, **values}}


def weights_changed(kind: Kind, **values: Any) -> dict[str, Any]:
    group = kind.config["config_groups"]["group_0"]
    return changed(kind, config_groups={"group_0": {**group, "weights": {**group["weights"], **values}}})


CT = compressed("pack-quantized", group=32)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (changed(awq(), quant_method="aqlm"), "aqlm"),
        ({"quantization_config": {}}, "unnamed"),
        (changed(gptq(), bits=3), "3 bits"),
        (changed(gptq(), checkpoint_format="marlin"), "marlin"),
        (changed(gptq(), dynamic={"+:x": {"bits": 2}}), "2 bits"),
        (changed(awq(), version="gemv"), "gemv"),
        (changed(awq(), bits=8), "8 bits"),
        (changed(CT, format="mxfp6-pack-quantized"), "mxfp6"),
        (weights_changed(CT, type="float", group_size=64), "64 columns"),
        (changed(CT, quantization_status="frozen"), "not compressed"),
        (changed(CT, transform_config={"config_groups": {"u": {}}}), "rotated"),
        (changed(CT, sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (weights_changed(CT, num_bits=3), "3-bit"),
        (weights_changed(CT, strategy="tensor_group"), "tensor_group"),
        (changed(block_fp8(), fmt="e5m2"), "e5m2"),
        (changed(block_fp8(), scale_fmt="ue8m0"), "powers of two"),
    ],
)
def test_unknown_kinds_are_refused(config: dict[str, Any], word: str):
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        scheme_of(config)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quantization_config": 7}, "quantization_config"),
        (changed(gptq(), bits="four"), "bits"),
        (changed(gptq(), bits=None), "bits"),
        (changed(gptq(), group_size=0), "group_size"),
        (changed(gptq(), sym="yes"), "sym"),
        (changed(gptq(), dynamic=[]), "dynamic"),
        (changed(gptq(), dynamic={"+:(": {"bits": 8}}), "regular expression"),
        (changed(CT, config_groups={"a": {"targets": ["re:("], "weights": {"group_size": 32}}}), "regular expression"),
        (changed(bnb4(), load_in_4bit=False), "load_in_4bit"),
        (changed(CT, config_groups={}), "config_groups"),
        (weights_changed(CT, group_size=None), "group_size"),
        (weights_changed(CT, strategy="block"), "block_structure"),
        (changed(block_fp8(), weight_block_size=[128]), "weight_block_size"),
        (changed(block_fp8(), weight_block_size=[0, 128]), "weight_block_size"),
    ],
)
def test_invalid_configurations_name_the_setting(config: dict[str, Any], word: str):
    with pytest.raises(CorruptCheckpointError, match=word) as caught:
        scheme_of(config)
    assert caught.value.hint


SCALES = ("scales", "weight_scale", "weight_scale_inv", "SCB", "weight.absmax", "weight.nested_absmax")
NOT_NEEDED = {"g_idx", "weight_shape", "input_scale", "weight_format", "weight.quant_map"}


@pytest.mark.parametrize(("kind", "shape"), ONE_EACH)
def test_missing_and_truncated_tensors_are_named(kind: Kind, shape: tuple[int, int]):
    tensors = kind.pack(random_matrix(shape), 5)
    assert set(SCALES) & tensors.keys()
    for name in tensors.keys() - NOT_NEEDED:
        without = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(CorruptCheckpointError, match=MODULE) as caught:
            read(kind, shape, without)
        assert caught.value.hint
        if tensors[name].dim() and "quant_state" not in name:
            with pytest.raises(CorruptCheckpointError, match=MODULE) as caught:
                read(kind, shape, {**tensors, name: tensors[name][:-1]})
            assert name in caught.value.message


@pytest.mark.parametrize(
    "kind", [gptq(), gptq(8, act_order=True), awq(), CT, compressed("pack-quantized", group=32, sym=False)]
)
def test_a_wrong_group_size_is_an_error(kind: Kind):
    tensors = kind.pack(random_matrix((64, 128)), 5)
    config = weights_changed(kind, group_size=64) if "config_groups" in kind.config else changed(kind, group_size=64)
    scheme = scheme_of(config)
    assert scheme is not None
    with pytest.raises(CorruptCheckpointError, match=r"up_proj.*the configuration says") as caught:
        scheme.format_of(MODULE, (64, 128), headers(tensors))
    assert caught.value.hint


def broken(kind: Kind, name: str, change: Any) -> None:
    shape = (64, 128)
    tensors = kind.pack(random_matrix(shape), 5)
    tensors[name] = change(tensors[name].clone())
    read(kind, shape, tensors)


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        (gptq(act_order=True), "g_idx", torch.zeros_like),
        (gptq(), "g_idx", lambda t: t.flip(0)),
        (gptq(sym=True), "qzeros", lambda t: t + 1),
        (gptq(8, sym=True), "qzeros", lambda t: t + 1),
        (CT, "weight_shape", lambda t: t + 1),
        (compressed("pack-quantized", group=32, act_order=True), "weight_g_idx", torch.zeros_like),
        (compressed("float-quantized", bits=8, strategy="channel"), "weight", lambda t: t.fill_(float("nan"))),
        (block_fp8(), "weight", lambda t: t.fill_(float("nan"))),
        (bnb8(), "weight_format", lambda t: t + 1),
        (bnb4(), "weight.quant_map", lambda t: t + 0.1),
        (bnb4(), "weight.nested_quant_map", lambda t: t + 0.1),
        (bnb4(), "weight.quant_state.bitsandbytes__nf4", lambda t: t[:-1]),
        (bnb4(), "weight.quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
    ],
)
def test_invalid_contents_name_the_tensor(kind: Kind, name: str, change: Any):
    with pytest.raises(CorruptCheckpointError, match=rf"{MODULE}.{name}"):
        broken(kind, name, change)


@pytest.mark.parametrize("row", [0, 9, 10, 63])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_single_nan_is_found(row: int, code: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specchat.models.quant.formats.fp8._CHECKED_ROWS", 10)

    def spoil(codes: Tensor) -> Tensor:
        codes.view(torch.uint8)[row, 17] = code
        return codes

    with pytest.raises(CorruptCheckpointError, match="NaN"):
        broken(block_fp8(), "weight", spoil)


def test_the_quant_state_of_a_bnb_file_is_checked():
    changes = (("blocksize", 64, 99), ("nested_blocksize", 256, 255), ("shape", [64, 128], [64, 129]))
    for field, before, after in changes:
        old, new = (f'"{field}": {value}'.encode() for value in (before, after))

        def change(tensor: Tensor, old: bytes = old, new: bytes = new) -> Tensor:
            data = bytes(tensor.tolist())
            assert old in data
            return torch.tensor(list(data.replace(old, new)), dtype=torch.uint8)

        with pytest.raises(CorruptCheckpointError, match="quant_state"):
            broken(bnb4(), "weight.quant_state.bitsandbytes__nf4", change)


@pytest.mark.parametrize("kind", [gptq(), awq(), CT, bnb4(), bnb8(), block_fp8()], ids=lambda k: k.name)
def test_unquantized_matrices_have_no_format(kind: Kind):
    scheme = scheme_of({"quantization_config": kind.config})
    assert scheme is not None
    plain = {"weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    assert scheme.format_of(MODULE, (32, 64), headers(plain)) is None
    with pytest.raises(CorruptCheckpointError, match=MODULE):
        scheme.format_of(MODULE, (32, 65), headers(plain))
    assert scheme_of({"model_type": "llama"}) is None


def test_overrides_of_gptq_modules():
    """The first that matches counts, and what it does not say is as in the rest of the file."""
    overrides = {
        r"+:.*up_proj": {"sym": True},
        r"+:.*(up|down)_proj": {"desc_act": True},
        r".*layers\.3\..*": {"bits": 8, "sym": True},
    }
    scheme, shape = scheme_of(changed(gptq(), dynamic=overrides)), (64, 128)
    assert scheme is not None
    four, eight = headers(gptq().pack(random_matrix(shape), 1)), headers(gptq(8).pack(random_matrix(shape), 1))
    found = {
        name: scheme.format_of(f"model.layers.3.{name}", shape, eight if name == "o_proj" else four)
        for name in ("up_proj", "down_proj", "o_proj")
    }
    assert found == {
        "up_proj": Affine(4, 32, FP16),
        "down_proj": Affine(4, 32, FP16, zeros=True, reordered=True),
        "o_proj": Affine(8, 32, FP16),
    }
    assert scheme.format_of("model.layers.4.o_proj", shape, four) == Affine(4, 32, FP16, zeros=True)


def test_defaults_of_a_gptq_config():
    """Zero points are in the middle, and where one scale serves a whole row no column is out of order."""
    tensors, shape = headers(gptq(sym=True).pack(random_matrix((64, 128)), 1)), (64, 128)
    silent = scheme_of(changed(gptq(), sym=None, desc_act=None, checkpoint_format=None))
    assert silent is not None and silent.format_of(MODULE, shape, tensors) == Affine(4, 32, FP16)
    kind = gptq(group=-1, act_order=True)
    whole = scheme_of({"quantization_config": kind.config})
    assert whole is not None
    assert whole.format_of(MODULE, shape, headers(kind.pack(random_matrix(shape), 1))) == Affine(4, None, FP16, True)


@pytest.mark.parametrize(
    ("kind", "group_size"),
    [
        (compressed("pack-quantized", group=32), 32),
        (compressed("pack-quantized", strategy="channel"), -1),
        (compressed("pack-quantized", strategy="tensor"), None),
    ],
    ids=["group", "channel", "tensor"],
)
def test_defaults_of_a_compressed_tensors_config(kind: Kind, group_size: int | None):
    """The size of its groups says how scales lie; channels have no order of groups."""
    shape = (32, 64)
    tensors = headers(kind.pack(random_matrix(shape), 1))
    for order in (None, "group") if group_size == -1 else (None,):
        scheme = scheme_of(weights_changed(kind, strategy=None, group_size=group_size, actorder=order))
        assert scheme is not None
        group = 32 if group_size == 32 else None
        assert scheme.format_of(MODULE, shape, tensors) == Affine(4, group, torch.bfloat16)


def test_a_target_name_does_not_match_longer_names():
    group = {**CT.config["config_groups"]["group_0"], "targets": [MODULE]}
    scheme = scheme_of(changed(CT, config_groups={"a": group}))
    assert scheme is not None
    tensors = headers(CT.pack(random_matrix((32, 64)), 1))
    assert scheme.format_of(MODULE, (32, 64), tensors) == Affine(4, 32, torch.bfloat16)
    for other in (f"{MODULE}_2", MODULE.replace(".", "x", 1)):
        with pytest.raises(CorruptCheckpointError, match="no config group"):
            scheme.format_of(other, (32, 64), tensors)


def test_older_config_keys_are_read():
    """bitsandbytes' of 2023 have no `quant_method`, compressed-tensors' of 2024 another key."""
    old = {name: value for name, value in bnb4().config.items() if name != "quant_method"}
    for config, name in (
        ({"quantization_config": old}, "bitsandbytes 4-bit"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes 8-bit"),
        ({"compression_config": CT.config}, "compressed-tensors int4"),
    ):
        scheme = scheme_of(config)
        assert scheme is not None and scheme.name == name


def test_modules_of_one_checkpoint_may_differ():
    base = {**gptq().config, "dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 64}}}
    scheme = scheme_of({"quantization_config": base})
    assert scheme is not None
    shape = (64, 128)
    eight, four = gptq(8, 64).pack(random_matrix(shape), 1), gptq().pack(random_matrix(shape), 1)
    assert scheme.format_of(MODULE, shape, headers(eight)) == Affine(8, 64, torch.float16, zeros=True)
    assert scheme.format_of("model.layers.3.mlp.gate_proj", shape, headers(four)) == Affine(
        4, 32, torch.float16, zeros=True
    )
    groups = {
        "a": {"targets": ["re:.*up_proj"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}},
        "c": {"targets": ["model.layers.3.mlp.up_proj"], "weights": {"num_bits": 8, "strategy": "channel"}},
    }
    config = {**CT.config, "format": "mixed-precision", "config_groups": groups}
    scheme = scheme_of({"quantization_config": config})
    assert scheme is not None
    assert scheme.name == "compressed-tensors fp8 + int4 + int8"
    made = {
        "model.layers.3.mlp.up_proj": compressed("int-quantized", bits=8, strategy="channel"),
        "model.layers.4.mlp.up_proj": compressed("float-quantized", bits=8, strategy="channel"),
        "model.layers.4.mlp.down_proj": CT,
    }
    formats = {
        module: scheme.format_of(module, shape, headers(kind.pack(random_matrix(shape), 1)))
        for module, kind in made.items()
    }
    assert [form and form.name for form in formats.values()] == ["affine", "fp8", "affine"]
