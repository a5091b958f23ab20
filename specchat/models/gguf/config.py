"""The values of config.json and generation_config.json, made from the metadata of a GGUF file."""

import math
import struct
from collections.abc import Sequence
from typing import Any

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.gguf import GgufFile, GgufTensor, read_bytes
from specchat.models.gguf.architectures import Architecture, architecture_of
from specchat.models.gguf.metadata import Metadata

# Names of `general.file_type`.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
}
_COMPUTED = {"F32": "float32", "F16": "float16"}
# Llama 3's scaling of rotary frequencies, which files only hold as one factor per frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NEARLY = 1e-5
_NEVER = 1e29  # a factor that stands for no rotation
_MOST_LAYERS = 1024  # of the model that an MTP layer in a file of its own is for; no known model has an eighth of them


def config_values(file: GgufFile) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        UnsupportedModelError: an architecture or a variant that specchat does not read.
        CorruptCheckpointError: missing or invalid values.
    """
    architecture, metadata = architecture_of(file), Metadata(file)
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if not heads or not hidden or "token_embd.weight" not in file.tensors:
        metadata.fail("attention.head_count", heads, "the number of heads of a language model")
    most = _MOST_LAYERS if metadata.is_head_alone else len(file.tensors)
    if not 0 < metadata.num_layers <= most:
        metadata.fail("block_count", metadata.integer("block_count"), "the number of layers in the file")

    def size(key: str, default: int) -> int:
        if architecture.varies:
            return metadata.each(key, 1, default)[0]
        return metadata.integer(key, default, skips_zeros=True)

    values = {
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length", 0),
        "num_hidden_layers": metadata.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": metadata.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
        "dtype": _dtype(file),
        **architecture.fixed,
        **architecture.extra(metadata),
    }
    values["rope_parameters"] = rope_values(metadata, values)
    values["quantization_config"] = _quantization(file, values, architecture)
    return values


def generation_values(file: GgufFile) -> dict[str, Any]:
    """Return the content of generation_config.json: all tokens that end an answer."""
    metadata = Metadata(file)
    found = [metadata.token_id(name) for name in ("eos", "eot", "eom")]
    return {"eos_token_id": sorted({each for each in found if each is not None})}


def _dtype(file: GgufFile) -> str:
    """Return the dtype to compute in: that of the matrices if all are equally plain, else bfloat16."""
    kinds = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) >= 2}
    return _COMPUTED.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _quantization(file: GgufFile, values: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the description that `quant.schemes.gguf` reads."""
    file_type = file.metadata.get("general.file_type")
    return {
        "quant_method": "gguf",
        "file_type": _FILE_TYPES.get(file_type, _commonest_type(file))
        if type(file_type) is int
        else _commonest_type(file),
        "q_heads": values["num_attention_heads"] if architecture.interleaves else 0,
        "k_heads": values["num_key_value_heads"] if architecture.interleaves else 0,
        **(_tiled(values) if architecture.tiles_values else {}),
        **(_joined(values) if values["model_type"] == "qwen3_next" else {}),
    }


def _tiled(values: dict[str, Any]) -> dict[str, int]:
    """Return the order of value heads, as `quant.schemes.gguf` reads it."""
    keys = values["linear_num_key_heads"]
    return {
        "tiled_keys": keys,
        "tiled_per_key": values["linear_num_value_heads"] // keys,
        "tiled_width": values["linear_value_head_dim"],
        "tiled_skip": 2 * keys * values["linear_key_head_dim"],
    }


def _joined(values: dict[str, Any]) -> dict[str, int]:
    """Return the sizes of a joined input projection, as `quant.schemes.gguf` reads it."""
    per_key = values["linear_num_value_heads"] // values["linear_num_key_heads"]
    return {
        "joined_keys": values["linear_num_key_heads"],
        "joined_key_width": values["linear_key_head_dim"],
        "joined_value_width": per_key * values["linear_value_head_dim"],
    }


def _commonest_type(file: GgufFile) -> str:
    """Return the block type of most bytes."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__)


def rope_values(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary values; `values` are the other values of config.json."""
    theta = metadata.number("rope.freq_base", 10000.0)
    if metadata.file.architecture == "gemma4":
        return _gemma4_rope(metadata, theta)
    full = {"rope_type": "default", "rope_theta": theta} | _scaling(metadata, values)
    if "partial_rotary_factor" in values:
        full["partial_rotary_factor"] = values["partial_rotary_factor"]
    sections = metadata.integers("rope.dimension_sections")
    if sections is not None and values["model_type"].startswith(
        "qwen3_5"
    ):  # of images, whose positions have three parts
        full |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    if metadata.file.architecture in ("gemma3", "gemma3n"):
        local = metadata.number("rope.freq_base_swa", 10000.0)
    elif values["model_type"] == "olmo3":  # only its layers with full attention are scaled
        local = theta
    else:
        return full
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _gemma4_rope(metadata: Metadata, theta: float) -> dict[str, Any]:
    """Return the rotary values of Gemma 4, whose full layers only rotate the part of a head that has a factor of 1."""
    tensor = metadata.file.tensors.get("rope_freqs.weight")
    factors = [] if tensor is None else _read_floats(tensor)
    rotated = sum(factor == 1.0 for factor in factors)
    if not rotated or any(factor < _NEVER for factor in factors[rotated:]):
        metadata.refuse("rotates its heads otherwise than Gemma 4")
    local = metadata.number("rope.freq_base_swa", 10000.0)
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": theta,
            "partial_rotary_factor": rotated / len(factors),
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _scaling(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling of the rotary frequencies.

    Raises:
        UnsupportedModelError: a kind of scaling that specchat does not read.
    """
    tensors, kind = metadata.file.tensors, metadata.text("rope.scaling.type") or "none"
    if "rope_freqs.weight" in tensors:
        return _from_factors(_read_floats(tensors["rope_freqs.weight"]), metadata.number("rope.freq_base", 10000.0))
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        return _longrope(metadata, values)
    factor = metadata.number("rope.scaling.factor", 1.0)
    if values["model_type"] == "ministral3" and kind != "yarn":
        metadata.refuse("scales its attention by the position without 'yarn'")
    if kind in ("none", "longrope") or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        metadata.refuse(f"scales its positions by '{kind}'")
    original = metadata.integer("rope.scaling.original_context_length", values["max_position_embeddings"])
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if values["model_type"] == "gpt_oss":  # its bounds are not rounded, which no file states
        scaling |= {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}
    if "kv_lora_rank" in values:
        scaling |= _latent_yarn(metadata)
    if values["model_type"] == "ministral3":
        scaling |= _ministral_yarn(metadata)
    return scaling


def _ministral_yarn(metadata: Metadata) -> dict[str, Any]:
    """Return what yarn scales Ministral 3 by; as llama.cpp does, one of its two multipliers is taken for 1."""
    multiplier = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not multiplier or not metadata.has("rope.scaling.original_context_length"):
        metadata.refuse("scales its positions by 'yarn' without a multiplier")
    beta = {"llama_4_scaling_beta": metadata.number("attention.temperature_scale")}
    return {"mscale": 1.0, "mscale_all_dim": multiplier, **beta, **_yarn_bounds(metadata)}


def _latent_yarn(metadata: Metadata) -> dict[str, Any]:
    """Return what yarn scales latent attention by: llama.cpp has one multiplier for both of transformers' values."""
    tenth = metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not tenth:
        metadata.refuse("scales its positions by 'yarn' without a multiplier")
    scale = float(f"{10 * tenth:.7g}")
    return {"mscale": scale, "mscale_all_dim": scale, **_yarn_bounds(metadata)}


def _yarn_bounds(metadata: Metadata) -> dict[str, Any]:
    return {
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _from_factors(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """Return the scaling that divides each frequency by a factor: Llama 3's where its formula gives these factors."""
    largest = round(factors[-1])
    if _agree(factors, _llama3_factors(len(factors), theta, largest)):
        return {"rope_type": "llama3", "factor": float(largest), **_LLAMA3}
    return {
        "rope_type": "longrope",
        "short_factor": list(factors),
        "long_factor": list(factors),
        "attention_factor": 1.0,
        "factor": 1.0,
    }


def _llama3_factors(count: int, theta: float, factor: float) -> list[float]:
    """Return what Llama 3's scaling divides each frequency by."""
    original = _LLAMA3["original_max_position_embeddings"]
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factors = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (i / count)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return factors


def _agree(found: Sequence[float], expected: Sequence[float]) -> bool:
    return all(abs(a - b) <= _NEARLY * b for a, b in zip(found, expected, strict=True))


def _longrope(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    tensors = metadata.file.tensors
    original, longest = values["original_max_position_embeddings"], values["max_position_embeddings"]
    factors = {f"{which}_factor": _read_floats(tensors[f"rope_factors_{which}.weight"]) for which in ("short", "long")}
    scaling = {"rope_type": "longrope", **factors, "original_max_position_embeddings": original}
    scaling["factor"] = longest / original
    if metadata.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    return scaling


def _read_floats(tensor: GgufTensor) -> list[float]:
    """Read a small float32 tensor."""
    if tensor.type.name != "F32":
        raise UnsupportedModelError(f"tensor '{tensor.name}' in {tensor.file} is not stored as F32")
    data = read_bytes(tensor)
    return list(struct.unpack(f"<{len(data) // 4}f", data))
