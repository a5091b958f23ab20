"""EAGLE-3 and DFlash heads as GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.drafts import as_draft
from specchat.records.model import ModelSource
from support.gguf_files import add_value, find
from support.tiny_models import VOCAB

_LAYER = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_REST = {"fc": "fc", "hidden_norm": "enc.output_norm", "norm": "output_norm", "lm_head": "output"}
_REST["embed_tokens"] = "token_embd"


def save_head_gguf(saved: ModelSource, file: Path, kind: str = "F32", **changes: Any) -> ModelSource:
    """Write a head in safetensors as a GGUF file, and return it as specchat finds it.

    Args:
        saved: an EAGLE-3 or DFlash head.
        file: path of the file.
        kind: block type of the matrices.
        changes: other values of metadata, with "__" for dots, after the architecture's name; None leaves a key out.
    """
    write_head(saved, file, kind, **changes)
    return as_draft(find(file))


def write_head(
    saved: ModelSource,
    file: Path,
    kind: str = "F32",
    tensors: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    **changes: Any,
) -> None:
    """Write the file of `save_head_gguf`, and further tensors of some shapes."""
    config = json.loads((saved.path / "config.json").read_text())
    config |= config.get("transformer_layer_config", {})
    writer = gguf.GGUFWriter(file, saved.part)
    own = _eagle3_values(config) if saved.part == "eagle3" else _dflash_values(config)
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 10000.0,
        **own,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    for key, value in values.items():
        if value is not None:
            add_value(writer, f"{saved.part}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{number}" for number in range(VOCAB)])
    if saved.part == "dflash":
        writer.add_mask_token_id(config["dflash_config"]["mask_token_id"])
    for name, tensor in load_file(saved.path / "model.safetensors").items():
        _add_tensor(writer, saved.part, name, tensor.numpy(), config, kind)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _eagle3_values(config: dict[str, Any]) -> dict[str, Any]:
    inner = {**config, **config.get("eagle_config", {})}
    return {
        "target_layers": inner.get("eagle_aux_hidden_state_layer_ids", [2, 2, 1]),
        "target_hidden_size": config.get("target_hidden_size", config["hidden_size"]),
        "norm_before_residual": bool(config.get("norm_before_residual")),
    }


def _dflash_values(config: dict[str, Any]) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    window = {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": slides}
    return {
        # the states that enter a layer are the outputs of the one before it
        "target_layers": [layer + 1 for layer in config["dflash_config"]["target_layer_ids"]],
        "block_size": config["block_size"],
        **(window if any(slides) else {}),
    }


def _add_tensor(
    writer: gguf.GGUFWriter, part: str, name: str, values: np.ndarray, config: dict[str, Any], kind: str
) -> None:
    if name == "t2d":
        return
    if name == "d2t":
        writer.add_tensor(name, values + np.arange(len(values)), raw_dtype=gguf.GGMLQuantizationType.I64)
        return
    stem, _, leaf = name.replace("midlayer.", "layers.0.").rpartition(".")
    if stem.startswith("layers."):
        _, index, own = stem.split(".", 2)
        stem = f"blk.{index}.{_LAYER[own]}"
    else:
        stem = _REST[stem]
    if part == "eagle3" and stem.endswith(("attn_q", "attn_k")):
        heads = config["num_attention_heads" if stem.endswith("attn_q") else "num_key_value_heads"]
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    number = gguf.GGMLQuantizationType[kind]
    values = np.ascontiguousarray(values)
    if values.ndim < 2 or kind == "F32" or values.shape[1] % BLOCK_TYPES[kind].numbers:
        writer.add_tensor(f"{stem}.{leaf}", values)
    else:
        writer.add_tensor(f"{stem}.{leaf}", gguf.quants.quantize(values, number), raw_dtype=number)
