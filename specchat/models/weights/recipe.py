"""Which matrices of a model are stored how, and how those that we quantize ourselves are filled."""

from collections.abc import Mapping
from typing import Protocol

from specchat.models.hf.matrices import find_matrices, use_quantized_experts
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.formats.base import Quantizer
from specchat.models.quant.formats.int8 import Int8Quantizer
from specchat.models.quant.formats.nf4 import Nf4Quantizer
from specchat.models.quant.modules import Matrix, Part, Scratch, replace_experts, replace_linear
from specchat.records.model import Quant, own_quant

QUANTIZERS: Mapping[Quant, Quantizer] = {"int4": Nf4Quantizer(), "int8": Int8Quantizer()}
# Every emitted token is drawn from the head's scores, and it is not streamed: 8 bits there cost little and save much.
HEAD_QUANTIZER: Quantizer = QUANTIZERS["int8"]


class Recipe(Protocol):
    """What becomes of a model's matrices."""

    @property
    def name(self) -> str:
        """What banner and plan say."""

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...] | None:
        """How one matrix is stored, from its first row to its last; None where it stays as it is.

        Args:
            matrix: where.
            expert: which of the fused ones; 0 for others.
        """


class QuantizeRecipe:
    """Everything by one quantizer, but for the head, which gets 8 bits.

    Args:
        quant: one of `LOWER_QUANTS`.
    """

    def __init__(self, quant: Quant) -> None:
        self.name: str = quant
        self.layer_quantizer = QUANTIZERS[quant]

    def quantizer(self, matrix: Matrix) -> Quantizer:
        """What fills a matrix."""
        return HEAD_QUANTIZER if matrix.layer is None else self.layer_quantizer

    @property
    def identity(self) -> str:
        """What a pack's bytes depend on beside the weights."""
        return f"{self.layer_quantizer.identity}; head {HEAD_QUANTIZER.identity}"

    def parts(self, matrix: Matrix, expert: int) -> tuple[Part, ...]:
        """The whole matrix in one piece."""
        return (Part(matrix.shape[0], self.quantizer(matrix).format),)


def recipe_for(quant: str) -> QuantizeRecipe | None:
    """What `--quant` asks for; None where the matrices stay as they are."""
    wanted = own_quant(quant)
    return None if wanted == "none" else QuantizeRecipe(wanted)


def apply_recipe(skeleton: Skeleton, recipe: Recipe) -> tuple[Matrix, ...]:
    """Replaces the modules of a skeleton, in place; its norms, routers and embeddings stay.

    Returns:
        The matrices that are stored in a format from now on.
    """
    scratch = Scratch()
    replaced = []
    for matrix in find_matrices(skeleton):
        experts = [recipe.parts(matrix, expert) for expert in range(max(matrix.num_experts, 1))]
        if any(parts is None for parts in experts):
            continue
        chosen = [parts for parts in experts if parts is not None]
        if matrix.num_experts:
            replace_experts(skeleton.model, matrix, chosen, scratch)
        else:
            replace_linear(skeleton.model, matrix, chosen[0][0], scratch)
        replaced.append(matrix)
    use_quantized_experts(skeleton)
    return tuple(replaced)
