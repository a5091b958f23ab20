"""Rates of this machine as plain data: measured if a report exists, else typical of this kind of machine.

Nothing is measured here. Typical figures come from data sheets and from our own measurements on machines of that kind.
For an unknown kind of machine they are guesses on the slow side. Every rate names its basis.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from specchat.hardware.machine import Gpu, Hardware, Machine, MatmulRate, Measured
from specchat.records.limits import MATMUL_ROWS
from specchat.records.model import DTYPE_BYTES, Dtype
from specchat.units import GIB

# Origins of a figure, the most certain first.
Basis = Literal["measured", "typical", "guessed"]
BASES: tuple[Basis, ...] = ("measured", "typical", "guessed")

# Rate of a pinned copy over one lane of PCIe generation 3; every generation doubles it.
_GEN3_LANE_BYTES_PER_S = 0.8e9
_UNKNOWN_PCIE = (3, 16)  # at least half of the cards in use have this or more
# The driver copies pageable memory through its own buffers: one more copy, on one processor core.
_PAGEABLE_SHARE, _PAGEABLE_MOST = 0.5, 6e9
_READS_PER_COPY = 2  # bytes that host memory delivers in the time of a copied byte, which is read and written
_NVME_BYTES_PER_S = 2.5e9  # PCIe 3 x4 drives in large chunks
_REMOTE_BYTES_PER_S = 2e8

# Rates by compute capability: bytes/s and flop/s (16 bits, float32 sums) per GiB of memory, from data sheets (RTX 2080;
# 3060 and 3090; 4060 and 4090; 5070 and 5080; A100; H100). Larger cards are faster in both. Cards of 8.9 have 5.5 to
# 9.8 Tflop/s per GiB, a 4090 6.9.
_GPU_PER_GIB: dict[str, tuple[float, float]] = {
    "7.5": (50e9, 5e12),
    "8.0": (39e9, 7.8e12),
    "8.6": (34e9, 2.5e12),
    "8.9": (38e9, 7e12),
    "9.0": (40e9, 9e12),
    "12.0": (56e9, 6e12),
}
_UNKNOWN_GPU_PER_GIB = (30e9, 2.5e12)
_LARGEST_GPU_BYTES = 192 * GIB
# Shares of these figures that real kernels reach.
_MEMORY_SHARE, _COMPUTE_SHARE = 0.8, 0.5

# flop/s of a processor core by its widest instruction set, for 16-bit weights and for float32.
_CORE_BF16 = {"amx_bf16": 4e11, "avx512_bf16": 2e11, "bf16": 6e10}
_CORE_FP32 = {"avx512f": 7e10, "avx2": 4e10, "sve": 3e10, "asimd": 2.5e10}
_UNKNOWN_CORE = 1e10
# Memory rate of one core, and the limit for all cores together: two channels of DDR4.
_CORE_BYTES_PER_S, _CPU_BYTES_PER_S = 12e9, 36e9

# Fixed cost of a layer: Python, and the launch of a few dozen kernels. Measured on one thread, as on a GPU's host: 16
# layers of HF's Llama take 2.3 ms at 1 row, a layer here takes 0.13 ms.
_LAYER_S = 150e-6
# Fixed cost of a layer on a CPU. Kernels run on the same cores, and most of them take less time than waking and joining
# the other threads. Measured with 2 threads (tests/benchmarks/layer_times.py): 0.51 to 0.9 ms besides the matmuls, for
# layers of 0.7, 14 and 55 million weights, at 1 to 16 rows.
_CPU_LAYER_S = 650e-6
# Core seconds to dequantize a weight on a CPU; measured on 2 cores (an 11008 x 4096 matrix: 7 and 2.8 ms).
# int3 takes 0.58 ns on one core of a busy machine (tests/benchmarks/block_speed.py), int8 0.13 to 0.29, int4 0.15.
_DEQUANTIZE_CORE_S = {"int8": 3.1e-10, "int4": 1.2e-10, "int3": 5.8e-10}
# Bytes of a stored weight, by precision.
_STORED_BYTES = {"int8": 1.0, "int4": 0.5, "int3": 0.41}
# Share of the memory rate that a GPU's kernels reach that scale codes while they multiply. Not measured: those of large
# matmuls reach `_MEMORY_SHARE` of the data sheet's rate.
_FUSED_SHARE = 0.75
# Core seconds for a weight, and for a weight and a row, of bitsandbytes' kernel for few rows with 4-bit codes; measured
# on one core (Zen 4, a 7168 x 2048 matrix: 0.52 ms at 1 row, 0.92 at 4, 3.3 at 16).
_COPY_CORE_S = (2.4e-11, 1.3e-11)

# Core seconds to read a byte from the disk and to check it, which a CPU loses beside computing. Measured on 2 cores
# with 9 layers of 109 MB, at 1 to 128 rows.
_READING_CORE_S = 1.1e-10


@dataclass(frozen=True)
class Rate:
    """A rate per second, and its basis."""

    per_s: float
    basis: Basis


@dataclass(frozen=True)
class Rates:
    """Rates of a machine that predictions are based on.

    Attributes:
        disk: bytes/s read from the disk, past the page cache.
        ram: bytes/s copied within host memory.
        pinned: bytes/s from pinned host memory to the device; None if memory cannot be pinned.
        pageable: bytes/s from pageable host memory to the device.
        memory: bytes/s that the device reads from its own memory.
        matmul: matmul rates of the device in `matmul_dtype`, by ascending rows, with matrices as they are stored.
        matmul_dtype: dtype of the matmul rates.
        compute_basis: origin of the matmul rates.
        dequantize_s: typical seconds to dequantize one weight, by stored precision.
        layer_s: fixed seconds of a layer, independent of its size.
        copy_s: typical seconds per weight, and per weight and row, of a CPU's kernel for few rows with 4-bit codes.
        reading_s: typical seconds that a CPU loses to each byte of the disk that it reads beside computing.
        has_row_kernel: whether the CPU has this kernel.
        packed: matmul rates with matrices that a CPU's resident layers keep packed; empty where they are as stored.
        fused_s: seconds per weight, by stored precision, in which a GPU multiplies few rows with codes; empty where it
            dequantizes.
    """

    disk: Rate
    ram: Rate
    pinned: Rate | None
    pageable: Rate
    memory: Rate
    matmul: tuple[MatmulRate, ...]
    matmul_dtype: Dtype
    compute_basis: Basis
    dequantize_s: dict[str, float]
    layer_s: float = _LAYER_S
    copy_s: tuple[float, float] = _COPY_CORE_S
    reading_s: float = _READING_CORE_S
    has_row_kernel: bool = False
    packed: tuple[MatmulRate, ...] = ()
    fused_s: dict[str, float] = field(default_factory=dict)

    def __hash__(self) -> int:  # key of caches during a search
        return hash((self.disk.per_s, self.memory.per_s, self.host.per_s, self.layer_s))

    @property
    def host(self) -> Rate:
        """Rate from host memory to the device: pinned if possible."""
        return self.pageable if self.pinned is None else self.pinned


def least_sure(bases: Iterable[Basis]) -> Basis:
    """Return the least certain basis; "measured" for none."""
    return max(bases, key=BASES.index, default="measured")


def rates_of(hardware: Hardware, machine: Machine, measured: Measured | None = None) -> Rates:
    """Return the rates of a machine for one device, with measured rates where there are any.

    Args:
        hardware: description of the machine.
        machine: device that passes run on, and its memory.
        measured: measurements of a report with the same device, or None.
    """
    typical = _cpu(hardware, machine) if machine.device == "cpu" else _gpu(hardware, machine)
    return typical if measured is None else _with_measured(typical, measured)


def _with_measured(typical: Rates, measured: Measured) -> Rates:
    links = measured.links
    pinned = _measured(links.h2d_pinned_bytes_per_s, typical.pinned)
    matmul = _by_rows(measured.matmul) or typical.matmul
    is_measured = bool(measured.matmul)
    dtype: Dtype = ("bf16" if measured.matmul_dtype == "bf16" else "fp32") if is_measured else typical.matmul_dtype
    return Rates(
        disk=_measured(links.disk_read_bytes_per_s, typical.disk) or typical.disk,
        ram=_measured(links.ram_copy_bytes_per_s, typical.ram) or typical.ram,
        pinned=None if measured.pinning_works is False else pinned,
        pageable=_measured(links.h2d_pageable_bytes_per_s, typical.pageable) or typical.pageable,
        memory=typical.memory,
        matmul=matmul,
        matmul_dtype=dtype,
        compute_basis="measured" if is_measured else typical.compute_basis,
        dequantize_s=typical.dequantize_s,
        layer_s=typical.layer_s,
        copy_s=typical.copy_s,
        reading_s=typical.reading_s,
        has_row_kernel=typical.has_row_kernel,
        packed=_by_rows(measured.packed),
        fused_s=_measured_fused_s(typical, matmul, dtype) if is_measured else typical.fused_s,
    )


def _measured_fused_s(typical: Rates, matmul: tuple[MatmulRate, ...], dtype: Dtype) -> dict[str, float]:
    """Return `Rates.fused_s` by the rate at which the device read a plain matrix for a single row."""
    if matmul[0].rows > 1:
        return typical.fused_s
    per_s = matmul[0].flop_per_s / 2 * DTYPE_BYTES[dtype]
    return {quant: seconds * typical.memory.per_s / per_s for quant, seconds in typical.fused_s.items()}


def at_once(rates: Sequence[Rates], measured: Sequence[float | None]) -> list[Rates]:
    """Return the rates of several devices while the links of all of them are in use.

    Links that were not measured at the same time share what host memory can be read with: about twice the rate of
    copies within it, which read and write each byte.

    Args:
        rates: rates of each device alone.
        measured: measured rate of each device's link while all are in use; None where that is unknown.
    """
    pairs = zip(rates, measured, strict=True)
    found = [each if rate is None else replace(each, pinned=Rate(rate, "measured")) for each, rate in pairs]
    if all(rate is not None for rate in measured):
        return found
    total = sum(each.host.per_s for each in found)
    share = min(1.0, _READS_PER_COPY * max(each.ram.per_s for each in found) / total)
    return [_with_links(each, share) for each in found]


def _with_links(rates: Rates, share: float) -> Rates:
    pinned = None if rates.pinned is None else replace(rates.pinned, per_s=share * rates.pinned.per_s)
    return replace(rates, pinned=pinned, pageable=replace(rates.pageable, per_s=share * rates.pageable.per_s))


def _by_rows(rates: tuple[MatmulRate, ...]) -> tuple[MatmulRate, ...]:
    """Return measured rates by rows, none below the rate of fewer rows, as which many rows can be computed."""
    # Lower rates were measured while other programs ran. A probe on a busy machine found 272 GFLOP/s at 64 rows and 106
    # at 256: all trees beyond 64 nodes looked three times as slow as they are.
    ordered = sorted(rates, key=lambda rate: rate.rows)
    best = accumulate((rate.flop_per_s for rate in ordered), max)
    return tuple(MatmulRate(rate.rows, per_s) for rate, per_s in zip(ordered, best, strict=True))


def _measured(per_s: float | None, otherwise: Rate | None) -> Rate | None:
    return Rate(per_s, "measured") if per_s else otherwise


def _disk(hardware: Hardware) -> Rate:
    if hardware.disk.is_remote:
        return Rate(_REMOTE_BYTES_PER_S, "guessed")
    return Rate(_NVME_BYTES_PER_S, "guessed")


def _cpu(hardware: Hardware, machine: Machine) -> Rates:
    cores, isa = max(hardware.cpu.cores, 1), hardware.cpu.isa
    dtype: Dtype = "bf16" if machine.fast_bf16 else "fp32"
    kinds = _CORE_BF16 if machine.fast_bf16 else _CORE_FP32
    per_core = next((rate for name, rate in kinds.items() if name in isa), None)
    basis: Basis = "guessed" if per_core is None else "typical"
    memory = min(cores * _CORE_BYTES_PER_S, _CPU_BYTES_PER_S)
    return Rates(
        disk=_disk(hardware),
        ram=Rate(memory / 2, basis),
        pinned=None,
        pageable=Rate(memory / 2, basis),
        memory=Rate(memory, basis),
        matmul=_roofline(memory, cores * (per_core or _UNKNOWN_CORE), dtype),
        matmul_dtype=dtype,
        compute_basis=basis,
        dequantize_s={quant: seconds / cores for quant, seconds in _DEQUANTIZE_CORE_S.items()},
        layer_s=_CPU_LAYER_S,
        copy_s=(_COPY_CORE_S[0] / cores, _COPY_CORE_S[1] / cores),
        reading_s=_READING_CORE_S / cores,
        has_row_kernel=machine.has_row_kernel,
    )


def _gpu(hardware: Hardware, machine: Machine) -> Rates:
    gpu = _gpu_of(hardware, machine)
    per_gib = None if gpu is None or gpu.compute_capability is None else _GPU_PER_GIB.get(gpu.compute_capability)
    basis: Basis = "guessed" if per_gib is None else "typical"
    size = min(machine.device_total_bytes if gpu is None else gpu.vram_total_bytes, _LARGEST_GPU_BYTES) / GIB
    bytes_per_gib, flop_per_gib = per_gib or _UNKNOWN_GPU_PER_GIB
    memory = max(size, 1.0) * bytes_per_gib * _MEMORY_SHARE
    host = _pcie(gpu)
    ram = min(max(hardware.cpu.cores, 1) * _CORE_BYTES_PER_S, _CPU_BYTES_PER_S) / 2
    dtype: Dtype = "bf16"  # stands for fp16 too: where bf16 is slow, plans use fp16 at this rate
    return Rates(
        disk=_disk(hardware),
        ram=Rate(ram, "guessed"),
        pinned=host,
        pageable=Rate(min(_PAGEABLE_SHARE * host.per_s, _PAGEABLE_MOST), host.basis),
        memory=Rate(memory, basis),
        matmul=_roofline(memory, max(size, 1.0) * flop_per_gib * _COMPUTE_SHARE, dtype),
        matmul_dtype=dtype,
        compute_basis=basis,
        # Dequantizing reads stored weights and writes them at full width; the matmul reads them as unquantized ones.
        dequantize_s={quant: (stored + DTYPE_BYTES[dtype]) / memory for quant, stored in _STORED_BYTES.items()},
        fused_s={quant: _STORED_BYTES[quant] / (_FUSED_SHARE * memory) for quant in machine.fused},
    )


def _gpu_of(hardware: Hardware, machine: Machine) -> Gpu | None:
    """Return the device's description; by number only if no identifier matches, as for MIG instances."""
    gpus, index = hardware.survey.gpus, int(machine.device.partition(":")[2] or 0)
    by_uuid = next((gpu for gpu in gpus if gpu.uuid == machine.gpu_uuid), None)
    return by_uuid or (gpus[index] if index < len(gpus) else None)


def _pcie(gpu: Gpu | None) -> Rate:
    """Return the rate of the PCIe slot at its maximum; an idle link reports a lower current generation."""
    link = None if gpu is None else gpu.pcie
    gen = None if link is None else link.max_gen or link.gen
    width = None if link is None else link.max_width or link.width
    if gen is None or width is None:
        gen, width = _UNKNOWN_PCIE
        return Rate(_GEN3_LANE_BYTES_PER_S * 2.0 ** (gen - 3) * width, "guessed")
    return Rate(_GEN3_LANE_BYTES_PER_S * 2.0 ** (gen - 3) * width, "typical")


def _roofline(bytes_per_s: float, flop_per_s: float, dtype: Dtype) -> tuple[MatmulRate, ...]:
    """Return matmul rates for a large matrix: bound by memory for few rows, by arithmetic for many."""
    return tuple(
        MatmulRate(rows, 2 * rows / max(DTYPE_BYTES[dtype] / bytes_per_s, 2 * rows / flop_per_s))
        for rows in MATMUL_ROWS
    )
