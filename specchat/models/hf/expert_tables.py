"""The routed experts of a GPU's pool of slots: one kernel computes a layer's experts, wherever they lie.

The kernel for many experts is given the address of each expert's matrices. So the numbers of the experts stay as they
are, and pairs of row and expert are grouped as if all experts were resident: where an expert lies changes no bit.

torch's own grouped product cannot serve here. It takes at most 1,023 matrices, and on most GPUs it starts one product
for each of them, empty ones included; a pool has thousands of slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specchat.models.hf.experts import Compute, LayerExperts
from specchat.models.quant.experts import ExpertMatrices, mixed, pairs_at_once
from specchat.models.quant.kernels.grouped import has_grouped
from specchat.models.quant.kernels.tiles import TileForm
from specchat.models.quant.modules import quant_linears, same_format

# Brings routed experts, int64 [rows, k] on the GPU, into slots, for all work that is queued afterwards. Calls the given
# function with the slot of each expert of the layer, int64 [N], and returns the ids in host memory.
Bring = Callable[[Tensor, Callable[[Any], None]], Tensor]


@dataclass(frozen=True)
class _Part:
    """One matrix of an expert, or a range of its rows.

    Attributes:
        pieces: names of its segments, as in `LayerExperts.pieces`.
        form: format as the kernel reads it; None if it cannot.
        shape: (rows, cols) of the matrix.
    """

    pieces: tuple[str, ...]
    form: TileForm | None
    shape: tuple[int, int]


class ExpertTables:
    """Addresses of the experts of the layer in progress; all layers share the memory of the tables.

    Args:
        experts: experts of any layer, whose parameters may be on meta.
        stacks: all slots of the pool as stacked tensors [slots, ...] on the GPU, by piece.
        slot_bytes: length of a slot.
        allocate: allocates host memory to copy from, uint8, that starts at a page.

    Attributes:
        nbytes: bytes of the tables on the GPU.
    """

    def __init__(
        self,
        experts: LayerExperts,
        stacks: Mapping[str, Tensor],
        slot_bytes: int,
        allocate: Callable[[int], Tensor],
    ) -> None:
        self._num_experts, self._stacks = experts.num_experts, stacks
        self._names = _matrix_names(experts)
        parts = [list(_parts(experts, name)) for name in self._names]
        pieces = [piece for own in parts for part in own for piece in part.pieces]
        self._begins: Any = np.array([[stacks[piece].data_ptr()] for piece in pieces], dtype=np.int64)
        self._slot_bytes = slot_bytes
        # One row of addresses for each piece, and one of slots.
        shape = len(pieces) + 1, self._num_experts
        self.nbytes = shape[0] * shape[1] * 8
        self._host = allocate(self.nbytes)[: self.nbytes].view(torch.int64).view(shape)
        self._on_host: Any = self._host.numpy()
        self._there = torch.zeros(shape, dtype=torch.int64, device=stacks[pieces[0]].device)
        self._matrices = self._bind(parts)
        self._templates = {name: _Template(experts, name, stacks) for name in experts.lists}

    def _bind(self, parts: Sequence[Sequence[_Part]]) -> tuple[Sequence[ExpertMatrices], ...] | None:
        """Return the matrices with their rows of the table; None if the kernel cannot read one of them."""
        first, bound = 0, []
        for own in parts:
            matrices = []
            for part in own:
                if part.form is None:
                    return None
                rows = self._there[first : first + len(part.pieces)]
                matrices.append(ExpertMatrices(rows, part.form, part.shape))
                first += len(part.pieces)
            bound.append(matrices)
        return tuple(bound)

    def place(self, slots: Any) -> None:
        """Say where the experts of the next layer lie.

        The host memory is free again: the host has waited for the ids of this layer, which the GPU knew only after it
        had computed the layers before.

        Args:
            slots: slot of each expert, int64 [N]; negative without one.
        """
        np.maximum(slots, 0, out=self._on_host[-1])
        self._on_host[:-1] = self._begins + self._on_host[-1] * self._slot_bytes
        self._there.copy_(self._host, non_blocking=True)

    def compute_with(self, bring: Bring, held: Mapping[str, Tensor]) -> Compute:
        """Return the function that computes a layer.

        Args:
            bring: brings the experts of the layer into slots.
            held: small tensors of all experts of the layer [N, ...] on the GPU, by piece.
        """

        def compute(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            on_host = bring(ids, self.place)
            pairs = self._at_once(module, hidden, ids, held)
            if pairs is None:
                pairs = self._in_turn(module, hidden, ids, on_host, held)
            if getattr(module, "has_post_expert_norm", False):
                pairs = module.post_expert_norm(pairs)
            return mixed(pairs, weights, hidden.dtype)

        return compute

    def _at_once(self, module: Any, hidden: Tensor, ids: Tensor, held: Mapping[str, Tensor]) -> Tensor | None:
        """Return the products of all pairs [rows * k, width] by the kernel; None where it cannot."""
        if self._matrices is None or not has_grouped(hidden.device):
            return None
        biases: list[Tensor | None] = [None, None]
        if module.has_bias:
            known = ids.reshape(-1).clamp(max=self._num_experts - 1)
            biases = [self._bias(f"{name}_bias", held, known) for name in self._names]
        ups, downs = self._matrices
        return pairs_at_once(module, hidden, ids, self._num_experts, (ups, downs), biases)

    def _bias(self, piece: str, held: Mapping[str, Tensor], known: Tensor) -> Tensor:
        return held[piece][known] if piece in held else self._stacks[piece][self._there[-1][known]]

    def _in_turn(self, module: Any, hidden: Tensor, ids: Tensor, on_host: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        """Return the products of all pairs [rows * k, width], one expert at a time; the host waits for nothing."""
        counts = np.bincount(on_host.numpy().ravel(), minlength=self._num_experts + 1).tolist()
        order = ids.reshape(-1).sort(stable=True)[1]
        pairs = hidden.new_zeros(ids.numel(), hidden.shape[1])
        for expert, own in enumerate(order.split(counts)[: self._num_experts]):
            if counts[expert]:
                inner = self._multiply(module, self._names[0], expert, hidden[own // ids.shape[1]], held)
                inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
                pairs[own] = self._multiply(module, self._names[1], expert, inner, held).to(pairs.dtype)
        return pairs

    def _multiply(self, module: Any, name: str, expert: int, rows: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        slot = int(self._on_host[-1, expert])
        if name in self._templates:
            out = self._templates[name].at(slot)(rows)
        else:
            weight = self._stacks[name][slot]
            out = torch.mm(rows.to(weight.dtype), weight if module.is_transposed else weight.T)
        if not module.has_bias:
            return out
        piece = f"{name}_bias"
        return out + (held[piece][expert] if piece in held else self._stacks[piece][slot])


class _Template:
    """A quantized matrix whose segments are those of any slot."""

    def __init__(self, experts: LayerExperts, name: str, stacks: Mapping[str, Tensor]) -> None:
        self._module = same_format(experts.lists[name][0])
        self._places = []
        for segment, _ in experts.lists[name][0].named_parameters():
            path, _, leaf = segment.rpartition(".")
            self._places.append((self._module.get_submodule(path), leaf, stacks[f"{name}.{segment}"]))

    def at(self, slot: int) -> nn.Module:
        """Return the matrix of a slot."""
        for module, leaf, stack in self._places:
            module._parameters[leaf] = nn.Parameter(stack[slot], requires_grad=False)
        return self._module


def has_tile_forms(experts: LayerExperts) -> bool:
    """Return whether the kernel for many experts can read all matrices of a layer's experts."""
    return all(part.form is not None for name in _matrix_names(experts) for part in _parts(experts, name))


def _matrix_names(experts: LayerExperts) -> tuple[str, str]:
    return "gate_up_proj" if experts.module.has_gate else "up_proj", "down_proj"


def _parts(experts: LayerExperts, name: str) -> Iterator[_Part]:
    """Yield the parts of a matrix of the experts."""
    if name in experts.lists:
        for path, linear in quant_linears(experts.lists[name][0], prefix=name):
            pieces = tuple(f"{path}.{segment}" for segment in linear.segments)
            yield _Part(pieces, linear.format.tile_form(linear.shape), linear.shape)
        return
    piece = experts.pieces[name]
    first, second = piece.shape
    if experts.module.is_transposed:
        yield _Part((name,), TileForm("plain transposed", scale_dtype=piece.dtype), (second, first))
    else:
        yield _Part((name,), TileForm("plain", scale_dtype=piece.dtype), (first, second))
