"""Write a synthetic Llama-shaped model as a GGUF file, so that llama.cpp can run it.

    PYTHONPATH=.:tests python tests/benchmarks/shape_gguf.py SHAPE FILE.gguf [BF16|Q8_0]
    PYTHONPATH=.:tests python tests/benchmarks/shape_gguf.py draft FILE.gguf

The model computes what the demo does, with the demo's tokenizer and chat template; `draft` writes the demo's draft.
Other types come from llama.cpp: `llama-quantize BF16.gguf FILE.gguf Q4_K_M`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from support.gguf_metadata import metadata_of

from specchat.models.catalog.ref import demo_source
from specchat.models.catalog.shape import parse_shape
from specchat.models.synthetic.layers import ShapeLayers, shape_files

_NORMAL, _CONTROL = 1, 3
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def main() -> None:
    asked, file = sys.argv[1], Path(sys.argv[2])
    kind = gguf.GGMLQuantizationType[sys.argv[3] if len(sys.argv) > 3 else "BF16"]
    if asked == "draft":
        folder = demo_source("draft").path
        files = {each.name: each.read_bytes() for each in folder.iterdir()}
        tensors: Iterator[tuple[str, torch.Tensor]] = _renamed(load_file(folder / "model.safetensors"))
    else:
        shape = parse_shape(asked.removeprefix("shape:"))
        files, tensors = shape_files(shape), _of_shape(ShapeLayers(shape))
    config = SimpleNamespace(**json.loads(files["config.json"]))
    config.rope_parameters = {"rope_theta": config.rope_theta}
    write(file, config, files, tensors, kind)


def write(
    file: Path,
    config: Any,
    files: dict[str, bytes],
    tensors: Iterator[tuple[str, torch.Tensor]],
    kind: gguf.GGMLQuantizationType,
) -> None:
    """Write the file; only one tensor at a time is in memory outside the writer's temporary file."""
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)
    for key, value in metadata_of(config, "llama", splits_kv=False).items():
        {int: writer.add_uint32, float: writer.add_float32}[type(value)](f"llama.{key}", value)
    _add_tokenizer(writer, files)
    for name, tensor in tensors:
        values = tensor.float().numpy()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = _interleaved(values, config.head_dim)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _of_shape(layers: ShapeLayers) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _renamed(layers.rest())
    for layer in range(layers.num_layers):
        yield from _renamed({f"model.layers.{layer}.{name}": each for name, each in layers.read_layer(layer).items()})


def _renamed(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if name in _OUTSIDE:
            yield _OUTSIDE[name], tensor
        else:
            layer, own = name.removeprefix("model.layers.").split(".", 1)
            yield f"blk.{layer}.{_NAMES[own.removesuffix('.weight')]}.weight", tensor


def _interleaved(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Put the halves of each head [2, head_dim / 2] in llama.cpp's order [head_dim / 2, 2]."""
    halves = values.reshape(-1, 2, head_dim // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, files: dict[str, bytes]) -> None:
    whole = json.loads(files["tokenizer.json"])
    special = {each["id"]: each["content"] for each in whole["added_tokens"]}
    words = {number: word for word, number in whole["model"]["vocab"].items()} | special
    settings = json.loads(files["tokenizer_config.json"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words[number] for number in range(len(words))])
    writer.add_token_types([_CONTROL if number in special else _NORMAL for number in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    numbers = {content: number for number, content in special.items()}
    writer.add_bos_token_id(numbers[settings["bos_token"]])
    writer.add_eos_token_id(numbers[settings["eos_token"]])
    writer.add_pad_token_id(numbers[settings["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])


if __name__ == "__main__":
    main()
