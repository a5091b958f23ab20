"""Choice of the fastest kernel for a matmul with a quantized matrix, measured once per installation.

Matmuls of one kind have the same format, matrix shape, dtype, device, and rows of x rounded up to a power of two. The
first matmul of a kind runs every kernel of the format, which takes no more memory than one kernel. The result is kept
in the cache folder, so later passes and runs use the same kernel. If the file is unreadable, kernels are measured
again. If no file can be written, the choice lasts as long as the process. With a single kernel, as on every CPU,
nothing is measured.
"""

import hashlib
import json
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
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.kernels.chunked import Linear, Segments
from specchat.paths import cache_folder

_VERSION = 1  # raise when measurements or specchat's kernels change
_LIBRARIES = ("torch", "bitsandbytes", "triton")
# Measuring all kinds of a model takes a few tenths of a second: within a round, kernel launches overlap.
_ROUNDS = 2
_CALLS = 3


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
        self, weight_format: WeightFormat, x: Tensor, segments: Segments, shape: tuple[int, int], scratch: Tensor
    ) -> Linear:
        """Return the fastest kernel for a matmul and all others of its kind; arguments as in `WeightFormat.linear`."""
        num_rows = rows_class(x, shape)
        ways = weight_format.kernels(shape, num_rows, x.dtype, x.device)
        if len(ways) == 1:
            return next(iter(ways.values()))
        product = f"{weight_format} {shape[0]}x{shape[1]} {x.dtype} {num_rows} rows"
        with self._lock:
            known = self._known_on(x.device)
            choice = known.get(product)
            if choice is None or choice.way not in ways:
                calls = {name: partial(way, x, segments, shape, scratch, None) for name, way in ways.items()}
                known[product] = choice = _measured(product, calls, x.device)
                self._save(x.device)
                self.num_measured += 1
        return ways[choice.way]

    def _known_on(self, device: torch.device) -> dict[str, KernelChoice]:
        if device not in self._known:
            self._known[device] = _read(self._file(device))
        return self._known[device]

    def _save(self, device: torch.device) -> None:
        """Merge the known choices into the file, which other programs may have changed."""
        file = self._file(device)
        choices = _read(file) | self._known[device]
        content = {"made_by": _makers(device), "choices": [asdict(choice) for choice in choices.values()]}
        with suppress(OSError):
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


def _measured(product: str, calls: Mapping[str, Callable[[], Tensor]], device: torch.device) -> KernelChoice:
    times_s = {name: _time_s(call, device) for name, call in calls.items()}
    return KernelChoice(product, min(times_s, key=times_s.__getitem__), times_s)


def _time_s(call: Callable[[], Tensor], device: torch.device) -> float:
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
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
