"""Dequantization of blocks by functions that numba compiles, where it is installed (the extra `cpu`).

torch needs 10 to 20 passes over values in the cache for what one loop does. GB/s of blocks on one core of an AMD EPYC
(Zen 5), to bfloat16: Q4_K 4.8 instead of 1.1, Q6_K 5.6 and 1.4, Q8_0 9.9 and 3.9. Results have the same bits.

Functions are compiled in about 0.3 seconds each, once per installation: machine code is kept in the cache folder.
Threads are those of torch: they are started by the library of OpenMP that torch itself uses, without Python. Threads of
Python took 110 to 190 us for what these do in 95 and one alone in 180, and competed with those of torch for the cores.
"""

import ctypes
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from torch import Tensor

from specchat.models.checkpoint.ggml_types import BLOCK_TYPES
from specchat.paths import cache_folder

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_PIECE_NUMBERS = 1 << 14  # values that a thread dequantizes at a time
_SOURCES = (
    "formats/ggml_numba.py",
    "formats/ggml_blocks.py",
    "formats/ggml_codebooks.py",
    "kernels/numba_lanes.py",
    "kernels/numba_tasks.py",
    "../checkpoint/ggml_types.py",
)

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_compiled: dict[tuple[str, torch.dtype], int | None] = {}
_kept: list[object] = []  # numba's functions, which own the machine code
_lock = Lock()


def fill(kind: str, rows: Tensor, out: Tensor) -> bool:
    """Dequantize rows of blocks and return True; return False where torch has to.

    Args:
        kind: ggml's name of the type.
        rows: rows of blocks, uint8 [n, bytes per row], in host memory.
        out: memory [n, cols] in the host; loops fill only contiguous memory.
    """
    address = _address_of(kind, out.dtype) if out.is_contiguous() else None
    if address is None:
        return False
    threads = torch.get_num_threads()
    start = _openmp()
    if threads > 1 and start is None:
        return False
    block, rows = BLOCK_TYPES[kind], rows.contiguous()
    count, step = rows.numel() // block.nbytes, _PIECE_NUMBERS // block.numbers
    task = (ctypes.c_int64 * 5)(0, rows.data_ptr(), out.data_ptr(), count, step)
    if start is None or threads == 1 or count <= step:
        _FUNCTION(address)(ctypes.addressof(task))
    else:
        start(address, ctypes.addressof(task), min(threads, -(-count // step)), 0)
    return True


def prepare(kinds: Iterable[str], dtype: torch.dtype) -> None:
    """Compile the functions for some types, or read them from the cache, before they are needed."""
    for kind in kinds:
        _address_of(kind, dtype)


def _address_of(kind: str, dtype: torch.dtype) -> int | None:
    """Return the address of the compiled function for a type and an output; None where there is none."""
    key = kind, dtype
    if key not in _compiled:
        with _lock:
            if key not in _compiled:
                _compiled[key] = _compile(kind, dtype)
    return _compiled[key]


def _compile(kind: str, dtype: torch.dtype) -> int | None:
    if dtype not in _DTYPES or (numba := _numba()) is None:
        return None
    blocks, tasks, errors = numba
    if kind not in blocks.LOOPS:
        return None
    block = BLOCK_TYPES[kind]
    for folder in dict.fromkeys((_own_folder(), None)):  # what the folder holds may be damaged
        try:
            function = tasks.build(kind, blocks.LOOPS[kind], block.nbytes, block.numbers, _DTYPES[dtype], folder)
        except errors as error:
            if folder is None:
                warnings.warn(f"numba fails, so torch dequantizes {kind}: {error}", RuntimeWarning, stacklevel=2)
        except Exception:  # damaged files of the folder may raise anything when they are read
            if folder is None:
                raise
        else:
            _kept.append(function)
            return int(function.address)
    return None


@cache
def _numba() -> tuple[ModuleType, ModuleType, tuple[type[Exception], ...]] | None:
    """Return our modules that import numba, and the errors of compiling; None where numba cannot be used."""
    try:
        from numba import config
        from numba.core.errors import NumbaError

        from specchat.models.quant.formats import ggml_numba
        from specchat.models.quant.kernels import numba_tasks
    except ImportError:  # not installed, or not for this version of numpy
        return None
    if config.DISABLE_JIT:
        return None
    return ggml_numba, numba_tasks, (NumbaError, RuntimeError, OSError, ValueError, EOFError, pickle.PickleError)


def _own_folder() -> str | None:
    """Return `_folder` if it exists or can be made, and nobody else may write to it: what it holds is executed."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    return str(folder) if found.st_uid == os.getuid() and not found.st_mode & 0o022 else None


@cache
def _folder() -> Path:
    """Return the folder of machine code from the modules as they are, within NUMBA_CACHE_DIR if that is set."""
    from numba import config

    sources = b"".join((Path(__file__).parents[1] / name).read_bytes() for name in _SOURCES)
    folder = Path(config.CACHE_DIR) if config.CACHE_DIR else cache_folder() / "compiled"
    return folder / hashlib.sha256(sources).hexdigest()[:16]


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Return the function that runs another one in threads of torch's OpenMP; None with another library of threads."""
    try:
        start = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start
