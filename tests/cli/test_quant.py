"""`--quant`: invalid values, packs that are written once, and the quantization in every output."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.fake_engine import CHOSEN
from support.loading import load_engine, plan_here, plan_request, prepare
from support.planning import plan_for
from support.plans import changed
from support.tiny_models import make_config, random_model, save

from specchat.cli.app import run_command_line
from specchat.hardware.machine import Machine
from specchat.models.catalog.ref import demo_source
from specchat.models.catalog.shape import parse_shape
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.packs.pack import list_packs
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import layer_sizes, weight_bytes
from specchat.models.synthetic.layers import materialise
from specchat.models.weights.layout import LayerLayout
from specchat.models.weights.open import open_reader
from specchat.models.weights.recipe import QuantizeRecipe
from specchat.records.generation import Sampling
from specchat.records.model import QUANTS
from specchat.records.plan import Plan
from specchat.ui.chat_view import banner_lines

GIB = 1 << 30
SHAPE = "hidden=512,layers=9,heads=8,kv_heads=2,head_dim=64,mlp=1408"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def specchat(monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        capfd.readouterr()
        code = run_command_line(arguments)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def quiet(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quant", "int2"], ["--quant", "auto, none, int8, int4 or int3", "'int2'"]),
        (["--draft-quant", "nf4"], ["--draft-quant", "auto, none, int8, int4 or int3"]),
    ],
)
def test_invalid_quant_exits_with_2(specchat, arguments, words):
    result = specchat("run", "demo", "hi", *arguments)
    assert result.code == 2 and result.out == ""
    assert all(word in result.err for word in words)


def test_answer_reports_the_quantization(specchat):
    arguments = (
        "run",
        "demo",
        "hi",
        "--quant",
        "int8",
        "--draft-quant",
        "int4",
        "--max-tokens",
        "3",
        "--tree-budget",
        "16",  # fixed: in 16 bits, rounding depends on the number of rows
        "--json",
        "--seed",
        "1",
    )
    first, second = specchat(*arguments), specchat(*arguments)
    assert first.code == second.code == 0, first.err
    assert json.loads(first.out)["quant"] == "int8"
    assert json.loads(first.out)["token_ids"] == json.loads(second.out)["token_ids"]
    banner = first.err.splitlines()[0]
    assert "draft demo draft (int4)" in banner and banner.endswith("weights int8")
    assert "packing demo as int8" in first.err and "packing demo draft as int4" in first.err
    assert "packing" not in second.err, "quantized again"
    assert {pack.quantizer.split()[0] for pack in list_packs()} == {"int8-g128", "nf4-g64-nested"}


def test_quantized_plan_is_smaller(specchat):
    little = ("--draft", "none", "--device", "cpu", "--ctx", "512", "--vram", "22MiB")
    plans = {
        quant: json.loads(specchat("run", "demo", "--plan", "--json", "--quant", quant, *little).out)
        for quant in ("none", "int8", "int4")
    }
    assert [plan["quant"] for plan in plans.values()] == list(plans)
    sizes = [plan["streamed_bytes_per_step"] for plan in plans.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert not list_packs(), "a plan writes nothing"


# --- auto --------------------------------------------------------------------------------------------------------


def auto_plan(monkeypatch: pytest.MonkeyPatch, total_bytes: int, quant: str = "auto") -> Plan:
    machine = Machine("cpu", 8 * GIB, 8 * GIB, fast_bf16=True, total_bytes=total_bytes)
    monkeypatch.setattr("specchat.planner.inputs.find_machine", lambda _: machine)
    source = demo_source("target")
    return plan_here(plan_request(source, None, dtype="fp32", quant=quant))  # type: ignore[arg-type]


def test_auto_quantizes_only_as_far_as_memory_requires(monkeypatch):
    source = demo_source("target")
    full, int8 = (weight_bytes(describe(source, quant), "fp32") for quant in ("none", "int8"))
    for total_bytes, quant, lowered_from in [
        (full, "none", None),
        (full - 1, "int8", "bf16"),
        (int8, "int8", "bf16"),
        (int8 - 1, "int4", "bf16"),
        (1, "int4", "bf16"),
    ]:
        plan = auto_plan(monkeypatch, total_bytes)
        assert (plan.quant, plan.lowered_from) == (quant, lowered_from)
    asked = auto_plan(monkeypatch, 1, quant="int4")
    assert asked.lowered_from is None, "the user asked for it"
    assert auto_plan(monkeypatch, 1, quant="none").quant == "none"


def test_banner_shows_automatic_quantization(monkeypatch):
    source = demo_source("target")

    def banner(plan: Plan) -> str:
        return banner_lines(source, replace(CHOSEN, plan=plan), "no draft", "--plan")[0]

    lowered = auto_plan(monkeypatch, 1)
    assert "weights int4, not the original bf16 (keep it with --quant none)" in banner(lowered)
    asked = replace(lowered, lowered_from=None)
    assert banner(asked).endswith("weights int4")
    assert "weights" not in banner(replace(asked, quant="none"))


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["int8", "int4", pytest.param("int3", marks=pytest.mark.slow)])
def test_shapes_are_written_quantized(quant):
    """Compare with the layers of a quantized checkpoint; no full-precision weights are written."""
    shape = replace(parse_shape(SHAPE), quant=quant)
    source = materialise(shape)
    (pack,) = list_packs()
    assert pack.quantizer == QuantizeRecipe(quant).identity and pack.dtype == "bf16"
    assert prepare(source, "bf16", quant, progress=quiet, warn=quiet) == pack
    skeleton = build_skeleton(load_config(source.path), torch.bfloat16)
    open_reader(skeleton, open_checkpoint(materialise(replace(shape, quant="none")).path), QuantizeRecipe(quant))
    for layer, packed in zip(skeleton.layers, pack.layers, strict=True):
        layout = LayerLayout.of(layer)
        assert packed.nbytes == layout.nbytes
        infos = [info for info in open_checkpoint(pack.folder).tensors.values() if info.file == packed.path]
        offsets = [info.offset - packed.data_offset for info in infos if not info.key.startswith("__pad__")]
        assert offsets == list(layout.offsets)


def test_a_quantized_shape_still_computes_the_demo(specchat):
    """Also use another compute dtype, for which the norms are cast into a second pack."""
    for quant, dtype in (("int8", "bf16"), ("int4", "fp32")):
        arguments = ("run", f"shape:{SHAPE}", "Tell me a story.", "--quant", quant, "--dtype", dtype, "--ctx", "128")
        arguments += ("--tree-budget", "16")  # fixed: the size of an adaptive tree depends on how long passes take
        plan = json.loads(specchat(*arguments, "--plan", "--json").out)
        resident = next(item["bytes"] for item in plan["ledger"] if item["item"] == "resident layers")
        spec = describe(materialise(replace(parse_shape(SHAPE), quant=quant)), quant)
        stored = sum(layer_sizes(spec, dtype))  # with all memory, layers are larger to be faster
        vram = f"{(plan['device_bytes'] - resident + stored * 6 // 10) / 2**20:.2f}MiB"
        result = specchat(*arguments, "--max-tokens", "24", "--json", "--vram", vram, "--ram", "1MiB")
        assert result.code == 0, result.err
        answer = json.loads(result.out)
        assert answer["quant"] == quant
        assert 3 <= answer["memory"]["streamed_layers"] < 9
        assert answer["speculation"]["tokens_per_step"] > 2, "the demo draft guesses what it computes"


def test_described_size_includes_quantization(tmp_path):
    source = save(random_model(make_config("llama")), tmp_path / "model")
    specs = {quant: describe(source, quant) for quant in QUANTS}
    assert [spec.quant for spec in specs.values()] == list(specs)
    sizes = [weight_bytes(spec, "fp32") for spec in specs.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(QUANTS)
    plan = plan_for(plan_request(source, None), Machine("cpu", 8 * GIB, 8 * GIB, False), specs["int4"], None)
    assert plan.quant == "int4"
    items = {item.item for item in plan.ledger}
    assert "dequantized pieces" in items
    with load_engine(changed(plan, ctx=64), source, None) as engine:
        steps = list(engine.generate([3, 4, 5], Sampling(), stop_ids=frozenset(), max_tokens=4))
        assert len(steps) == 4
        assert engine.memory().device_peak_bytes <= plan.device_bytes
