"""Choice of the fastest kernel for a matmul, measured once per installation.

Matmuls of one kind have the same format, matrix shape, dtype, device, and rows of x rounded up to a power of two. The
first matmul of a kind runs every kernel of the format, which takes no more memory than one kernel. The result is kept
in the cache folder, so later passes and runs use the same kernel. If the file is unreadable, kernels are measured
again. If no file can be written, the choice lasts as long as the process. With a single kernel, nothing is measured.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from specchat.files import atomic_write_text, read_regular
from specchat.models.quant.formats.base import RowCopy, WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.models.quant.kernels.matmul import processor
from specchat.paths import cache_folder

_VERSION = 3  # raise when measurements or specchat's kernels change
_LIBRARIES = ("torch", "bitsandbytes", "triton", "numba")
# Measuring all kinds of a model takes a few tenths of a second: within a round, kernel launches overlap.
_ROUNDS = 2
# With more rows, a copy for few rows is slower than dequantizing.
_COPY_ROWS = 32
_CALLS = 3
# On a CPU: least and most calls of each kernel, and seconds after which the least suffice.
_CPU_CALLS, _CPU_S = (4, 20), 0.1


@dataclass(frozen=True)
class KernelChoice:
    """The kernel of one kind of matmul.

    Attributes:
        product: kind of matmul: format, shape of the matrix, dtype, and maximum rows of x.
        way: fastest kernel, a name in `WeightFormat.kernels`.
        times_s: measured seconds by kernel.
    """

    product: str
    way: str
    times_s: Mapping[str, float]


class Autotuner:
    """The choices of one installation, measured on demand.

    Args:
        folder: folder that holds a file per device; it need not exist.

    Attributes:
        num_measured: number of kinds of matmuls measured so far. A pass in which it grows took longer than others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[torch.device, dict[str, KernelChoice]] = {}
        self._lock = Lock()
        self.num_measured = 0

    def linear(
        self,
        weight_format: WeightFormat,
        x: Tensor,
        segments: Segments,
        shape: tuple[int, int],
        scratch: Tensor,
        row_copy: RowCopy | None = None,
    ) -> Linear:
        """Return the fastest kernel for a matmul and all others of its kind.

        Args:
            weight_format: format of W.
            x: activations, as for `WeightFormat.linear`.
            segments: segments of W.
            shape: (rows, cols) of W.
            scratch: scratch memory, as for `WeightFormat.linear`.
            row_copy: copy of the matrix for few rows, if there is one; each matrix has its own, so callers keep the
                result for this matrix only.
        """
        num_rows = rows_class(x, shape)
        ways = weight_format.kernels(shape, num_rows, x.dtype, x.device)
        product = f"{weight_format} {shape[0]}x{shape[1]} {x.dtype} {num_rows} rows"
        if row_copy is not None and num_rows <= _COPY_ROWS:
            product += ", with a copy for rows"
            ways |= {"copy for rows": lambda x, segments, shape, scratch, bias: row_copy.linear(x, bias)}
        calls = {name: partial(way, x, segments, shape, scratch, None) for name, way in ways.items()}
        return ways[self.fastest(product, calls, x.device)]

    def fastest(self, product: str, calls: Mapping[str, Callable[[], object]], device: torch.device) -> str:
        """Return the name of the fastest way to compute a kind of matmul.

        Args:
            product: kind of matmul, with everything that its speed depends on.
            calls: functions that compute such a matmul, by name.
            device: device of the matmul.
        """
        if len(calls) == 1:
            return next(iter(calls))
        with self._lock:
            known = self._known_on(device)
            choice = known.get(product)
            if choice is None or choice.way not in calls:
                known[product] = choice = _measured(product, calls, device)
                self._save(device)
                self.num_measured += 1
        return choice.way

    def _known_on(self, device: torch.device) -> dict[str, KernelChoice]:
        if device not in self._known:
            self._known[device] = _read(self._file(device))
        return self._known[device]

    def _save(self, device: torch.device) -> None:
        """Merge the known choices into the file, which other programs may have changed."""
        file = self._file(device)
        choices = _read(file) | self._known[device]
        content = {"made_by": _makers(device), "choices": [asdict(choice) for choice in choices.values()]}
        with suppress(OSError):  # a read-only folder only costs the next run the time to measure
            atomic_write_text(file, json.dumps(content, indent=1))

    def _file(self, device: torch.device) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(_makers(device)).encode()).hexdigest()[:16]}.json"


@cache
def autotuner() -> Autotuner:
    """Return the autotuner of this process."""
    return Autotuner(cache_folder() / "ways")


def rows_class(x: Tensor, shape: tuple[int, int]) -> int:
    """Return the number of rows of x [..., cols], rounded up to a power of two."""
    return 1 << max(x.numel() // shape[1] - 1, 0).bit_length()


def _measured(product: str, calls: Mapping[str, Callable[[], object]], device: torch.device) -> KernelChoice:
    if device.type == "cpu":
        times_s = _least_times_s(calls)
    else:
        times_s = {name: _time_s(call, device) for name, call in calls.items()}
    return KernelChoice(product, min(times_s, key=times_s.__getitem__), times_s)


def _least_times_s(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least seconds of single calls on a CPU, in turn: other programs take the cores for milliseconds."""
    for call in calls.values():
        call()  # allocates memory
    least, spent_s = dict.fromkeys(calls, math.inf), 0.0
    for count in range(_CPU_CALLS[1]):
        if count >= _CPU_CALLS[0] and spent_s > _CPU_S:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            call_s = time.perf_counter() - begin
            least[name], spent_s = min(least[name], call_s), spent_s + call_s
    return least


def _time_s(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, without the first one, which may compile a kernel."""
    call()
    rounds_s = []
    for _ in range(_ROUNDS):
        _wait_for(device)
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        _wait_for(device)
        rounds_s.append(time.perf_counter() - begin)
    return min(rounds_s) / _CALLS


def _wait_for(device: torch.device) -> None:
    """Wait for the current stream; copies on other streams continue."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@cache
def _makers(device: torch.device) -> list[str]:
    """Return the facts that make saved choices outdated when they change: own version, device and libraries."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return [str(_VERSION), name, *(f"{library} {_version(library)}" for library in _LIBRARIES)]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _read(file: Path) -> dict[str, KernelChoice]:
    """Read the choices in a file; none if it is absent or damaged."""
    try:
        found = [
            KernelChoice(str(each["product"]), str(each["way"]), dict(each["times_s"]))
            for each in json.loads(read_regular(file))["choices"]
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {choice.product: choice for choice in found}
