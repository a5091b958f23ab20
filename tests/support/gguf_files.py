"""Tiny models as GGUF files, written as llama.cpp's converter does: names by the gguf package, values changed here.

The name map of the package and the changes below are independent of specchat's own tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch

from specchat.models.catalog.ref import parse_model
from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.models.locate import look_up
from specchat.models.quant.modules import QuantLinear, QuantParts
from specchat.records.model import ModelSource
from support.gguf_metadata import PREDICTS_FURTHER, TILED, metadata_of

# transformers' model type -> llama.cpp's architecture
ARCHES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "gpt_oss": "gpt-oss",
    "phi3": "phi3",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "nemotron_h": "nemotron_h",
    "minimax_m2": "minimax-m2",
    "ministral3": "mistral3",
    "smollm3": "smollm3",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "seed_oss": "seed_oss",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "hunyuan_v1_dense": "hunyuan-dense",
}
_NEMOTRON = {"nemotron_h", "nemotron_h_moe"}
_INTERLEAVED = {"llama", "granite", "granitemoe", "granitehybrid", "mistral3", "smollm3", *_NEMOTRON}
_PLUS_ONE = {"gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe"}
# Names that the package's map does not know, by their ends.
_UNMAPPED = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "pre_ff_layernorm.weight": "ffn_norm",
    ".eh_proj.weight": "nextn.eh_proj.weight",
    ".enorm.weight": "nextn.enorm.weight",
    ".hnorm.weight": "nextn.hnorm.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
    "correct_output_scale": "altup_correct_scale.weight",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.wg.weight": "ffn_gate_inp.weight",
    "mlp.shared_mlp.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_mlp.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_mlp.down_proj.weight": "ffn_down_shexp.weight",
}
_SPM = ["<unk>", "<s>", "</s>"]

Kind = Callable[[str], str]


def save_gguf(
    model: Any,
    file: Path,
    kind: str | Kind = "F32",
    *,
    splits_kv: bool = True,
    arch: str | None = None,
    head: Mapping[str, torch.Tensor] | None = None,
    is_alone: bool = False,
    **metadata: Any,
) -> ModelSource:
    """Write a model and a small tokenizer as a GGUF file, and return it as specchat finds it.

    Args:
        model: causal LM of transformers.
        file: path of the file.
        kind: block type of the matrices, or a function from GGUF's name of a matrix to its type.
        splits_kv: whether latent attention is stored as newer converters do.
        arch: llama.cpp's architecture, where a model type has several.
        head: tensors of MTP layers behind the last layer, or None.
        is_alone: whether the MTP layer is written without the other layers.
        metadata: further keys, with "__" for dots, after the architecture's name.
    """
    config = model.config
    arch = arch or arch_of(config)
    writer = gguf.GGUFWriter(file, arch)
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    if head is not None:
        count = sum(name.endswith(".enorm.weight") for name in head)
        more |= {"block_count": config.num_hidden_layers + count, "nextn_predict_layers": count}
    for key, value in {**metadata_of(config, arch, splits_kv=splits_kv), **more}.items():
        full = f"{arch}.{key}"
        add_value(writer, full, value)
    add_tokenizer(writer, config.vocab_size)
    chosen = kind if callable(kind) else lambda _: kind
    for name, values in tensors(model, arch, splits_kv=splits_kv, head=head or {}):
        if is_alone and name.startswith("blk.") and not name.startswith(f"blk.{config.num_hidden_layers}."):
            continue
        is_matrix = (
            values.ndim >= 2
            and not re.search("gate_inp|ssm_(conv1d|a|d|norm)|shortconv.conv|altup|laurel", name)
            and not name.endswith("bias")
        )
        _add_tensor(writer, name, values, chosen(name) if is_matrix else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return find(file)


def arch_of(config: Any) -> str:
    """llama.cpp's architecture of a configuration."""
    has_experts = "moe" in (getattr(config, "layers_block_type", None) or ())
    return "nemotron_h_moe" if config.model_type == "nemotron_h" and has_experts else ARCHES[config.model_type]


def find(path: Path) -> ModelSource:
    """The model at a path, as the command line finds it."""
    found = look_up(parse_model(str(path)), offline=True)
    assert isinstance(found, ModelSource)
    return found


def tensors(
    model: Any, arch: str, *, splits_kv: bool = True, head: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values as llama.cpp's converter writes them."""
    config = model.config
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers + 4
    )
    for name, tensor in {**model.state_dict(), **head}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.detach().float().numpy()
        if arch == "falcon-h1":
            values = _multiplied(name, values, config)
        if arch in _NEMOTRON:
            name = name.replace("model.", "backbone.", 1)
        if "altup_" in name:
            yield from _stacked_projections(model, name)
            continue
        layer = re.search(r"layers\.(\d+)\.", name)
        block = f"blk.{layer[1]}." if layer else ""
        if arch == "gpt-oss" and ".experts." in name:
            yield from _gpt_oss_experts(block, name, values)
            continue
        if arch == "gemma4" and name.endswith("experts.gate_up_proj"):
            yield f"{block}ffn_gate_up_exps.weight", values
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            yield f"{block}ffn_gate_exps.weight", gate
            yield f"{block}ffn_up_exps.weight", up
            continue
        if name.endswith("experts.down_proj"):
            yield f"{block}ffn_down_exps.weight", values
            continue
        values = values.squeeze(1) if "conv.conv." in name or "conv1d.weight" in name else values
        if arch == "granitehybrid" and "shared_mlp.input_linear" in name:
            end = "_shexp.weight" if config.num_local_experts else ".weight"
            gate, up = np.split(values, 2)
            yield from ((f"{block}ffn_gate{end}", gate), (f"{block}ffn_up{end}", up))
            continue
        if ("mamba." in name or "mixer." in name) and name.endswith(("A_log", ".D", "norm.weight")):
            groups = config.n_groups if arch in _NEMOTRON else config.mamba_n_groups
            values = values.reshape(groups if "norm" in name else len(values), -1)
        if name.endswith("in_proj_qkvz.weight"):
            yield from _split_projection(block, values, config)
            continue
        if arch in TILED and "linear_attn" in name:
            values = _tiled(name, values, config)
        found = next((f"{block}{short}" for end, short in _UNMAPPED.items() if name.endswith(end)), None)
        if found is not None:
            values = values + 1 if arch in _PLUS_ONE and "nextn" in found and "norm" in found else values
            yield found, -np.exp(values) if name.endswith("A_log") else values
            continue
        if name.endswith("kv_b_proj.weight") and splits_kv:
            heads = values.reshape(config.num_attention_heads, -1, values.shape[-1])
            yield f"{block}attn_k_b.weight", heads[:, : config.qk_nope_head_dim].swapaxes(1, 2)
            yield f"{block}attn_v_b.weight", heads[:, config.qk_nope_head_dim :]
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        found = found if found.endswith((".weight", ".bias")) else f"{found}.weight"
        if arch in _INTERLEAVED and re.search(r"attn_[qk]\.", found):
            heads = config.num_attention_heads if "attn_q." in found else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if arch in _PLUS_ONE and "norm" in found and "ssm_norm" not in found:
            values = values + 1
        if arch == "granitehybrid" and not config.num_local_experts:
            found = found.replace("_shexp", "")
        yield found, values[0] if found.endswith("ffn_gate_inp_shexp.weight") else values
    if arch in PREDICTS_FURTHER and not head:
        yield f"blk.{config.num_hidden_layers}.nextn.enorm.weight", np.ones(config.hidden_size, dtype=np.float32)
    scaling = config.rope_parameters if arch in ("llama", "phi3") else {}
    if scaling.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3(scaling, config.head_dim)
    if arch == "gemma4":
        half = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
        rotated = int(half * config.rope_parameters["full_attention"]["partial_rotary_factor"])
        yield "rope_freqs.weight", np.array([1.0] * rotated + [1e30] * (half - rotated), dtype=np.float32)
    if scaling.get("rope_type") == "longrope":
        for which in ("long", "short"):
            yield f"rope_factors_{which}.weight", np.array(scaling[f"{which}_factor"], dtype=np.float32)


def _multiplied(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """A tensor of Falcon-H1 with the multipliers that the converter makes part of it."""
    attention, up, down = config.attention_in_multiplier, *config.mlp_multipliers
    factors = {
        "embed_tokens": config.embedding_multiplier,
        "lm_head": config.lm_head_multiplier,
        "gate_proj": up,
        "down_proj": down,
        "q_proj": attention,
        "k_proj": attention * config.key_multiplier,
        "v_proj": attention,
        "self_attn.o_proj": config.attention_out_multiplier,
        "mamba.out_proj": config.ssm_out_multiplier,
        "mamba.in_proj": config.ssm_in_multiplier,
    }
    values = values * np.float32(next((factor for part, factor in factors.items() if part in name), 1.0))
    if "mamba.in_proj" in name:
        states = config.mamba_n_groups * config.mamba_d_state
        sizes = [config.mamba_d_ssm, config.mamba_d_ssm, states, states, config.mamba_n_heads]
        values = values * np.repeat(np.float32(config.ssm_multipliers), sizes)[:, None]
    return values


def _stacked_projections(model: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """All projections of Gemma 3n's kind, where the first of them is."""
    path, _, index = name.removesuffix(".weight").rpartition(".")
    if index == "0":
        stem = "altup_unembd_proj" if "unembed" in path else "altup_proj"
        yield f"{stem}.weight", np.stack([each.weight.detach().numpy() for each in model.get_submodule(path)])


def _tiled(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """A tensor of a gated delta net whose value heads [keys, per key] are put in the order [per key, keys]."""
    keys, width = config.linear_num_key_heads, config.linear_value_head_dim
    per_key = config.linear_num_value_heads // keys

    def moved(rows: np.ndarray, each: int) -> np.ndarray:
        return rows.reshape(keys, per_key, each, -1).swapaxes(0, 1).reshape(rows.shape)

    match name.split("linear_attn.")[1].removesuffix(".weight"):
        case "in_proj_a" | "in_proj_b" | "dt_bias" | "A_log":
            return moved(values, 1)
        case "in_proj_z":
            return moved(values, width)
        case "in_proj_qkv" | "conv1d":
            skip = 2 * keys * config.linear_key_head_dim
            return np.concatenate([values[:skip], moved(values[skip:], width)])
        case "out_proj":
            return np.ascontiguousarray(moved(values.T, width).T)
    return values


def _split_projection(block: str, values: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The rows of each key head, sorted into queries, keys and values of all heads, and gates."""
    keys, width = config.linear_num_key_heads, config.linear_key_head_dim
    own = config.linear_num_value_heads // keys * config.linear_value_head_dim
    heads = values.reshape(keys, 2 * width + 2 * own, -1)
    q, k, v, z = np.split(heads, [width, 2 * width, 2 * width + own], axis=1)
    yield f"{block}attn_qkv.weight", np.concatenate([part.reshape(-1, values.shape[1]) for part in (q, k, v)])
    yield f"{block}attn_gate.weight", z.reshape(-1, values.shape[1])


def _gpt_oss_experts(block: str, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Stacks [experts, rows, cols]: gate and up are the even and odd rows of transformers' transposed parameter."""
    leaf = "bias" if name.endswith("bias") else "weight"
    values = values if leaf == "bias" else values.swapaxes(1, 2)
    if "down_proj" in name:
        yield f"{block}ffn_down_exps.{leaf}", values
    else:
        yield f"{block}ffn_gate_exps.{leaf}", values[:, 0::2]
        yield f"{block}ffn_up_exps.{leaf}", values[:, 1::2]


def _llama3(scaling: Mapping[str, Any], head_dim: int) -> np.ndarray:
    frequencies = 1.0 / scaling["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factors = scaling["original_max_position_embeddings"], []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            writer.add_string(key, str(value))


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A sentencepiece vocabulary of words w0, w1, ... of which no two merge."""
    words = [*_SPM, *(f"▁w{i}" for i in range(vocab_size - len(_SPM)))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([2, 3, 3, *[4] * (vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    values = np.ascontiguousarray(values, dtype=np.float32)
    number = gguf.GGMLQuantizationType[kind]
    if kind == "F32" or values.shape[-1] % BLOCK_TYPES[kind].numbers:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)


def differing(loaded: torch.nn.Module, model: Any) -> list[str]:
    """The tensors of `model` that `loaded`, read from its GGUF file in float32, does not hold bit for bit."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    assert len(expected) > 2 * model.config.num_hidden_layers
    return [name for name, tensor in expected.items() if not _is_same(name, _loaded(loaded, name), tensor)]


def _is_same(name: str, ours: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether all bits agree; decays are stored as -exp(x), which rounds them."""
    return torch.allclose(ours, tensor, 1e-5, 1e-6) if name.endswith("A_log") else torch.equal(ours, tensor)


def _loaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, QuantLinear) and leaf == "weight":
        return _matrix(owner)
    found = getattr(owner, leaf)
    if isinstance(found, torch.Tensor):
        return found
    stack = torch.stack([_matrix(each) for each in found])
    return stack.transpose(1, 2) if owner.is_transposed else stack


def _matrix(module: torch.nn.Module) -> torch.Tensor:
    if isinstance(module, QuantParts):
        return torch.cat([_matrix(part) for part in module])
    assert isinstance(module, QuantLinear)
    return module.format.dequantize(module.segments, 0, module.shape[0], torch.empty(module.shape))


def dequantized(model: Any, kind: str | Kind) -> Any:
    """Round a model's matrices in place as GGUF stores them, and return the model."""
    arch = arch_of(model.config)
    chosen = kind if callable(kind) else lambda _: kind
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], model.config.num_hidden_layers
    )
    stacks = {"experts.gate_up_proj": "ffn_gate_exps.weight", "experts.down_proj": "ffn_down_exps.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stack = next((gguf_name for end, gguf_name in stacks.items() if name.endswith(end)), None)
            found = stack or names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
            number = gguf.GGMLQuantizationType[chosen(found)]
            if parameter.ndim < 2 or "gate_inp" in found or parameter.shape[-1] % BLOCK_TYPES[number.name].numbers:
                continue
            packed = gguf.quants.quantize(np.ascontiguousarray(parameter.numpy()), number)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, number).reshape(parameter.shape)))
    return model
