"""Functions that dequantize blocks, compiled by numba: threads call them by address, without Python.

This module imports numba, so only code that has found numba imports it.
"""

from types import FunctionType
from typing import Any

from llvmlite import ir
from numba import carray, cfunc, config, types
from numba.extending import intrinsic

# The fields of a task, int64 each: see `run_task`.
TASK_FIELDS = 5


def _pointer_to(item: Any, width: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, _address: Any) -> Any:
        """Return an address as a pointer."""
        generate = lambda _, builder, __, args: builder.inttoptr(args[0], width.as_pointer())  # noqa: E731
        return types.CPointer(item)(types.int64), generate

    return pointer


@intrinsic
def _take(_context: Any, _counter: Any, _amount: Any) -> Any:
    """Add to a counter that threads share, and return what it was before."""
    generate = lambda _, builder, __, args: builder.atomic_rmw("add", args[0], args[1], "monotonic")  # noqa: E731
    return types.int64(types.CPointer(types.int64), types.int64), generate


def run_task(task: Any) -> None:
    """Dequantize blocks, a few at a time until none are left; several threads may run one task.

    Args:
        task: int64 [TASK_FIELDS]: number of blocks that threads have taken, addresses of the blocks and of the output,
            number of blocks, and number of blocks to take at a time.
    """
    fields = carray(task, TASK_FIELDS)
    count, step = fields[3], fields[4]
    while True:
        begin = _take(task, step)
        if begin >= count:
            break
        LOOP(fields[1] + begin * NBYTES, TO(fields[2] + begin * (NUMBERS * ITEM)), min(step, count - begin))


# What `run_task` uses; `build` gives each type its own.
LOOP, NBYTES, NUMBERS, ITEM, TO = print, 0, 0, 0, print
_OUTPUTS = {
    "float32": {"ITEM": 4, "TO": _pointer_to(types.float32, ir.FloatType())},
    "bfloat16": {"ITEM": 2, "TO": _pointer_to(types.uint16, ir.IntType(16))},
}


def build(name: str, loop: Any, nbytes: int, numbers: int, dtype: str, folder: str | None) -> Any:
    """Compile `run_task` for a type, or read it from the folder.

    Args:
        name: name of the type.
        loop: function of the address of blocks, a pointer to the output, and the number of blocks.
        nbytes: bytes of a block.
        numbers: values of a block.
        dtype: "float32" or "bfloat16".
        folder: folder of what was compiled before; None to keep nothing.

    Returns:
        numba's function; its `address` takes the address of a task.
    """
    own = globals() | {"LOOP": loop, "NBYTES": nbytes, "NUMBERS": numbers} | _OUTPUTS[dtype]
    task = FunctionType(run_task.__code__, own, f"run_task_{name}_{dtype}")
    task.__qualname__, task.__module__ = task.__name__, __name__
    before, config.CACHE_DIR = config.CACHE_DIR, folder or ""
    try:
        return cfunc(types.void(types.CPointer(types.int64)), cache=folder is not None)(task)
    finally:
        config.CACHE_DIR = before
