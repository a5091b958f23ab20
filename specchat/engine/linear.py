"""Linear maps of full-precision models whose products `kernels.matmul` computes faster than torch by itself."""

from functools import partial

from torch import Tensor, nn

from specchat.models.quant.kernels.matmul import is_faster_by_onednn, product


def use_fast_products(model: nn.Module) -> None:
    """Makes the model's large linear maps compute with oneDNN where that is faster.

    Args:
        model: on a CPU; parameters may still be on meta. Only plain `nn.Linear` are changed.
    """
    for module in model.modules():
        if type(module) is nn.Linear and is_faster_by_onednn(module.weight):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, rows: Tensor) -> Tensor:
    """What `module` computes of `rows` [..., in]: [..., out]; its weight may have been bound to other memory since."""
    return product(rows, module.weight, module.bias)
