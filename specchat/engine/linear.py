"""Linear layers of a CPU that compute faster than torch's default: as they are stored, or packed to stay in memory."""

import math
from collections.abc import Iterable
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from specchat.models.quant.autotune import autotuner
from specchat.models.quant.kernels.matmul import (
    has_own_row_kernel,
    is_by_onednn,
    is_faster_by_onednn,
    product,
    product_of_one_row,
)
from specchat.models.quant.kernels.packed import PackedMatrix
from specchat.models.quant.modules import drop, quant_linears
from specchat.models.quant.packing import pack_if_faster

_CPU = torch.device("cpu")


def use_fast_matmuls(model: nn.Module) -> None:
    """Switch the model's linear layers to the fastest matmul with their matrix as it is stored.

    Args:
        model: model on a CPU or still on meta; only modules of exactly `nn.Linear` change, and not packed ones.
    """
    for module in model.modules():
        if type(module) is nn.Linear and not isinstance(module.forward, partial):
            weight = module.weight
            if is_faster_by_onednn(weight) or is_by_onednn(weight):
                module.forward = partial(_forward, module)  # type: ignore[method-assign]


def settle(layer: nn.Module, linears: Iterable[nn.Linear], dtype: torch.dtype, *, expands: bool) -> None:
    """Give a resident layer's matrices the order in which they are fastest, and free the layer's blob.

    Args:
        layer: decoder layer on a CPU whose parameters are bound.
        linears: linear layers in it whose weight nothing but their own forward reads.
        dtype: dtype of the activations.
        expands: whether quantized matrices may take more memory; those that need none are packed anyway.
    """
    for module in linears:
        if (packed := pack_if_faster(module.weight)) is not None:
            module.forward = partial(_packed_forward, module, packed)  # type: ignore[method-assign]
            drop(module, "weight")
    for _, linear in quant_linears(layer):
        if expands or linear.stored_bytes >= math.prod(linear.shape) * dtype.itemsize:
            linear.hold(dtype)
    if any(parameter.is_meta for parameter in layer.parameters()):
        for owner in layer.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def unsettle(layer: nn.Module) -> None:
    """Let a resident layer compute with its matrices as they are stored, so that other memory can be bound to it.

    Args:
        layer: decoder layer on a CPU that `settle` may have changed.
    """
    for module in layer.modules():
        if _is_packed(vars(module).get("forward")):
            del module.forward
    for _, linear in quant_linears(layer):
        linear.release()
    use_fast_matmuls(layer)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of packed, dequantized and reordered matrices, which are no parameters."""
    forwards = (vars(module).get("forward") for module in model.modules())
    held: int = sum(each.args[1].nbytes for each in forwards if _is_packed(each))
    return held + sum(linear.held_bytes for _, linear in quant_linears(model))


def _is_packed(forward: object) -> TypeGuard[partial[Tensor]]:
    return isinstance(forward, partial) and forward.func is _packed_forward


def _packed_forward(module: nn.Linear, packed: PackedMatrix, rows: Tensor) -> Tensor:
    """Return `module`'s output [..., out] for `rows` [..., in] by its packed weight."""
    return packed.linear(rows, module.bias)


def _forward(module: nn.Linear, rows: Tensor) -> Tensor:
    """Return `module`'s output [..., out] for `rows` [..., in], with the weight that is bound at call time."""
    weight = module.weight
    if rows.numel() == weight.shape[1] and has_own_row_kernel(weight):
        return _of_one_row(rows, weight, module.bias)
    return product(rows, weight, module.bias)


def _of_one_row(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of one row by the kernel that was faster when it was measured."""
    kernels = {"oneDNN": product, "torch": product_of_one_row}
    calls = {name: partial(kernel, row, weight, bias) for name, kernel in kernels.items()}
    kind = f"stored {weight.shape[0]}x{weight.shape[1]} {weight.dtype} 1 rows"
    return kernels[autotuner().fastest(kind, calls, _CPU)](row, weight, bias)
