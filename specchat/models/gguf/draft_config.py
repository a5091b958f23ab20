"""The configuration of an EAGLE-3 or DFlash head in a GGUF file of its own, in the words of the heads in safetensors.

Keys and tensors are those of llama.cpp's converter. Files name layers of the target by the states that enter them, so
that DFlash's layers, which are named by their outputs elsewhere, are one more here.
"""

from typing import Any

from specchat.models.checkpoint.gguf import GgufFile
from specchat.models.gguf.config import rope_values
from specchat.models.gguf.metadata import Metadata

EAGLE3, DFLASH = "eagle3", "dflash"
# Tensors that tell of further parts, which are not read.
_FURTHER = {
    "markov_w1.weight": "is a DSpark head",
    "selector_hidden.weight": "is a DFlash2 head",
    "d2t": "scores only some tokens of the vocabulary",
}


def is_draft_head(file: GgufFile) -> bool:
    """Return whether a file is a head that reads states of a target between its layers."""
    return file.architecture in (EAGLE3, DFLASH)


def draft_values(file: GgufFile) -> dict[str, Any]:
    """Return the content of config.json for a head.

    Raises:
        UnsupportedModelError: a variant that specchat does not read.
        CorruptCheckpointError: missing or invalid values.
    """
    metadata = Metadata(file)
    return _eagle3(metadata) if file.architecture == EAGLE3 else _dflash(metadata)


def _eagle3(metadata: Metadata) -> dict[str, Any]:
    tensors = metadata.file.tensors
    if metadata.flag("norm_before_fc"):
        metadata.refuse("norms the joined states of its target as a whole")
    if "output.weight" not in tensors:
        metadata.refuse("scores with the head of its target")
    layers = metadata.integers("target_layers") or metadata.integers("extract_layers")
    if not layers:
        metadata.fail("target_layers", layers, "a list of the target's layers")
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layers(metadata, "llama"),
        "draft_vocab_size": tensors["output.weight"].shape[0],
        "target_hidden_size": metadata.integer("target_hidden_size"),
        "norm_before_residual": metadata.flag("norm_before_residual"),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers},
        "has_embeddings": "token_embd.weight" in tensors,  # tells descriptions of two files apart
    }


def _dflash(metadata: Metadata) -> dict[str, Any]:
    further = next((what for name, what in _FURTHER.items() if name in metadata.file.tensors), None)
    if further is not None:
        metadata.refuse(further)
    entered, mask = metadata.integers("target_layers"), metadata.token_id("mask")
    if not entered or min(entered) < 1:
        metadata.fail("target_layers", entered, "a list of the target's layers")
    if mask is None:
        metadata.refuse("names no token for the places to guess")
    values = _layers(metadata, "qwen3")
    if window := metadata.integer("attention.sliding_window", 0):
        slides = metadata.flags("attention.sliding_window_pattern") or [True] * values["num_hidden_layers"]
        kinds = ["sliding_attention" if each else "full_attention" for each in slides]
        values |= {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}
    return {
        "architectures": ["DFlashDraftModel"],
        **values,
        "block_size": metadata.integer("block_size"),
        "dflash_config": {"target_layer_ids": [layer - 1 for layer in entered], "mask_token_id": mask},
    }


def _layers(metadata: Metadata, model_type: str) -> dict[str, Any]:
    """Return the values of a head's layers, in transformers' words."""
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if not hidden or not heads:
        metadata.fail("attention.head_count", heads, "the number of heads of a layer")
    values: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": metadata.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon", 1e-5),
        "vocab_size": _vocab_size(metadata),
        "dtype": "bfloat16",
    }
    return {**values, "rope_parameters": rope_values(metadata, values)}


def _vocab_size(metadata: Metadata) -> int:
    """Return the number of tokens of the target, whose tokenizer the file has."""
    tokens = metadata.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    return metadata.integer("vocab_size")
