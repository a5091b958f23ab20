"""Input embeddings in a quantization format: rows are dequantized when they are looked up."""

from typing import Any

import torch
from torch import Tensor, nn

from specchat.models.quant.modules import Matrix, Part, QuantLinear, Scratch, parent_of

# The path of the table within the module.
TABLE = "table"


class QuantEmbedding(nn.Module):
    """Input embeddings with a quantized table; replaces an `nn.Embedding`, or a subclass that changes the rows.

    Args:
        inner: replaced module; it scales or norms the rows that are looked up.
        table: the table as a linear layer, which is also the head of a model with tied embeddings.
    """

    def __init__(self, inner: nn.Embedding, table: QuantLinear) -> None:
        super().__init__()
        self._dtype = inner.weight.dtype
        del inner.weight
        inner.padding_idx = None
        self.inner: Any = inner
        self.table = table

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings [..., hidden] of token ids [...]."""
        table, flat = self.table, token_ids.reshape(-1)
        rows = torch.empty(len(flat), table.in_features, dtype=self._dtype, device=flat.device)
        self.inner.weight = table.format.look_up(table.segments, flat, rows)
        try:
            found: Tensor = self.inner(torch.arange(len(flat), device=flat.device).view(token_ids.shape))
        finally:
            del self.inner.weight
        return found


def replace_embedding(model: Any, matrix: Matrix, part: Part, scratch: Scratch) -> None:
    """Replace input embeddings by a `QuantEmbedding`, and a head that shares their weight by the same table."""
    parent, leaf = parent_of(model, matrix.path)
    inner, head = getattr(parent, leaf), model.get_output_embeddings()
    table = QuantLinear(part.format, matrix.shape, None, scratch)
    if head is not None and getattr(head, "weight", None) is inner.weight:
        assert head.bias is None, "a bias of a tied head would lose its name"
        model.set_output_embeddings(table)
    setattr(parent, leaf, QuantEmbedding(inner, table))
