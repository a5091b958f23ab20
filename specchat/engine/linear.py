"""Full-precision linear layers that `kernels.matmul` computes faster than torch's default."""

from functools import partial

from torch import Tensor, nn

from specchat.models.quant.kernels.matmul import is_faster_by_onednn, product


def use_fast_matmuls(model: nn.Module) -> None:
    """Switch the model's large linear layers to oneDNN where oneDNN is faster.

    Args:
        model: model on a CPU or still on meta; only modules of exactly `nn.Linear` change.
    """
    for module in model.modules():
        if type(module) is nn.Linear and is_faster_by_onednn(module.weight):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, rows: Tensor) -> Tensor:
    """Return `module`'s output [..., out] for `rows` [..., in], with the weight that is bound at call time."""
    return product(rows, module.weight, module.bias)
