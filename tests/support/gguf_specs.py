"""Records the sizes of known GGUF uploads: `PYTHONPATH=.:tests python -m support.gguf_specs`.

Each is described from a file with its header and no weights: tensors as llama.cpp's converter names them, in the types
of the upload's quantization mix. So a known upload is planned as the downloaded one is.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from specchat.models.catalog.known_models import KnownModel, known_models
from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.checkpoint.gguf import open_gguf
from specchat.models.gguf.architectures import is_in_config
from specchat.models.hf.config import load_config
from specchat.models.sizes.gguf_specs import FILE
from specchat.models.sizes.inspect import inspect_model
from support.gguf_files import add_tokenizer, add_value, arch_of, find, tensors
from support.gguf_metadata import metadata_of
from support.gguf_mixes import Facts, types_of
from support.hybrid_specs import compact, config_values

# Models whose uploads mostly have the layer that predicts a further token.
_WITH_MTP = {"Qwen/Qwen3.8-27B"}
# Values that only llama.cpp asks for, beside those that `metadata_of` writes.
_SECTIONS = {"rope.dimension_sections": [11, 11, 10, 0]}
_ALSO_ASKED: dict[str, dict[str, Any]] = {
    "qwen35": _SECTIONS,
    "qwen35moe": _SECTIONS,
    "gemma4": {
        "attention.value_length": 512,
        "attention.value_length_swa": 256,
        "rope.dimension_count": 512,
        "rope.dimension_count_swa": 256,
    },
}
_FILE_TYPES = {"Q4_K_M": 15, "IQ4_XS": 30, "IQ3_XXS": 23, "IQ3_M": 27, "MXFP4": 38}

Shapes = dict[str, tuple[int, ...]]


def known_uploads() -> list[KnownModel]:
    return [model for model in known_models().values() if model.stored == "gguf"]


def mix_of(model: KnownModel) -> str:
    """The quantization in an upload's id."""
    return model.id.rpartition(":")[2]


def read_config(model: KnownModel) -> Any:
    """The configuration of the text model."""
    with TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config_values(model)))
        return load_config(Path(name)).get_text_config()


def tensors_of(config: Any) -> dict[str, np.ndarray]:
    """All tensors by GGUF's names; the values are right only for those that the configuration is made from."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    # one number, seen as often as needed, stands for the values
    values = {name: torch.zeros(1).expand(each.shape) for name, each in skeleton.state_dict().items() if each.ndim}
    scalars = {name: torch.zeros(()) for name, each in skeleton.state_dict().items() if not each.ndim}
    stand_in = SimpleNamespace(config=config, state_dict=lambda: {**values, **scalars})
    return dict(tensors(stand_in, arch_of(config)))


def shapes_of(model: KnownModel, config: Any, found: dict[str, np.ndarray]) -> Shapes:
    """The shapes of all tensors of an upload, in torch's order."""
    shapes = {name: each.shape for name, each in found.items()}
    return _with_mtp(shapes, config) if model.like in _WITH_MTP else shapes


def _with_mtp(shapes: Shapes, config: Any) -> Shapes:
    """The shapes with an MTP layer behind the others: one with attention, and what joins a state and a token."""
    source = next(name for name in shapes if name.endswith("attn_q.weight")).split(".")[1]
    added, size = f"blk.{config.num_hidden_layers}.", config.hidden_size
    layer = {added + n.removeprefix(f"blk.{source}."): s for n, s in shapes.items() if n.startswith(f"blk.{source}.")}
    norms = {f"{added}nextn.{name}.weight": (size,) for name in ("enorm", "hnorm", "shared_head_norm")}
    return {**shapes, **layer, **norms, f"{added}nextn.eh_proj.weight": (size, 2 * size)}


def facts_of(model: KnownModel, config: Any) -> Facts:
    first = config.per_layer_config[0] if config.model_type == "gemma4_text" else config
    experts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    # llama.cpp describes latent attention as attention with one shared head
    kv_heads = 1 if hasattr(config, "kv_lora_rank") else first.num_key_value_heads
    return Facts(
        num_layers=config.num_hidden_layers + (model.like in _WITH_MTP),
        heads_per_kv=config.num_attention_heads // kv_heads,
        num_experts=next(filter(None, experts), 0),
    )


def write_header(model: KnownModel, config: Any, file: Path, *, dtype: str = "") -> int:
    """Write the header of an upload, and leave its tensors as a hole. Return the bytes of the tensors.

    Args:
        model: known upload.
        config: configuration of its text model.
        file: file to write.
        dtype: type of all matrices, for llama.cpp to quantize, or "" for those of the upload's mix.
    """
    arch, found = arch_of(config), tensors_of(config)
    shapes = shapes_of(model, config, found)
    chosen = types_of(shapes, mix_of(model), facts_of(model, config))
    if dtype:
        chosen = {name: kind if kind == "F32" else dtype for name, kind in chosen.items()}
    writer = gguf.GGUFWriter(file, arch)
    values = metadata_of(config, arch, splits_kv=True)
    if model.like in _WITH_MTP:
        values |= {"block_count": config.num_hidden_layers + 1, "nextn_predict_layers": 1}
    if dtype:
        values |= _ALSO_ASKED.get(arch, {})
        for key in {"attention.recurrent_layers"} & values.keys():
            values[key] = [*values[key], *[False] * (values["block_count"] - config.num_hidden_layers)]
    for key, value in values.items():
        full = f"{arch}.{key}"
        add_value(writer, full, value)
    if not dtype:
        writer.add_file_type(_FILE_TYPES[mix_of(model)])
    add_tokenizer(writer, config.vocab_size)
    total = 0
    for name, shape in shapes.items():
        kind = BLOCK_TYPES[chosen[name]]
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1]) if shape else 4
        number = gguf.GGMLQuantizationType[kind.name]
        writer.add_tensor_info(name, shape, np.dtype("float32"), nbytes, number)
        total += nbytes + -nbytes % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    _fill(file, total, {name: each for name, each in found.items() if is_in_config(name)})
    return total


def _fill(file: Path, nbytes: int, values: dict[str, np.ndarray]) -> None:
    """Make room for tensors of `nbytes` after the header, and write the values of a few."""
    size = file.stat().st_size
    os.truncate(file, size + -size % 32 + nbytes)
    places = open_gguf(file).tensors
    with file.open("r+b") as stream:
        for name, each in values.items():
            stream.seek(places[name].offset)
            stream.write(each.astype(np.float32).tobytes())


def record(model: KnownModel) -> dict[str, Any]:
    """The sizes of an upload as the file holds them."""
    with TemporaryDirectory() as name:
        file = Path(name) / "x.gguf"
        write_header(model, read_config(model), file)
        spec = inspect_model(find(file), "none")
        return compact(json.loads(json.dumps({**asdict(spec), "name": model.id})))


def main() -> None:
    recorded = {model.id: record(model) for model in known_uploads()}
    FILE.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
