"""Recipes: which matrices of a model are stored in which quantization format."""

from collections.abc import Mapping
from typing import Protocol

import torch

from specchat.models.hf.matrices import find_lookup, find_matrices, use_quantized_experts
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.experts import replace_experts
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.base import Quantizer
from specchat.models.quant.formats.int3 import Int3Quantizer
from specchat.models.quant.formats.int8 import Int8Quantizer
from specchat.models.quant.formats.nf4 import Nf4Quantizer
from specchat.models.quant.lookup import replace_embedding
from specchat.models.quant.modules import Matrix, Part, Scratch, replace_linear
from specchat.records.model import Quant, own_quant

QUANTIZERS: Mapping[Quant, Quantizer] = {
    "int3": Int3Quantizer(),
    "int4": Nf4Quantizer(),
    "int8": Int8Quantizer(),
}
# Every emitted token is drawn from the head's scores, and the head is not streamed. So it gets 8 bits: they lose little
# and still save much memory.
HEAD_QUANTIZER: Quantizer = QUANTIZERS["int8"]
# Quantizers of sensitive matrices, where they are not those of the others. KL from the demo target, in 1/1000 nat: 35.0
# with all matrices in int3. 4 bits take away 55 for each bit per weight of the model in the first layer, 52 in
# projections to values, 28 in the MLP's second matrices, 14 in the last layer, and 21 everywhere.
SENSITIVE_QUANTIZERS: Mapping[Quant, Quantizer] = {"int3": QUANTIZERS["int4"]}


class Recipe(Protocol):
    """The quantization format of each matrix of a model."""

    @property
    def name(self) -> str:
        """Name of the quantization in banners and plans."""

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """Return the formats of one matrix, from its first row to its last; None if it stays plain.

        Args:
            matrix: place of the matrix.
            expert: index of the expert; 0 without experts.
        """


class QuantizeRecipe:
    """A recipe that uses one quantizer for all layers, perhaps another for sensitive matrices, and 8 bits for the head.

    Args:
        quant: quantization, one of `LOWER_QUANTS`.
    """

    def __init__(self, quant: Quant) -> None:
        self.name: str = quant
        self.layer_quantizer = QUANTIZERS[quant]
        self.sensitive_quantizer = SENSITIVE_QUANTIZERS.get(quant, self.layer_quantizer)

    def quantizer(self, matrix: Matrix) -> Quantizer:
        """Return the quantizer of a matrix."""
        if matrix.is_head:
            return HEAD_QUANTIZER
        return self.sensitive_quantizer if matrix.is_sensitive else self.layer_quantizer

    @property
    def identity(self) -> str:
        """Identity of the quantizers, for the key of a pack."""
        parts = [self.layer_quantizer.identity]
        if self.sensitive_quantizer != self.layer_quantizer:
            parts.append(f"sensitive {self.sensitive_quantizer.identity}")
        return "; ".join([*parts, f"head {HEAD_QUANTIZER.identity}"])

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """Return one part that covers the whole matrix; None for input embeddings."""
        if matrix.is_lookup:
            return None
        return (Part(matrix.shape[0], self.quantizer(matrix).format),)


class AssumedRecipe:
    """The storage that plans assume of a pre-quantized checkpoint without its files: one format for all layers.

    Args:
        name: name of the checkpoint's scheme, which tells the number of bits.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bits = 4 if "4" in name else 8
        self._format = Affine(4, 128, torch.float16, zeros=True) if self.bits == 4 else QUANTIZERS["int8"].format

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """Return one part that covers the whole matrix; None for embeddings and head."""
        return None if matrix.is_head or matrix.is_lookup else (Part(matrix.shape[0], self._format),)


def recipe_for(quant: str) -> QuantizeRecipe | None:
    """Return the recipe for `--quant`; None if the matrices stay plain."""
    wanted = own_quant(quant)
    return None if wanted == "none" else QuantizeRecipe(wanted)


def apply_recipe(skeleton: Skeleton, recipe: Recipe) -> tuple[Matrix, ...]:
    """Replace the quantized matrices of a skeleton in place; norms and routers stay.

    Returns:
        Replaced matrices.
    """
    scratch = Scratch()
    replaced, lookup = [], find_lookup(skeleton)
    # The embeddings come last: only a head without a matrix of its own shares their weight then.
    for matrix in [*find_matrices(skeleton), *([] if lookup is None else [lookup])]:
        experts = [recipe.parts(matrix, expert) for expert in range(max(matrix.num_experts, 1))]
        if any(parts is None for parts in experts):
            continue
        chosen = [parts for parts in experts if parts is not None]
        if matrix.num_experts:
            replace_experts(skeleton.model, matrix, chosen, scratch)
        elif matrix.is_lookup:
            replace_embedding(skeleton.model, matrix, chosen[0][0], scratch)
        else:
            replace_linear(skeleton.model, matrix, chosen[0][0], scratch)
        replaced.append(matrix)
    use_quantized_experts(skeleton)
    return tuple(replaced)
