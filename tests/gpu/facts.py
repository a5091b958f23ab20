"""Facts about a GPU that decide how specchat's CUDA paths should be: rates, overheads, kernels. About two minutes.

    PYTHONPATH=.:tests python -m gpu.facts FACTS.json

Each fact is measured by itself and printed at once; one that fails is written down as failed.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from gpu.kernels import draft, experts, few_rows, formats, gguf
from gpu.timing import DEVICE, Fact, Scale, device_ms, host_us
from torch.nn import functional as F

from specchat.engine.streaming.slots import page_aligned
from specchat.units import MIB


def machine(_: Scale) -> Fact:
    major, minor = torch.cuda.get_device_capability(DEVICE)
    name, free = torch.cuda.get_device_name(DEVICE), torch.cuda.mem_get_info(DEVICE)[0]
    return {"name": name, "capability": f"{major}.{minor}", "torch": torch.__version__, "free_bytes": free}


def registered(nbytes: int) -> tuple[torch.Tensor, int, float]:
    """Memory that CUDA has registered, its error, and the seconds that it took."""
    memory = page_aligned(nbytes)
    begin = time.perf_counter()
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
    return memory, error, time.perf_counter() - begin


def link(scale: Scale) -> Fact:
    """GB/s from pinned memory by size in MiB, and from pageable memory."""
    most = scale.of(1024 * MIB)
    blob, error, seconds = registered(most)
    slot = torch.empty(most, dtype=torch.uint8, device=DEVICE)
    found: Fact = {"register_gb_per_s": round(most / seconds / 1e9, 2), "register_error": error}
    for mib in (4, 32, 256, 1024):
        nbytes = scale.of(mib * MIB)
        ms = device_ms(lambda n=nbytes: slot[:n].copy_(blob[:n], non_blocking=True), 6)
        found[f"pinned {mib} MiB"] = round(nbytes / ms / 1e6, 2)
    pageable = torch.zeros(scale.of(256 * MIB), dtype=torch.uint8)
    found["pageable 256 MiB"] = round(
        pageable.nbytes / device_ms(lambda: slot[: len(pageable)].copy_(pageable), 3) / 1e6, 2
    )
    torch.cuda.cudart().cudaHostUnregister(blob.data_ptr())
    return found


def small_copies(scale: Scale) -> Fact:
    """Milliseconds of a small copy while large ones are on their way on another stream, whole or in trunks."""
    blob, _, _ = registered(scale.of(1024 * MIB))
    slot, side = torch.empty(len(blob), dtype=torch.uint8, device=DEVICE), torch.cuda.Stream(DEVICE)
    little, there = torch.zeros(4096, dtype=torch.uint8), torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    number = torch.zeros(1, device=DEVICE)

    def queue(trunk: int, *, kernels: bool) -> None:
        with torch.cuda.stream(side):
            for begin in range(0, len(blob), trunk):
                slot[begin : begin + trunk].copy_(blob[begin : begin + trunk], non_blocking=True)
                if kernels:
                    number.add_(1)

    found: Fact = {}
    calls = {
        "to the device": lambda: there.copy_(little),
        "to the host": there.cpu,
        "a list": lambda: torch.tensor([5], device=DEVICE),
    }
    if (read := _reader(found)) is not None:
        pinned = little.pin_memory()
        calls["read by a kernel"] = lambda: read(pinned, there)
        calls["read by a kernel"]()  # compiles
    kinds = {"idle": None, "one copy": (len(blob), False), "32 MiB and kernels": (32 * MIB, True)}
    for name, trunks in kinds.items():
        for what, call in calls.items():
            torch.cuda.synchronize(DEVICE)
            if trunks is not None:
                queue(min(trunks[0], len(blob)), kernels=trunks[1])
            begin = time.perf_counter()
            call()
            torch.cuda.current_stream(DEVICE).synchronize()
            found[f"{what}, {name}"] = round((time.perf_counter() - begin) * 1e3, 3)
    torch.cuda.synchronize(DEVICE)
    torch.cuda.cudart().cudaHostUnregister(blob.data_ptr())
    return found


def _reader(found: Fact) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """A kernel that reads pinned memory, if Triton can be used."""
    try:
        from gpu.pinned_read import read

        read(torch.zeros(16, dtype=torch.uint8).pin_memory(), torch.zeros(16, dtype=torch.uint8, device=DEVICE))
    except Exception as error:  # noqa: BLE001  the other copies are worth having
        found["read by a kernel"] = f"failed: {str(error).strip()[:120]}"
        return None
    return read


def overheads(scale: Scale) -> Fact:
    """Microseconds of the host by kind of call."""
    x, calls = torch.ones(64, device=DEVICE), 100 * scale.calls
    return {
        "kernel": host_us(lambda: x.add_(1), calls),
        "view": host_us(lambda: x.view(8, 8), calls),
        "item": host_us(x[0].item, scale.calls),
    }


def graph(scale: Scale) -> Fact:
    """Microseconds of a kernel within a CUDA graph."""
    x, captured = torch.ones(64, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(500):
            x.add_(1)
    return {"kernel": round(device_ms(captured.replay, scale.calls) * 1e3 / 500, 3)}


def attention(scale: Scale) -> Fact:
    """Milliseconds of the engine's attention by backend: first call of a shape, same shape, more keys, more keys."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(rows: int, keys: int) -> float:
        q = torch.randn(8, 8, rows, 128, device=DEVICE, dtype=torch.bfloat16)
        k = torch.randn(8, keys, 128, device=DEVICE, dtype=torch.bfloat16)[:, None].expand(-1, 8, -1, -1)
        mask = torch.zeros(1, 1, rows, keys, device=DEVICE, dtype=torch.bfloat16).expand(8, 8, -1, -1)
        torch.cuda.synchronize(DEVICE)
        begin = time.perf_counter()
        F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
        torch.cuda.synchronize(DEVICE)
        return round((time.perf_counter() - begin) * 1e3, 3)

    shapes = ((65, 512), (65, 512), (65, 528), (257, 4096), (257, 4112), (1, 8192))
    found: Fact = {}
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel([backend]):
                found[backend.name] = [call(rows, scale.of(keys)) for rows, keys in shapes]
        except RuntimeError as error:
            found[backend.name] = str(error).splitlines()[0]
    return found


def matmuls(scale: Scale) -> Fact:
    """Milliseconds per 1,000 rows of a matrix, by its number of rows: whole blocks of 64 or not."""
    cols = scale.of(28672)
    x, found = torch.randn(257, cols, device=DEVICE, dtype=torch.bfloat16), {}
    for rows in (2340, 2304, 8192):
        weight = torch.randn(scale.of(rows), cols, device=DEVICE, dtype=torch.bfloat16)
        found[str(rows)] = round(device_ms(lambda w=weight: F.linear(x, w), scale.calls) / rows * 1e3, 4)
    return found


FACTS = (machine, link, small_copies, overheads, graph, few_rows, draft, formats, attention, experts, gguf, matmuls)


def measure(scale: Scale, file: Path | None = None) -> dict[str, Fact | str]:
    """Measure all facts; a fact that fails is the text of its error.

    Args:
        scale: how much is measured.
        file: file that is written after every fact, so that a stop loses none.
    """
    found: dict[str, Fact | str] = {}
    for fact in FACTS:
        begin = time.perf_counter()
        try:
            found[fact.__name__] = fact(scale)
        except Exception as error:  # noqa: BLE001  the other facts are worth having
            traceback.print_exc(limit=-2)
            found[fact.__name__] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        seconds = time.perf_counter() - begin
        print(f"{fact.__name__} ({seconds:.1f} s): {json.dumps(found[fact.__name__])}", flush=True)
        if file is not None:
            file.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    measure(Scale(), Path(sys.argv[1]))
