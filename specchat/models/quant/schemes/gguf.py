"""GGUF files: every matrix in blocks of its own type, which stay as they are in the file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES, PLAIN_TYPES
from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.ggml import (
    AlternatingBlocks,
    Blocks,
    JoinedBlocks,
    StackedBlocks,
    TiledBlocks,
    TiledHeads,
)
from specchat.models.quant.schemes.settings import SchemeSettings, expect

# Values of the description: key heads, value heads per key head, width of a value head, rows of queries and keys.
_TILED = ("tiled_keys", "tiled_per_key", "tiled_width", "tiled_skip")
_TILED_LEAVES = ("in_proj_qkv", "in_proj_z", "out_proj")


@dataclass(frozen=True)
class GgufScheme:
    """Storage of matrices in a GGUF file.

    Attributes:
        file_type: name of the mixture of types, such as "q4_k_m".
        q_heads: heads whose halves of rows are interleaved in query matrices; 0 for rows in order.
        k_heads: heads whose halves of rows are interleaved in key matrices; 0 for rows in order.
        tiled: order of the value heads of gated delta nets, after queries and keys; None for models without them.
        joined: key heads of Qwen3-Next, rows of a key, and rows of the values of a key head; zeros for other models.
    """

    file_type: str
    q_heads: int
    k_heads: int
    tiled: TiledHeads | None = None
    joined: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, settings: SchemeSettings) -> "GgufScheme":
        """Parse the quantization_config that is made from a GGUF file.

        Raises:
            CorruptCheckpointError: a value is invalid.
        """
        tiled = TiledHeads(*(settings.integer(name, 0) for name in _TILED))
        return cls(
            settings.text("file_type", "blocks"),
            settings.integer("q_heads", 0),
            settings.integer("k_heads", 0),
            tiled if tiled.keys else None,
            (
                settings.integer("joined_keys", 0),
                settings.integer("joined_key_width", 0),
                settings.integer("joined_value_width", 0),
            ),
        )

    @property
    def name(self) -> str:
        """Name for users."""
        return f"gguf {self.file_type}"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        rows, cols = shape
        if "weight_even" in tensors:
            kinds = (_kind(module, f"weight_{which}", (rows // 2, cols), tensors) for which in ("even", "odd"))
            return AlternatingBlocks(*kinds)
        if "weight_top" in tensors:
            kinds = (_kind(module, f"weight_{which}", (rows // 2, cols), tensors) for which in ("top", "bottom"))
            return StackedBlocks(*kinds)
        if "weight_first" in tensors:
            return self._joined(module, shape, tensors)
        info = tensors.get("weight")
        if info is None or info.restore is not None:
            return None
        kind, leaf = _kind(module, "weight", shape, tensors), module.rpartition(".")[2]
        if self.tiled is not None and leaf in _TILED_LEAVES:
            skip = self.tiled.skip if leaf == "in_proj_qkv" else 0
            return TiledBlocks(kind, replace(self.tiled, skip=skip), leaf == "out_proj")
        return Blocks(kind, self._heads(module))

    def _joined(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> JoinedBlocks:
        (rows, cols), (keys, key_width, value_width) = shape, self.joined
        first_rows = keys * (2 * key_width + value_width)
        first = _kind(module, "weight_first", (first_rows, cols), tensors)
        second = _kind(module, "weight_second", (rows - first_rows, cols), tensors)
        return JoinedBlocks(first, second, keys, key_width, value_width)

    def _heads(self, module: str) -> int:
        return {"q_proj": self.q_heads, "k_proj": self.k_heads}.get(module.rpartition(".")[2], 0)


def _kind(module: str, name: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> str:
    """Return the block type of a tensor, after checking its shape."""
    info = tensors.get(name)
    if info is None:
        return expect(module, tensors, name, ()).dtype
    (rows, cols), block = shape, BLOCK_TYPES[info.dtype]
    width = cols if info.dtype in PLAIN_TYPES else cols // block.numbers * block.nbytes
    return expect(module, tensors, name, (info.dtype,), (rows, width)).dtype
