"""The tensors of an EAGLE-3 or DFlash head: those of a GGUF file under the names of safetensors, or safetensors.

Heads are small beside their target, so blocks are dequantized when they are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.ggml_types import TOKEN_MAP
from specchat.models.checkpoint.gguf import GgufFile, GgufTensor, listed_files, open_gguf
from specchat.models.checkpoint.json_file import REDOWNLOAD
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo, open_checkpoint
from specchat.models.gguf.architectures import is_in_config
from specchat.models.gguf.draft_config import EAGLE3
from specchat.models.gguf.metadata import Metadata
from specchat.models.gguf.tensors import Restore

_IN_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_norm_2": "hidden_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REST: Mapping[str, str] = {
    "fc": "fc",
    "enc.output_norm": "hidden_norm",
    "output_norm": "norm",
    "output": "lm_head",
    "token_embd": "embed_tokens",
}


def open_draft_tensors(folder: Path) -> Checkpoint:
    """Open the tensors of a head's folder: those of the GGUF file that it stands for, or its safetensors files.

    Raises:
        CorruptCheckpointError: an invalid header.
        UnsupportedModelError: a tensor that specchat does not know.
    """
    files = listed_files(folder)
    if files is None:
        return open_checkpoint(folder)
    file = open_gguf(files[0])
    named: dict[str, TensorInfo] = {}
    for tensor in sorted(file.tensors.values(), key=lambda each: (each.file, each.offset)):
        if not is_in_config(tensor.name):
            name = _name(file, tensor.name)
            place = tensor.file, tensor.offset, tensor.nbytes
            named[name] = TensorInfo(name, tensor.type.name, tensor.shape, *place, _restore(file, tensor, name))
    return Checkpoint(folder, MappingProxyType(named))


def _restore(file: GgufFile, tensor: GgufTensor, name: str) -> "Restore | TokenIds":
    if name != TOKEN_MAP:
        return Restore(tensor.type.name, tensor.shape, heads=_heads(file, name))
    if tensor.type.name != "I64":
        raise CorruptCheckpointError(f"{tensor.file} has token ids in {tensor.type.name}", hint=REDOWNLOAD)
    return TokenIds()


def _name(file: GgufFile, name: str) -> str:
    """Return the name of a tensor in safetensors files of heads."""
    if name == TOKEN_MAP:
        return name
    stem, _, leaf = name.rpartition(".")
    if name.startswith("blk."):
        index, _, stem = stem.removeprefix("blk.").partition(".")
        found = f"layers.{index}.{_IN_LAYER[stem]}" if index.isdecimal() and stem in _IN_LAYER else None
    else:
        found = _REST.get(stem)
    if found is None or leaf not in ("weight", "bias"):
        raise UnsupportedModelError(
            f"tensor '{name}' in {file.files[0]} is not one that specchat knows of '{file.architecture}' heads",
            hint="use the head in safetensors",
        )
    return f"{found}.{leaf}"


def _heads(file: GgufFile, name: str) -> int:
    """Return the number of heads whose halves of rows are interleaved, as the converter does for Llama; 0 for none."""
    if file.architecture != EAGLE3 or "_proj." not in name:
        return 0
    metadata = Metadata(file)
    heads = metadata.integer("attention.head_count")
    return {"q_proj": heads, "k_proj": metadata.integer("attention.head_count_kv", heads)}.get(name.split(".")[-2], 0)


@dataclass(frozen=True)
class TokenIds:
    """The way from the target's tokens that a head scores to their distances from the scores' own numbers."""

    def __call__(self, stored: Tensor, _dtype: torch.dtype) -> Tensor:
        """Return the distances, int64 [n], given the tokens' bytes, uint8 [8 n]."""
        tokens = stored.view(torch.int64)
        return tokens - torch.arange(len(tokens))
