"""The tensors of a GGUF file as a checkpoint: names of transformers' checkpoints, and values as the model has them.

Matrices of layers, embeddings and head keep their blocks. Everything else is small: it is dequantized when it is read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.dtypes import stored_torch_dtype
from specchat.models.checkpoint.ggml_types import PLAIN_TYPES
from specchat.models.checkpoint.gguf import GgufFile, GgufTensor, listed_files, open_gguf, read_bytes
from specchat.models.checkpoint.json_file import REDOWNLOAD
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo, open_checkpoint
from specchat.models.checkpoint.stacks import unstack_experts
from specchat.models.gguf.architectures import KEY_HALF, Architecture, architecture_of, is_in_config
from specchat.models.gguf.metadata import Metadata
from specchat.models.quant.formats.ggml import TiledHeads, decode, stored_rows

# Tables of embeddings, which keep their blocks unless they have plain values.
_LOOKUPS = ("model.embed_tokens.weight", "model.embeddings.weight")
# Matrices whose values the model needs plain: lookups, and routers, whose rounding would change the experts.
_PLAIN = (
    "embed_tokens.weight",
    "model.embeddings.weight",
    "embed_tokens_per_layer.weight",
    "per_layer_model_projection.weight",
    "router.proj.weight",
    "mlp.gate.weight",
    "mlp.gate.wg.weight",
    "mixer.gate.weight",
    "correction_coefs.weight",
    "prediction_coefs.weight",
    "modality_router.weight",
    "mlp.router.weight",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.router.layer.weight",
    "shared_expert_gate.weight",
    "in_proj_a.weight",
    "in_proj_b.weight",
    "in_proj_ba.weight",
    "conv1d.weight",
    "conv.conv.weight",
    "feed_forward.gate.weight",
    "_bias",
)
# Vectors that files hold as matrices.
_FLAT = ("A_log", "mamba.D", "mamba.norm.weight", "mixer.D", "mixer.norm.weight")
# Small tensors that follow the order of the value heads.
_TILED = ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "dt_bias", "A_log")


def open_tensors(folder: Path, *, with_head: bool = False) -> Checkpoint:
    """Open the tensors of a model's folder: those of the GGUF files that it stands for, or its safetensors files.

    Args:
        folder: folder of the model.
        with_head: whether GGUF files are asked for the layers that predict further tokens, too.

    Raises:
        CorruptCheckpointError: an invalid header.
        UnsupportedModelError: a tensor that specchat does not know.
    """
    files = listed_files(folder)
    if files is None:
        return unstack_experts(open_checkpoint(folder))
    file = open_gguf(files[0])
    return _open(folder, file, None if with_head else Metadata(file).num_layers)


def _open(folder: Path, file: GgufFile, layers: int | None) -> Checkpoint:
    """Open the tensors outside the layers, and those of the first `layers` layers, or of all."""
    architecture = architecture_of(file)
    tensors: dict[str, TensorInfo] = {}
    for tensor in sorted(file.tensors.values(), key=lambda each: (each.file, each.offset)):
        if is_in_config(tensor.name) or (layers is not None and _is_after(tensor.name, layers)):
            continue
        found = architecture.rename(tensor.name)
        if found is None:
            raise UnsupportedModelError(
                f"tensor '{tensor.name}' in {tensor.file} is not one that specchat knows of '{file.architecture}'",
                hint="use the model in safetensors",
            )
        layer, name = found
        if not name:  # another tensor includes it
            continue
        if layer is None:
            tensors |= _infos(file, architecture, tensor, name)
        else:
            tensors |= _infos(file, architecture, tensor, f"model.layers.{layer}.{name}")
    return Checkpoint(folder, MappingProxyType(tensors))


def _is_after(name: str, layers: int) -> bool:
    """Return whether a tensor belongs to a layer after the decoder's, which only predicts further tokens."""
    index = name.removeprefix("blk.").partition(".")[0]
    return name.startswith("blk.") and index.isdecimal() and int(index) >= layers


def _infos(file: GgufFile, architecture: Architecture, tensor: GgufTensor, name: str) -> dict[str, TensorInfo]:
    if "*" in name:
        return dict(_experts(tensor, name, is_plain=".layers." not in name))
    if KEY_HALF in name:
        return _joined_halves(file, tensor, name.replace(KEY_HALF, KEY_HALF.rpartition(".")[0]))
    is_table = name in _LOOKUPS and tensor.type.name not in PLAIN_TYPES
    if len(tensor.shape) == 2 and (is_table or not name.endswith((*_PLAIN, *_FLAT))):
        return {name: _packed(tensor, name, tensor.shape, tensor.offset)}
    shape = tensor.shape
    if name.endswith(("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")) and len(shape) == 1:
        shape = (1, *shape)
    if name.endswith(("conv1d.weight", "conv.conv.weight")) and len(shape) == 2:
        shape = (shape[0], 1, shape[1])
    if name.endswith(_FLAT):
        shape = (math.prod(shape),)
    adds_one = architecture.adds_one and "norm" in name and "linear_attn" not in name
    own = Restore(
        tensor.type.name,
        shape,
        adds_one,
        _heads(file, architecture, name),
        is_log=name.endswith("A_log"),
        tiled=_tiled(file, architecture, name),
    )
    restore: Restore | Alternating = own
    if name.endswith("gate_up_proj_bias"):
        other = _tensor(file, tensor.name.replace("gate", "up"), tensor)
        restore = Alternating(own, Restore(other.type.name, shape), other)
        shape = (*shape[:-1], 2 * shape[-1])
    return {name: TensorInfo(name, tensor.type.name, shape, tensor.file, tensor.offset, tensor.nbytes, restore)}


def _tiled(file: GgufFile, architecture: Architecture, name: str) -> TiledHeads | None:
    """Return the order of value heads in a small tensor of a gated delta net; None for tensors in order."""
    if not architecture.tiles_values or not name.endswith(_TILED):
        return None
    metadata = Metadata(file)
    keys, heads = metadata.integer("ssm.group_count"), metadata.integer("ssm.time_step_rank")
    if name.endswith("conv1d.weight"):
        width, skip = metadata.integer("ssm.inner_size") // heads, 2 * keys * metadata.integer("ssm.state_size")
        return TiledHeads(keys, heads // keys, width, skip)
    return TiledHeads(keys, heads // keys, 1)


def _tensor(file: GgufFile, name: str, like: GgufTensor) -> GgufTensor:
    """Return another tensor, which must have the shape of `like`."""
    found = file.tensors.get(name)
    if found is None or found.shape != like.shape:
        raise CorruptCheckpointError(f"{like.file} has '{like.name}' without an equal '{name}'", hint=REDOWNLOAD)
    return found


def _joined_halves(file: GgufFile, keys: GgufTensor, name: str) -> dict[str, TensorInfo]:
    """Return kv_b_proj of latent attention, made from its halves; nothing if the file also has it whole."""
    if keys.name.replace("attn_k_b", "attn_kv_b") in file.tensors:
        return {}
    values = file.tensors.get(keys.name.replace("attn_k_b", "attn_v_b"))
    if values is None or len(keys.shape) != 3 or len(values.shape) != 3 or keys.shape[:2] != values.shape[::2]:
        raise CorruptCheckpointError(f"{keys.file} has '{keys.name}' without values of its shape", hint=REDOWNLOAD)
    heads, latent, width = keys.shape
    restore = Halves(Restore(keys.type.name, keys.shape), Restore(values.type.name, values.shape), values)
    shape = (heads * (width + values.shape[1]), latent)
    return {name: TensorInfo(name, keys.type.name, shape, keys.file, keys.offset, keys.nbytes, restore)}


def _experts(tensor: GgufTensor, name: str, *, is_plain: bool) -> Iterator[tuple[str, TensorInfo]]:
    """Yield one matrix per expert of a stack [experts, rows, cols], in blocks or with plain values."""
    if len(tensor.shape) != 3:
        raise CorruptCheckpointError(f"tensor '{tensor.name}' in {tensor.file} is no stack of experts", hint=REDOWNLOAD)
    num_experts, *shape = tensor.shape
    nbytes = tensor.nbytes // max(num_experts, 1)
    for expert in range(num_experts):
        key = name.replace("*", str(expert))
        own = _packed(tensor, key, tuple(shape), tensor.offset + expert * nbytes)
        restore = Restore(tensor.type.name, tuple(shape))
        yield key, replace(own, shape=tuple(shape), restore=restore) if is_plain else own


def _packed(tensor: GgufTensor, key: str, shape: tuple[int, ...], offset: int) -> TensorInfo:
    """Return a matrix whose blocks stay: plain values with their shape, packed ones as bytes [rows, bytes per row]."""
    rows, cols = shape
    width = cols if tensor.type.name in PLAIN_TYPES else tensor.type.row_bytes(cols)
    return TensorInfo(key, tensor.type.name, (rows, width), tensor.file, offset, rows * tensor.type.row_bytes(cols))


def _heads(file: GgufFile, architecture: Architecture, name: str) -> int:
    """Return the number of heads whose rows are interleaved in a bias; 0 for tensors in order."""
    if not architecture.interleaves or not name.endswith(("q_proj.bias", "k_proj.bias")):
        return 0
    metadata = Metadata(file)
    heads = metadata.integer("attention.head_count")
    return heads if name.endswith("q_proj.bias") else metadata.integer("attention.head_count_kv", heads)


@dataclass(frozen=True)
class Restore:
    """The way from stored bytes to a tensor of the model.

    Attributes:
        kind: ggml's name of the type.
        shape: shape in the model.
        adds_one: whether 1 has been added to the values.
        heads: number of heads whose two halves are interleaved; 0 for values in order.
        is_log: whether the file holds -exp(x) of each value x.
        tiled: order of the rows; None for rows in order.
    """

    kind: str
    shape: tuple[int, ...]
    adds_one: bool = False
    heads: int = 0
    is_log: bool = False
    tiled: TiledHeads | None = None

    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor in `dtype`, given its bytes, uint8 [n]; values are rounded once."""
        values = self._values(stored, torch.float32 if self.adds_one or self.is_log else dtype)
        if self.adds_one:
            values = values - 1
        if self.heads:
            values = values[stored_rows(len(values), self.heads, 0, len(values), values.device)]
        if self.is_log:
            values = torch.log(-values)
        if self.tiled is not None:
            values = values[self.tiled.stored(len(values), values.device)]
        return values.to(dtype)

    def _values(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        if self.kind in PLAIN_TYPES:
            return stored.view(stored_torch_dtype(self.kind)).view(self.shape).to(dtype)
        cols = self.shape[-1]
        rows = math.prod(self.shape) // cols
        return decode(self.kind, stored.view(rows, -1), torch.empty(rows, cols, dtype=dtype)).view(self.shape)


@dataclass(frozen=True)
class Alternating:
    """The way from two tensors to one that alternates between their values in the last dimension.

    Attributes:
        even: way to the values at even places.
        odd: way to the values at odd places.
        odd_tensor: second tensor, which is small and is read when the first one is restored.
    """

    even: Restore
    odd: Restore
    odd_tensor: GgufTensor

    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor in `dtype`, given the bytes of the first tensor, uint8 [n]."""
        data = bytearray(read_bytes(self.odd_tensor))
        odd = self.odd(torch.frombuffer(data, dtype=torch.uint8), dtype)
        return torch.stack([self.even(stored, dtype), odd], -1).flatten(-2)


@dataclass(frozen=True)
class Halves:
    """The way from the halves of latent attention's kv_b_proj, keys and values of each head, to the matrix.

    Blocks of the keys run across the latent dimension, so the matrix cannot keep them.

    Attributes:
        keys: way to the keys [heads, latent, width].
        values: way to the values [heads, width, latent].
        value_tensor: tensor of the values, which is read when the matrix is restored.
    """

    keys: Restore
    values: Restore
    value_tensor: GgufTensor

    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype` [heads x (key width + value width), latent], given the keys, uint8 [n]."""
        data = torch.frombuffer(bytearray(read_bytes(self.value_tensor)), dtype=torch.uint8)
        return torch.cat([self.keys(stored, dtype).transpose(1, 2), self.values(data, dtype)], 1).flatten(0, 1)
