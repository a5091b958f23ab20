"""Experts whose matrices are quantized: one module for each matrix, computed all at once on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specchat.models.quant.kernels.grouped import Grouping, has_grouped, multiply_grouped
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.modules import (
    Matrix,
    Part,
    QuantLinear,
    QuantParts,
    Scratch,
    format_key,
    parent_of,
    quant_linears,
)

_TABLES = "_specchat_tables"


@dataclass(frozen=True)
class ExpertMatrices:
    """One matrix, or a range of its rows, of every expert of a layer.

    Attributes:
        addresses: addresses of the segments, int64 [segments, experts].
        form: format of all of them.
        shape: (rows, cols) of each.
    """

    addresses: Tensor
    form: TileForm
    shape: tuple[int, int]


def replace_experts(model: Any, matrix: Matrix, experts: Sequence[Sequence[Part]], scratch: Scratch) -> None:
    """Replace a fused parameter by a list of `QuantLinear` or `QuantParts`, one per expert."""
    parent, leaf = parent_of(model, matrix.path)
    modules = []
    for parts in experts:
        linears = [QuantLinear(part.format, (part.rows, matrix.shape[1]), None, scratch) for part in parts]
        modules.append(linears[0] if len(linears) == 1 else QuantParts(linears))
    delattr(parent, leaf)
    setattr(parent, leaf, nn.ModuleList(modules))


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a fused-experts module of transformers whose matrices are quantized.

    Args:
        module: module with act_fn or _apply_gate, has_gate, has_bias, and the lists of `replace_experts`.
        hidden: hidden states [rows, width].
        top_k_index: experts of each row, int64 [rows, k]; the number of experts stands for none.
        top_k_weights: weights of these experts [rows, k].

    Returns:
        Mixed outputs of the experts [rows, width].
    """
    pairs = _at_once(module, hidden, top_k_index)
    if pairs is None:
        pairs = _in_turn(module, hidden, top_k_index)
    return mixed(pairs, top_k_weights, hidden.dtype)


def mixed(pairs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weighted sums over the experts of each row: [rows, width] in `dtype`.

    Args:
        pairs: products of each row and expert [rows * k, width].
        weights: weights of the experts [rows, k].
        dtype: dtype of the result.
    """
    weighted = pairs * weights.reshape(-1, 1)
    return weighted.view(*weights.shape, -1).sum(1).to(dtype)


def _in_turn(module: Any, hidden: Tensor, top_k_index: Tensor) -> Tensor:
    """Return the products of all pairs [rows * k, width], dequantizing one matrix of one used expert at a time."""
    num_rows, k = top_k_index.shape
    ups = _ups(module)
    up_biases, down_biases = _expert_biases(module)
    order = top_k_index.reshape(-1).argsort(stable=True)  # row-expert pairs, grouped by expert
    counts = top_k_index.reshape(-1).bincount(minlength=module.num_experts).tolist()
    pairs = hidden.new_zeros(num_rows * k, hidden.shape[1])
    end = 0
    for expert, count in enumerate(counts[: module.num_experts]):
        if count == 0:
            continue
        begin, end = end, end + count
        inner = ups[expert](hidden[order[begin:end] // k])  # [count, 2 * inner]
        if up_biases is not None:
            inner = inner + up_biases[expert]
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = module.down_proj[expert](inner)
        if down_biases is not None:
            outer = outer + down_biases[expert]
        pairs[order[begin:end]] = outer.to(pairs.dtype)
    return pairs


def _at_once(module: Any, hidden: Tensor, top_k_index: Tensor) -> Tensor | None:
    """Return the products of all pairs [rows * k, width] by a kernel for all experts; None where it cannot."""
    if not has_grouped(hidden.device):
        return None
    ups, downs = _tables(module, _ups(module)), _tables(module, module.down_proj)
    if ups is None or downs is None:
        return None
    known = top_k_index.reshape(-1).clamp(max=module.num_experts - 1) if module.has_bias else None
    biases = [None if bias is None else bias[known] for bias in _expert_biases(module)]
    return pairs_at_once(module, hidden, top_k_index, module.num_experts, (ups, downs), biases)


def pairs_at_once(
    module: Any,
    hidden: Tensor,
    ids: Tensor,
    num_experts: int,
    matrices: tuple[Sequence[ExpertMatrices], Sequence[ExpertMatrices]],
    biases: Sequence[Tensor | None],
) -> Tensor | None:
    """Return the products of all pairs [rows * k, width] by a kernel for all experts; None if it does not compile.

    Args:
        module: module with act_fn or _apply_gate, and has_gate.
        hidden: hidden states [rows, width].
        ids: experts of each row, int64 [rows, k]; `num_experts` stands for none.
        num_experts: number of experts.
        matrices: matrices into and out of the experts, part by part.
        biases: biases of each pair after these matrices [rows * k, ...], or None.
    """
    grouping = Grouping.of(ids.reshape(-1), num_experts)
    inner = _product(hidden, matrices[0], grouping, ids.shape[1])
    if inner is None:
        return None
    if biases[0] is not None:
        inner = inner + biases[0]
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _product(inner, matrices[1], grouping, 1)
    return outer if outer is None or biases[1] is None else outer + biases[1]


def _product(x: Tensor, parts: Sequence[ExpertMatrices], grouping: Grouping, per_row: int) -> Tensor | None:
    """Return x W^T of all pairs, with the rows of all parts of W; zeros for pairs without an expert."""
    out = x.new_zeros(len(grouping.order), sum(part.shape[0] for part in parts))
    first, x = 0, x.contiguous()
    for part in parts:
        if not multiply_grouped(x, grouping, part.addresses, part.form, part.shape, out, first=first, per_row=per_row):
            return None
        first += part.shape[0]
    return out


def _ups(module: Any) -> nn.ModuleList:
    matrices: nn.ModuleList = module.gate_up_proj if module.has_gate else module.up_proj
    return matrices


def _tables(module: Any, matrices: nn.ModuleList) -> Sequence[ExpertMatrices] | None:
    """Return the matrices of a list for the kernel, part by part; None if it cannot compute them.

    A layer's parameters all lie in one blob, so a layer that was bound elsewhere has moved its first matrix.
    """
    first = next(matrices.parameters())
    tables: dict[int, Any] = module.__dict__.setdefault(_TABLES, {})
    if id(matrices) not in tables or tables[id(matrices)][0] != first.data_ptr():
        tables[id(matrices)] = first.data_ptr(), _parts(matrices)
    parts: Sequence[ExpertMatrices] | None = tables[id(matrices)][1]
    return parts


def _parts(matrices: nn.ModuleList) -> Sequence[ExpertMatrices] | None:
    if len(set(map(format_key, matrices))) != 1:
        return None
    by_expert = [[linear for _, linear in quant_linears(each)] for each in matrices]
    parts = []
    for linears in zip(*by_expert, strict=True):
        form = linears[0].format.tile_form(linears[0].shape)
        if form is None:
            return None
        parts.append(ExpertMatrices(_addresses(linears), form, linears[0].shape))
    return parts


def _addresses(linears: Sequence[QuantLinear]) -> Tensor:
    by_segment = zip(*(linear.segments.values() for linear in linears), strict=True)
    device = next(linears[0].parameters()).device
    return torch.tensor([[each.data_ptr() for each in segments] for segments in by_segment], device=device)


def _expert_biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    if not module.has_bias:
        return None, None
    return module.gate_up_proj_bias if module.has_gate else module.up_proj_bias, module.down_proj_bias
