"""Models of any Llama-like shape that compute exactly the demo target's function: real bytes, real compute, known text.

How a large model embeds a small one (d, h0: the demo's width and head dim; D, hd: the shape's; live: the demo's own):

- The residual stream holds as many copies of the demo's as fit. So the mean of its squares, and with it every norm,
  equals the demo's. A remainder (D % d) stays zero; the norms' weights and eps compensate for it.
- The norms' weights are zero beyond the first copy. The matrices read zeros there, so those columns are arbitrary.
- A live head's rotary dim i moves to dim i * hd / h0, which rotates at the same speed. The queries are larger by
  sqrt(hd / h0), because attention divides by sqrt(hd). That is rarely a power of two, so a second matrix holds the
  rounding error and reads the second copy. 16-bit weights then lose almost nothing.
- Idle heads and neurons cost as much as live ones and add exactly zero. v_proj and up_proj have zeros in the live
  columns of rows that are not live. o_proj is zero where an idle query head reads live values.
- In idle layers the norms' weights are zero, and everything else is arbitrary.
- Every expert of a live layer computes the demo's MLP, so the text does not depend on the router. Routers are random.
  They read the first copy in idle layers too, where experts add zero: so hidden states choose experts in all layers.
  Measured in a text of 113 tokens with 8 of 128 experts: a token shares 27% of them with the one before, and finds 81%
  among the 32 that were used most (by decayed counts, after 60 tokens; one router, mean of 8 layers).

All arbitrary weights are random: uniform bits except the exponent's highest. So weights stay below 4, none is subnormal
(slow on CPUs), and zlib saves 1.5 % of an idle layer, 3 to 6 % of a live one (of Gaussian weights: 21 %).

Measured, relative to the demo target's logits in float32: 5e-7 for bf16 weights computed in float32, so greedy texts
are equal except at near-ties; 4.2e-3 computed in bf16, where the demo target itself loses 4.1e-3. Without a place for
the rounding error (no second copy, or a remainder) it is 1.3e-3 for bf16 weights.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from specchat.models.catalog.ref import SHAPE_PREFIX, demo_source
from specchat.models.catalog.shape import DEMO_TARGET, Shape, num_live_kv_heads, parse_shape
from specchat.models.checkpoint.dtypes import torch_dtype, torch_name
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.packs.build import PackProgress, build_pack
from specchat.models.packs.file_format import NOT_QUANTIZED
from specchat.models.packs.inventory import packs_folder
from specchat.models.packs.pack import open_pack
from specchat.models.packs.source import LayerSource
from specchat.models.synthetic.quantized_layers import QuantizedLayers
from specchat.models.weights.recipe import recipe_for
from specchat.records.model import Dtype, ModelSource
from specchat.units import format_bytes

__all__ = ["Shape", "ShapeLayers", "materialise", "parse_shape", "shape_files"]

LABEL = "synthetic: computes what the demo does, in its vocabulary of 4,096"
LAYOUT_VERSION = 1  # version of the bytes for a shape and a seed; part of the pack's key

_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Turn random bits into moderate values: clear the exponent's highest bit, then add one to the exponent. The exponent is
# then between 1 and half of its maximum, so no value is subnormal, infinite or large. Entries: (mask, addend, bytes per
# value).
_RANDOM_NUMBERS: dict[Dtype, tuple[int, int, int]] = {
    "bf16": (0xBFFF, 0x0080, 2),
    "fp16": (0xBFFF, 0x0400, 2),
    "fp32": (0xBFFF_FFFF, 0x0080_0000, 4),
}
_SMALLER = 2**-6
_RANDOM_CHUNK = 1 << 15  # words of 8 bytes: small enough for three passes within the CPU cache
_RANDOM_BLOCK = 1 << 22  # words per seed and thread: the bytes do not depend on the number of threads
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

Progress = Callable[[int, int], None]


class ShapeLayers:
    """The weights of a shape, generated layer by layer: a `LayerSource`, determined by shape and seed.

    It holds the demo target's weights in float32 (28 MB) and memory for one layer, which each layer reuses.

    Args:
        shape: shape from `parse_shape`.
        seed: seed of the random weights; the computed function does not depend on it.

    Raises:
        ModelNotFoundError: the demo's files are missing from this installation.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._seed = seed
        self._dtype = torch_dtype(shape.dtype)
        self._demo = _read_demo()
        self._copies = shape.hidden // DEMO_TARGET.hidden
        self._norm_factor = math.sqrt(self._copies * DEMO_TARGET.hidden / shape.hidden)
        self._query_factor = math.sqrt(shape.head_dim / DEMO_TARGET.head_dim)
        carries = self._copies > 1 and not self._query_factor.is_integer()
        self._query_columns = DEMO_TARGET.hidden * (2 if carries else 1)
        self._spread = _spread_rotary(shape.head_dim)
        self._memory: dict[str, Tensor] = {}

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.shape.layers

    @property
    def layers_name(self) -> str:
        """Path of the layers in the model."""
        return "model.layers"

    def layer_meta(self, layer: int) -> dict[str, Tensor]:
        """Return the result of `read_layer` as meta tensors."""
        assert 0 <= layer < self.num_layers
        return self._empty(self.shape.layer_tensors(), "meta")

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Generate one decoder layer's weights, valid until the next call.

        Args:
            layer: index of the layer, 0 .. num_layers - 1.

        Returns:
            Tensors by name within the layer, in module order, in the shape's dtype on the CPU.
        """
        assert 0 <= layer < self.num_layers
        if not self._memory:
            self._memory = self._empty(self.shape.layer_tensors(), "cpu")
        weights = dict(self._memory)
        matrices = [weight for weight in weights.values() if weight.ndim >= 2]
        _fill_random(matrices, self.shape.dtype, f"specchat shape {LAYOUT_VERSION} {self._seed} {layer}")
        if self.shape.quant != "none":  # values that share a scale with live ones must not be larger
            for matrix in matrices:
                matrix.mul_(_SMALLER)
        for name in _NORMS:
            weights[name].zero_()
        if layer < DEMO_TARGET.layers:
            self._place_attention(layer, weights)
        if self.shape.experts:
            self._place_experts(layer, weights)
        elif layer < DEMO_TARGET.layers:
            self._place_mlp(layer, weights)
        return weights

    def rest_meta(self) -> dict[str, Tensor]:
        """Return the result of `rest` as meta tensors."""
        return self._empty(self.shape.rest_tensors(), "meta")

    def rest(self) -> dict[str, Tensor]:
        """Generate the weights outside the layers by full name; the head is the embedding, as in the demo."""
        embedding = self._demo["model.embed_tokens.weight"]
        norm = torch.zeros(self.shape.hidden, dtype=self._dtype)
        norm[: DEMO_TARGET.hidden] = self._demo["model.norm.weight"] * self._norm_factor
        return {"model.embed_tokens.weight": self._stack(embedding.T).T.contiguous(), "model.norm.weight": norm}

    def _empty(self, sizes: Mapping[str, tuple[int, ...]], device: str) -> dict[str, Tensor]:
        return {name: torch.empty(size, dtype=self._dtype, device=device) for name, size in sizes.items()}

    def _live(self, layer: int, name: str) -> Tensor:
        return self._demo[f"model.layers.{layer}.{name}"]

    def _stack(self, weight: Tensor) -> Tensor:
        """Repeat rows that write the residual stream for each copy of the demo's, then zeros; [d, N] -> [D, N]."""
        stacked = torch.zeros(self.shape.hidden, weight.shape[1], dtype=self._dtype)
        stacked[: self._copies * DEMO_TARGET.hidden] = weight.repeat(self._copies, 1)
        return stacked

    def _place_attention(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Write the demo's attention over the random weights, and zeros over interfering weights."""
        width = DEMO_TARGET.hidden
        norm = self._live(layer, "input_layernorm.weight") * self._norm_factor
        weights["input_layernorm.weight"][: self._query_columns] = norm.repeat(self._query_columns // width)
        weights["self_attn.v_proj.weight"][:, : self._query_columns] = 0
        for kv_head in range(num_live_kv_heads(self.shape)):
            self._place_keys_and_values(layer, kv_head, weights)
        for head in range(DEMO_TARGET.heads):
            self._place_queries(layer, head, weights["self_attn.q_proj.weight"])
            self._place_outputs(layer, head, weights["self_attn.o_proj.weight"])

    def _place_keys_and_values(self, layer: int, kv_head: int, weights: Mapping[str, Tensor]) -> None:
        """Write the demo's keys and values into the shape's `kv_head`; its other value dims are not read."""
        width, small, large = DEMO_TARGET.hidden, DEMO_TARGET.head_dim, self.shape.head_dim
        source = kv_head * DEMO_TARGET.kv_heads // num_live_kv_heads(self.shape)
        rows = slice(source * small, (source + 1) * small)
        keys = weights["self_attn.k_proj.weight"][kv_head * large : (kv_head + 1) * large]
        # Zero keys in the dims that the demo lacks make the dot products there zero, whatever the queries hold.
        keys[:, : self._query_columns] = 0
        keys[self._spread, :width] = self._live(layer, "self_attn.k_proj.weight")[rows].to(self._dtype)
        values = weights["self_attn.v_proj.weight"][kv_head * large : kv_head * large + small]
        values[:, :width] = self._live(layer, "self_attn.v_proj.weight")[rows]
        first = kv_head * self.shape.group
        for head in range(first, first + self.shape.group):
            weights["self_attn.o_proj.weight"][:, head * large : head * large + small] = 0

    def _place_queries(self, layer: int, head: int, queries: Tensor) -> None:
        """Write the scaled queries of the demo's `head` into a head of the shape, the rounding error separately."""
        width, small = DEMO_TARGET.hidden, DEMO_TARGET.head_dim
        live = self._live(layer, "self_attn.q_proj.weight")[head * small : (head + 1) * small]
        exact = live.double() * self._query_factor
        rounded = exact.to(self._dtype)
        rows = self._head_of(head) * self.shape.head_dim + self._spread
        queries[rows, :width] = rounded
        if self._query_columns > width:
            queries[rows, width : 2 * width] = (exact - rounded.double()).to(self._dtype)

    def _place_outputs(self, layer: int, head: int, outputs: Tensor) -> None:
        """Write the outputs of the demo's `head` for every copy of the residual stream."""
        small = DEMO_TARGET.head_dim
        live = self._live(layer, "self_attn.o_proj.weight")[:, head * small : (head + 1) * small]
        start = self._head_of(head) * self.shape.head_dim
        outputs[:, start : start + small] = self._stack(live)

    def _head_of(self, head: int) -> int:
        """Return the shape's query head that computes the demo's `head`: the first ones of the live groups."""
        taken = min(self.shape.group, DEMO_TARGET.group)
        return head // taken * self.shape.group + head % taken

    def _place_mlp(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Write the demo's MLP over the random weights, and zeros over interfering weights."""
        width, neurons = DEMO_TARGET.hidden, DEMO_TARGET.mlp
        norm = self._live(layer, "post_attention_layernorm.weight")
        weights["post_attention_layernorm.weight"][:width] = norm * self._norm_factor
        weights["mlp.gate_proj.weight"][:neurons, :width] = self._live(layer, "mlp.gate_proj.weight")
        weights["mlp.up_proj.weight"][:, :width] = 0
        weights["mlp.up_proj.weight"][:neurons, :width] = self._live(layer, "mlp.up_proj.weight")
        weights["mlp.down_proj.weight"][:, :neurons] = self._stack(self._live(layer, "mlp.down_proj.weight"))

    def _place_experts(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Write a router, and the demo's MLP over the random weights of all experts; in idle layers they add zero."""
        width, neurons, inner = DEMO_TARGET.hidden, DEMO_TARGET.mlp, self.shape.mlp
        generator = torch.Generator().manual_seed(zlib.crc32(f"router {self._seed} {layer}".encode()))
        router = torch.randn(self.shape.experts, width, generator=generator)
        weights["mlp.gate.weight"][:, :width] = router * width**-0.5
        norm = self._live(min(layer, DEMO_TARGET.layers - 1), "post_attention_layernorm.weight")
        weights["post_attention_layernorm.weight"][:width] = norm * self._norm_factor
        gates, ups = weights["mlp.experts.gate_up_proj"].split(inner, dim=1)
        ups[:, :, :width] = 0
        if layer < DEMO_TARGET.layers:
            gates[:, :neurons, :width] = self._live(layer, "mlp.gate_proj.weight")
            ups[:, :neurons, :width] = self._live(layer, "mlp.up_proj.weight")
            weights["mlp.experts.down_proj"][:, :, :neurons] = self._stack(self._live(layer, "mlp.down_proj.weight"))


def _read_demo() -> dict[str, Tensor]:
    """Read the demo target's weights in float32."""
    checkpoint = open_checkpoint(demo_source("target").path)
    with TensorReader(checkpoint) as reader:
        return {key: reader.read(key).float() for key in checkpoint.tensors}


def _spread_rotary(head_dim: int) -> Tensor:
    """Return the dims in a head of `head_dim` that keep the rotary speeds of the demo's head dims; int64 [64].

    Dims i and i + half rotate together, by theta ** (-2 i / head_dim) per position.
    """
    half = DEMO_TARGET.head_dim // 2
    low = torch.arange(half) * (head_dim // DEMO_TARGET.head_dim)
    return torch.cat([low, low + head_dim // 2])


def _fill_random(matrices: Iterable[Tensor], dtype: Dtype, label: str) -> None:
    """Fill contiguous matrices of a multiple of 8 bytes with incompressible values that `label` determines."""
    words = (matrix.view(-1).view(torch.int64) for matrix in matrices)
    blocks = [block for part in words for block in part.split(_RANDOM_BLOCK)]
    # crc32 mixes 32 bits well, and torch's CPU generator uses only 32.
    seeds = [zlib.crc32(f"{label} {number}".encode()) for number in range(len(blocks))]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(_fill_block, blocks, seeds, repeat(_RANDOM_NUMBERS[dtype])))


def _fill_block(block: Tensor, seed: int, number: tuple[int, int, int]) -> None:
    """Fill int64 words with random values of (mask, addend, bytes)."""
    mask, addend, width = number
    clear, add = _repeated(mask, width), _repeated(addend, width)
    generator = torch.Generator().manual_seed(seed)
    for words in block.split(_RANDOM_CHUNK):
        words.random_(-(2**63), None, generator=generator)
        words.bitwise_and_(clear).add_(add)  # the sums do not carry into the next value


def _repeated(pattern: int, width: int) -> int:
    """Repeat `pattern` of `width` bytes in a signed word of 8 bytes."""
    return int.from_bytes(pattern.to_bytes(width, "little") * (8 // width), "little", signed=True)


# --- files -------------------------------------------------------------------------------------------------------


def shape_files(shape: Shape) -> dict[str, bytes]:
    """Build the files next to the weights by name: config.json of the shape, and the demo's tokenizer and defaults.

    Raises:
        ModelNotFoundError: the demo's files are missing from this installation.
    """
    folder = demo_source("target").path
    files = {name: (folder / name).read_bytes() for name in _COPIED_FILES}
    files["config.json"] = json.dumps(_config(shape, read_json(folder / "config.json")), indent=2).encode()
    files["README.md"] = (
        f"Made by specchat: a {shape.describe()}.\n"
        "Its weights are mostly random, for measuring speed. It may be deleted. The demo's sources: specchat/demo.\n"
    ).encode()
    return files


def _config(shape: Shape, demo: Mapping[str, Any]) -> dict[str, Any]:
    """Return the demo's LlamaConfig with the shape's figures; a MixtralConfig with experts."""
    used = shape.hidden // DEMO_TARGET.hidden * DEMO_TARGET.hidden
    return {
        **demo,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": demo["rms_norm_eps"] * used / shape.hidden,
        "torch_dtype": torch_name(shape.dtype),
        "specchat_synthetic": True,
        **(_expert_config(shape) if shape.experts else {}),
    }


def _expert_config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "sliding_window": None,
    }


# --- the cache ---------------------------------------------------------------------------------------------------


def bytes_to_write(shape: Shape, *, seed: int = 0) -> int:
    """Return the bytes that `materialise` would write; 0 if the shape's pack exists."""
    layers = _layers(shape, seed)
    pack = open_pack(_key(shape, seed), lambda _: None)
    return 0 if pack is not None and pack.fits(layers) else _num_bytes(layers)


def materialise(
    shape: Shape, *, seed: int = 0, progress: Progress | None = None, warn: Callable[[str], None] = lambda _: None
) -> ModelSource:
    """Build the shape's pack in the user's cache unless it exists; it is safe to delete at any time.

    Args:
        shape: shape from `parse_shape`.
        seed: seed as in `ShapeLayers`.
        progress: receives (bytes written, bytes in total).
        warn: receives one-line messages: what is written where, and a wait for another process that writes the pack.

    Raises:
        DoesNotFitError: the disk is too small.
        ModelError: the cache is not writable, or the demo's files are missing.
    """
    key, layers = _key(shape, seed), _layers(shape, seed)
    name = f"{SHAPE_PREFIX}{shape.label}"
    pack = open_pack(key, warn)
    if pack is None or not pack.fits(layers):
        size = format_bytes(_num_bytes(layers))
        warn(f"writing the synthetic model {name} ({size}) to {packs_folder() / key}; it may be deleted afterwards")

        def tell(report: PackProgress) -> None:
            if progress is not None:
                progress(report.bytes_done, report.bytes_total)

        pack = build_pack(
            key,
            layers,
            name=name,
            files=shape_files(shape),
            dtype=shape.dtype,
            quantizer=_quantizer(shape),
            progress=tell,
            warn=warn,
        )
    return ModelSource(name=name, path=pack.folder, label=LABEL)


def _layers(shape: Shape, seed: int) -> LayerSource:
    """Return the layers as the pack stores them."""
    recipe = recipe_for(shape.quant)
    layers = ShapeLayers(shape, seed)
    return layers if recipe is None else QuantizedLayers(layers, recipe, head="model.embed_tokens.weight")


def _quantizer(shape: Shape) -> str:
    recipe = recipe_for(shape.quant)
    return NOT_QUANTIZED if recipe is None else recipe.identity


def _num_bytes(layers: LayerSource) -> int:
    tensors = [*layers.layer_meta(0).values()] * layers.num_layers + [*layers.rest_meta().values()]
    return sum(tensor.nbytes for tensor in tensors)


def _key(shape: Shape, seed: int) -> str:
    """Return a folder name that describes the shape and changes with everything that its bytes depend on."""
    digest = hashlib.sha256(f"{LAYOUT_VERSION}".encode())
    if shape.quant != "none":
        digest.update(_quantizer(shape).encode())
    folder = demo_source("target").path
    for name in ("config.json", "model.safetensors", *_COPIED_FILES):
        digest.update((folder / name).read_bytes())
    figures = f"h{shape.hidden}-l{shape.layers}-q{shape.heads}-kv{shape.kv_heads}-d{shape.head_dim}-m{shape.mlp}"
    if shape.experts:
        figures += f"-e{shape.experts}-k{shape.experts_per_token}"
    stored = shape.dtype if shape.quant == "none" else f"{shape.dtype}-{shape.quant}"
    return f"shape-{figures}-{stored}-seed{seed}-{digest.hexdigest()[:12]}"
