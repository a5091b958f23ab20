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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from specchat.engine.attention import tree_attention
from specchat.engine.kv_cache import TreeCache
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Noise
from specchat.engine.streaming.base import NoStreamer
from specchat.engine.streaming.slots import page_aligned
from specchat.models.hf.skeleton import build_random
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.int8 import Int8
from specchat.models.quant.formats.nf4 import Bnb4
from specchat.models.quant.kernels.chunked import scratch_bytes
from specchat.records.model import KvShape
from specchat.units import MIB

DEVICE = torch.device("cuda:0")
Fact = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        divisor: what sizes are divided by; a rehearsal without a GPU has a large one.
        calls: number of timed calls.
    """

    divisor: int = 1
    calls: int = 20

    def of(self, size: int) -> int:
        return max(size // self.divisor, 64)


def device_ms(call: Callable[[], Any], calls: int, warm_ups: int = 2) -> float:
    """Milliseconds of a call on the device."""
    for _ in range(warm_ups):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(DEVICE)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / calls, 4)


def host_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds that the host takes to queue a call."""
    call()
    torch.cuda.synchronize(DEVICE)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    spent_s = time.perf_counter() - begin
    torch.cuda.synchronize(DEVICE)
    return round(spent_s / calls * 1e6, 2)


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
    kinds = {"idle": None, "one copy": (len(blob), False), "32 MiB and kernels": (32 * MIB, True)}
    for name, trunks in kinds.items():
        for what, call in (
            ("to the device", lambda: there.copy_(little)),
            ("to the host", there.cpu),
            ("a list", lambda: torch.tensor([5], device=DEVICE)),
        ):
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


def formats(scale: Scale) -> Fact:
    """Milliseconds of a quantized matmul of 28,672 x 8,192, by format, kernel and rows of x."""
    shape, found = (scale.of(28672), scale.of(8192)), {}
    for quantized in (Bnb4(), Int8(), Affine(4, 128, torch.float16, zeros=True)):
        segments = {
            each.name: torch.ones(each.shape, device=DEVICE, dtype=each.dtype) for each in quantized.segments(*shape)
        }
        scratch = torch.empty(scratch_bytes(shape, torch.bfloat16, DEVICE), dtype=torch.uint8, device=DEVICE)
        for rows in (1, 16, 64, 256):
            x = torch.randn(1, rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
            for name, kernel in quantized.kernels(shape, rows, x.dtype, x.device).items():
                ms = device_ms(partial(kernel, x, segments, shape, scratch, None), 5)
                found[f"{quantized.name} {name} {rows}"] = ms
    return found


def draft(scale: Scale) -> Fact:
    """A draft model of 1.2 billion weights: milliseconds of host and device for a pass, and of weighing its scores."""
    import transformers as hf

    vocab = scale.of(128256)
    config = hf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=scale.of(2048),
        intermediate_size=scale.of(8192),
        num_hidden_layers=max(16 // scale.divisor, 2),
        num_attention_heads=max(32 // scale.divisor, 2),
        num_key_value_heads=max(8 // scale.divisor, 1),
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    skeleton, _ = build_random(config, torch.Generator(), tree_attention)
    skeleton.model.to(DEVICE, torch.bfloat16)
    size = config.hidden_size // config.num_attention_heads
    shapes = (KvShape(config.num_key_value_heads, size, size),) * config.num_hidden_layers
    cache = TreeCache(shapes, 1024, torch.bfloat16, DEVICE)
    model, found = TreeModel(skeleton, cache, NoStreamer(), (), 512, DEVICE), Fact()
    model.append([5] * 500)
    for rows in (1, 8, 32):
        layout = RowLayout(500, 0, torch.eye(rows, dtype=torch.bool), torch.full((rows,), 501))

        def run(rows: int = rows, layout: RowLayout = layout) -> None:
            cache.truncate(0, 500)
            model.logits(model.forward([7] * rows, PassLayout.single(layout)))

        found[f"host ms, {rows} rows"] = round(host_us(run, scale.calls) / 1e3, 3)
        found[f"device ms, {rows} rows"] = device_ms(run, scale.calls)
        scores = torch.randn(rows, vocab, device=DEVICE)
        found[f"weighing ms, {rows} rows"] = device_ms(lambda s=scores: torch.log_softmax(s, -1).topk(16), scale.calls)
    noise, positions = Noise(1, vocab, DEVICE), iter(range(10**9))
    found["noise row ms"] = device_ms(lambda: noise.row(next(positions)), scale.calls)
    return found


FACTS = (machine, link, small_copies, overheads, graph, attention, matmuls, formats, draft)


def measure(scale: Scale) -> dict[str, Fact | str]:
    """Measure all facts; a fact that fails is the text of its error."""
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
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(Scale()), indent=1))
