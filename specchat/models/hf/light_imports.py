"""The import of transformers without parts that answers never use: torch's compiler, groups of devices, scipy.

They take a third of the processor time of a short answer.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
# Python looks up the parents of a module only if the module itself is missing.
_MASK_HELPER = f"{_COMPILER}._trace_wrapped_higher_order_op"


def import_lightly() -> None:
    """Import transformers' modules for inference, unless the process has them already.

    Only for processes that end with the command: transformers then believes that torch has no groups of devices and
    that scipy, which the training of detectors needs, is missing. Marks for torch's compiler are left out, so the code
    that has them is compiled like any other.
    """
    if "transformers.modeling_utils" in sys.modules or _COMPILER in sys.modules:
        return
    import torch
    import torch.distributed
    from transformers import utils
    from transformers.utils import import_utils

    with _replaced(torch.distributed, "is_available", _no):
        import_utils.is_torch_distributed_available()  # remembers its answer
    with ExitStack() as stack:
        stack.enter_context(_replaced(utils, "is_scipy_available", _no))
        stack.enter_context(_replaced(torch.compiler, "disable", _unmarked))
        stack.enter_context(_stand_in(_COMPILER, assume_constant_result=_unmarked, allow_in_graph=_unmarked))
        stack.enter_context(_stand_in(_MASK_HELPER, TransformGetItemToIndex=_mask_helper))
        import transformers.masking_utils
        import transformers.modeling_layers  # noqa: F401


def _no() -> bool:
    return False


def _unmarked(function: Any = None, **_: Any) -> Any:
    """Return a function as it is, in place of a decorator that marks it for torch's compiler."""
    return _unmarked if function is None else function


def _mask_helper() -> Any:
    """Return torch's context manager for indices in mask functions, which is imported when a mask needs it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


@contextmanager
def _replaced(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Replace an attribute within the scope."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _stand_in(name: str, **values: Any) -> Iterator[None]:
    """Put a module with a few names into the place of one that is not imported yet, within the scope."""
    module = ModuleType(name)
    vars(module).update(values)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
