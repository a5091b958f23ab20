"""The routed experts of a model: their stacked parameters may become views of a pool of expert slots.

transformers keeps the experts of a layer stacked, [experts, ...], and every function of its experts interface takes ids
into that stack. Here the stack may be a pool of slots that all layers share, and the number of an expert becomes the
number of its slot.

Experts are computed as they arrive. The product of each row and expert has a place of its own, and one sum at the end
adds them in the order of the row's ids, as in transformers' grouped product. So what arrived first changes no bit.
transformers' "eager" is never used: it adds the experts of a row in the order of their numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.experts import mixed
from specchat.models.quant.modules import format_key, same_format

# From routed experts, int64 [rows, k], to their slots, and these slots in groups as their experts arrive. The number of
# experts stands for no expert, and becomes the number of slots.
Fetch = Callable[[Tensor], tuple[Tensor, Iterator[Sequence[int]]]]
# Computes the experts of a layer, as transformers calls it: module, hidden states [rows, width], ids and weights
# [rows, k]; returns mixed outputs [rows, width].
Compute = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

_NAME = "specchat_slots"
_COMPUTE = "_specchat_compute"


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one decoder layer.

    Attributes:
        layer: index of the decoder layer.
        path: path of the experts' module within the layer.
        module: experts' module of transformers.
        num_experts: number of experts, N.
    """

    layer: int
    path: str
    module: Any
    num_experts: int

    @property
    def stacks(self) -> dict[str, Tensor]:
        """The parameters [N, ...] by name within the module."""
        own = self.module._parameters.items()
        return {name: stack for name, stack in own if stack is not None and stack.shape[0] == self.num_experts}

    @property
    def lists(self) -> dict[str, torch.nn.ModuleList]:
        """The quantized matrices, one module for each expert, by name within the module."""
        return {name: each for name, each in self.module._modules.items() if isinstance(each, torch.nn.ModuleList)}

    @property
    def pieces(self) -> dict[str, Tensor]:
        """The tensors of the first expert, which may be on meta; those of quantized matrices as "matrix.segment"."""
        stacked = {name: stack[0] for name, stack in self.stacks.items()}
        segments = {
            f"{name}.{segment}": parameter
            for name, matrices in self.lists.items()
            for segment, parameter in matrices[0].named_parameters()
        }
        return stacked | segments

    def is_stacked(self, piece: str) -> bool:
        """Return whether one parameter holds a piece of all experts."""
        return piece in self.module._parameters

    def name_of(self, piece: str, expert: int = 0) -> str:
        """Return the name within the layer of the parameter that holds a piece of an expert."""
        if self.is_stacked(piece):
            return f"{self.path}.{piece}"
        matrix, _, segment = piece.partition(".")
        return f"{self.path}.{matrix}.{expert}.{segment}"

    @property
    def names(self) -> frozenset[str]:
        """Names within the layer of all parameters of the experts."""
        return frozenset(self.name_of(piece, expert) for piece in self.pieces for expert in range(self.num_experts))


def find_experts(skeleton: Skeleton) -> tuple[LayerExperts, ...]:
    """List the layers whose experts go through transformers' interface and are all stored alike."""
    found = []
    for index, layer in enumerate(skeleton.layers):
        modules = [(path, module) for path, module in layer.named_modules() if uses_interface(module)]
        if len(modules) == 1:
            experts = LayerExperts(index, *modules[0], int(modules[0][1].num_experts))
            if experts.pieces and all(_are_alike(each, experts.num_experts) for each in experts.lists.values()):
                found.append(experts)
    return tuple(found)


def _are_alike(matrices: torch.nn.ModuleList, num_experts: int) -> bool:
    return len(matrices) == num_experts and len(set(map(format_key, matrices))) == 1


def uses_interface(module: Any) -> bool:
    """Return whether a module computes its experts by transformers' interface, which sets these attributes."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def slot_lists(experts: LayerExperts, stacks: Mapping[str, Tensor], num_slots: int) -> dict[str, torch.nn.ModuleList]:
    """Return modules for the quantized matrices of all slots, which the layers share.

    Args:
        experts: experts of any layer.
        stacks: all slots of the pool as stacked tensors [slots, ...], by piece.
        num_slots: number of slots.
    """
    lists = {}
    for name, matrices in experts.lists.items():
        lists[name] = torch.nn.ModuleList(same_format(matrices[0]) for _ in range(num_slots))
        for segment, _ in matrices[0].named_parameters():
            path, _, leaf = segment.rpartition(".")
            for slot, view in enumerate(stacks[f"{name}.{segment}"]):
                parameter = torch.nn.Parameter(view, requires_grad=False)
                lists[name][slot].get_submodule(path)._parameters[leaf] = parameter
    return lists


def use_slots(
    experts: LayerExperts, stacks: Mapping[str, Tensor], lists: Mapping[str, torch.nn.ModuleList], fetch: Fetch
) -> None:
    """Compute a layer's experts from a pool of slots.

    Args:
        experts: experts of the layer.
        stacks: all slots of the pool as stacked tensors [slots, ...], by piece.
        lists: modules for the quantized matrices of all slots, as `slot_lists` returns them.
        fetch: brings the routed experts of a layer into slots.
    """
    module = experts.module
    for name in experts.stacks:
        module._parameters[name] = torch.nn.Parameter(stacks[name], requires_grad=False)
    module._modules.update(lists)
    module.num_experts = len(next(iter(stacks.values())))
    _use(module, partial(_compute_in_turn, fetch))


def use_tables(experts: LayerExperts, compute: Compute) -> None:
    """Compute a layer's experts from memory that the function knows; the module keeps no parameters of its experts."""
    module = experts.module
    for name in experts.stacks:
        del module._parameters[name]
    for name in experts.lists:
        del module._modules[name]
    _use(module, compute)


def _use(module: Any, compute: Compute) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    object.__setattr__(module, _COMPUTE, compute)
    module.__dict__.pop("forward", None)  # the forward of quantized experts
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _compute)
    module.config._experts_implementation = _NAME


def _compute(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute the experts of a module from slots, or by transformers' grouped product if the module has no pool."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    compute: Compute = getattr(module, _COMPUTE, None) or ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return compute(module, hidden, ids, weights)


def _compute_in_turn(fetch: Fetch, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Compute the experts of a module from slots as they arrive.

    Args:
        fetch: brings the routed experts of the layer into slots.
        module: experts' module.
        hidden: hidden states [rows, width].
        ids: experts of each row, int64 [rows, k].
        weights: weights of these experts [rows, k].

    Returns:
        Mixed outputs of the experts [rows, width].
    """
    slots, arriving = fetch(ids)
    num_rows, k = slots.shape
    ordered, order = slots.reshape(-1).sort(stable=True)  # pairs of row and expert, grouped by slot
    found, counts = ordered.unique_consecutive(return_counts=True)
    pairs_of = dict(zip(found.tolist(), order.split(counts.tolist()), strict=True))
    dense = module._parameters.get("down_proj")
    dtype = hidden.dtype if dense is None else dense.dtype
    products = hidden.new_zeros(num_rows * k, hidden.shape[1], dtype=dtype)
    for group in arriving:
        for slot in group:
            pairs = pairs_of[slot]
            products[pairs] = _expert(module, slot, hidden[pairs // k])
    if getattr(module, "has_post_expert_norm", False):
        products = module.post_expert_norm(products)
    return mixed(products, weights, hidden.dtype)


def _expert(module: Any, slot: int, rows: Tensor) -> Tensor:
    """Compute one expert, as transformers' grouped product does: rows [n, width] -> [n, width]."""
    inner = _product(module, "gate_up_proj" if module.has_gate else "up_proj", slot, rows)
    return _product(module, "down_proj", slot, module._apply_gate(inner) if module.has_gate else module.act_fn(inner))


def _product(module: Any, name: str, slot: int, rows: Tensor) -> Tensor:
    if name in module._modules:
        out: Tensor = module._modules[name][slot](rows)
    else:
        weight = module._parameters[name][slot]
        out = torch.mm(rows.to(weight.dtype), weight if module.is_transposed else weight.T)
    return out.add_(module._parameters[f"{name}_bias"][slot]) if module.has_bias else out
