"""Plans of folders that hold nothing but config.json: sizes of the modules, states of recurrent layers, assumptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hybrids import LIKE_QWEN_27B
from support.tiny_models import make_config
from support.versions import newest_only

# The whole of Qwen3.8-27B, whose language model is one part.
QWEN_27B = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "dtype": "bfloat16",
    "text_config": LIKE_QWEN_27B,
    "tie_word_embeddings": False,
}
ONE_STATE = 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)
STASH_OF_A_NODE = 48 * (2 * (10240 + 16 * 128 + 48 * 128) + 4 * 2 * 48)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
PLAN = ("--plan", "--device", "cpu", "--base")


def folder_with(values: dict[str, object], folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@newest_only("older ones repeat the keys of heads before they compute")
def test_the_states_of_a_27b_are_named(specchat, tmp_path: Path):
    folder = folder_with(QWEN_27B, tmp_path / "qwen")
    asked = (
        "run",
        str(folder),
        *PLAN,
        "--dtype",
        "bf16",
        "--quant",
        "int4",
        "--ctx",
        "8192",
        "--vram",
        "40GB",
        "--draft",
        "none",
    )
    plan = json.loads(specchat(*asked, "--json").out)
    states = plan["recurrent"]
    assert (states["recurrent_layers"], states["attention_layers"]) == (48, 16)
    assert states["state_bytes"] == states["working_copy_bytes"] == states["restore_point_bytes"] == ONE_STATE
    assert states["stash_bytes"] == {"64": 64 * STASH_OF_A_NODE, "256": 256 * STASH_OF_A_NODE}
    assert states["kv_bytes"] == 8192 * 16 * 2 * 4 * 256 * 2
    ledger = {item["item"]: item["bytes"] for item in plan["ledger"]}
    assert ledger["KV cache"] == states["kv_bytes"] and ledger["recurrent states"] == 2 * ONE_STATE
    host = {item["item"]: item["bytes"] for item in plan["host_ledger"]}
    assert host.get("restore points", 0) == states["restore_points"] * ONE_STATE
    text = specchat(*asked).out
    assert "recurrent layers (48 of 64):" in text
    assert "109 MiB for 64 nodes, 436 MiB for 256 nodes" in text
    assert "of 147 MiB" in text and "KV cache of 16 layers  512 MiB" in text
    assert "assumes" in text and "no weights are here" in " ".join(text.split())


@pytest.mark.parametrize("draft", ["auto", "none", "named"])
def test_a_plan_needs_no_weights(specchat, tmp_path: Path, draft: str):
    values = make_config("qwen3").to_dict()
    target, small = (folder_with(values, tmp_path / name) for name in ("target", "small"))
    asked = str(small) if draft == "named" else draft
    result = specchat("run", str(target), *PLAN, "--json", "--draft", asked)
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["recurrent"] is None and str(target) in plan["assumptions"][0]
    assert len(plan["assumptions"]) == (1 if plan["draft"] is None else 2)


def test_quantized_matrices_are_assumed_to_have_the_named_bits(specchat, tmp_path: Path):
    values = make_config("llama").to_dict() | {"intermediate_size": 256, "hidden_size": 128, "head_dim": 32}
    folder = folder_with(values | {"quantization_config": AWQ}, tmp_path / "awq")
    result = specchat("run", str(folder), *PLAN, "--json", "--draft", "none", "--dtype", "fp16")
    plan = json.loads(result.out)  # in fp16 no layer takes more memory to be faster
    assert plan["quant"] == "awq int4" and "4 bits" in plan["assumptions"][0]
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]
    matrices = sum(rows * cols // 2 + rows * (cols // 128) * 3 for rows, cols in shapes)
    resident = next(item["bytes"] for item in plan["ledger"] if item["item"] == "resident layers")
    assert resident == pytest.approx(4 * (matrices + 2 * 128 * 2), rel=0.06)  # segments and layers are aligned
    refused = specchat("run", str(folder), *PLAN, "--draft", "none", "--quant", "int8")
    assert refused.code == 2 and "is pre-quantized (awq int4)" in refused.err


@pytest.mark.parametrize("draft", ["auto", "none"])
def test_a_run_still_needs_weights(specchat, tmp_path: Path, draft: str):
    folder = folder_with(make_config("llama").to_dict(), tmp_path / "llama")
    result = specchat("run", str(folder), "hi", "--draft", draft, "--base", "--device", "cpu")
    assert result.code == 3 and result.err.startswith(f"error: {folder} has no *.safetensors files")
