"""Records of the machine: everything for reports, a few figures for the planner."""

from dataclasses import dataclass
from pathlib import Path

_REMOTE_FILESYSTEMS = frozenset({"9p", "cifs", "drvfs", "fuse.sshfs", "nfs", "nfs4", "smb3", "virtiofs"})


@dataclass(frozen=True)
class Machine:
    """The device and the memory that a plan can use now.

    Attributes:
        device: "cpu" or "cuda:0".
        device_free_bytes: free memory of the device; on the CPU equal to ram_available_bytes.
        ram_available_bytes: host memory that the system and the container still allow, without what this process will
            take for libraries.
        fast_bf16: whether the device multiplies bfloat16 faster than float32.
        total_bytes: memory of host and device together, used or free; constant for a machine.
        device_total_bytes: memory of the device, used or free; on the CPU equal to total_bytes.
        gpu_uuid: identifier of the GPU, as NVML writes it; None for the CPU, and where it is unknown.
        has_row_kernel: whether a CPU multiplies few rows of bfloat16 with 4-bit codes by a kernel of bitsandbytes.
        is_confined: whether a control group leaves less host memory than the system does.
        fused: precisions of matrices that a GPU multiplies with few rows as they are stored.
    """

    device: str
    device_free_bytes: int
    ram_available_bytes: int
    fast_bf16: bool
    total_bytes: int = 1 << 62
    device_total_bytes: int = 1 << 62
    gpu_uuid: str | None = None
    has_row_kernel: bool = False
    is_confined: bool = False
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class PcieLink:
    """A GPU's link to host memory; None where the driver does not report it (WSL, virtual GPUs).

    Attributes:
        gen, width: negotiated now; an idle link steps down to save power.
        max_gen, max_width: maximum of card and slot together.
    """

    gen: int | None = None
    width: int | None = None
    max_gen: int | None = None
    max_width: int | None = None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or one MIG instance of it, as the driver describes it.

    Attributes:
        compute_capability: version such as "8.9".
        is_mig: whether this is a MIG instance of a larger card.
    """

    name: str
    uuid: str
    vram_total_bytes: int
    vram_free_bytes: int
    compute_capability: str | None
    driver: str
    pcie: PcieLink
    is_mig: bool = False


@dataclass(frozen=True)
class Trouble:
    """A problem in words, and what to do about it."""

    text: str
    hint: str | None = None


@dataclass(frozen=True)
class GpuSurvey:
    """Facts that the NVIDIA driver reports about its GPUs.

    Attributes:
        gpus: GPUs that answered.
        cuda_version: newest CUDA version that the driver supports, such as (12, 4).
        troubles: reasons why facts are missing.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda_version: tuple[int, int] | None = None
    troubles: tuple[Trouble, ...] = ()


@dataclass(frozen=True)
class Cpu:
    """The processors this process may use.

    Attributes:
        isa: instruction sets that affect speed, by Linux's names.
    """

    name: str
    cores: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Ram:
    """Host memory.

    Attributes:
        available_bytes: free memory by the system or by the control group, whichever is less.
        cgroup_limit_bytes: memory limit of the container or session; None if there is no limit.
        pin_limit_bytes: memory that may be locked (RLIMIT_MEMLOCK); None if there is no limit.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    swap_bytes: int
    pin_limit_bytes: int | None


@dataclass(frozen=True)
class Disk:
    """The disk that holds packs and measured rates.

    Attributes:
        path: folder on the disk; it need not exist yet.
        filesystem: type of the file system by the system's name, such as "ext4"; "" if unknown.
    """

    path: Path
    free_bytes: int
    total_bytes: int
    filesystem: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether the files are on another machine, or on the host of this virtual machine."""
        return self.filesystem in _REMOTE_FILESYSTEMS


@dataclass(frozen=True)
class Platform:
    """The operating system.

    Attributes:
        wsl: whether this is Linux inside Windows, which limits memory and pinning.
    """

    system: str
    release: str
    python: str
    wsl: bool


@dataclass(frozen=True)
class TorchBuild:
    """The build of the installed torch, read without importing it.

    Attributes:
        cuda: CUDA version such as (13, 0); None for builds without CUDA.
        hip: whether the build is for AMD.
    """

    version: str
    cuda: tuple[int, int] | None
    hip: bool = False


@dataclass(frozen=True)
class Hardware:
    """Everything about the machine that needs no measuring."""

    survey: GpuSurvey
    cpu: Cpu
    ram: Ram
    disk: Disk
    platform: Platform
    torch: TorchBuild | None


@dataclass(frozen=True)
class Links:
    """Rates in bytes per second; None where there is no such link, or where it was not measured.

    Attributes:
        h2d_pinned_bytes_per_s, h2d_pageable_bytes_per_s: rates from pinned and from pageable host memory to the device.
        d2h_bytes_per_s: rate from device to pinned memory.
        ram_copy_bytes_per_s: copy rate of all cores together; each byte is read once and written once.
        disk_read_bytes_per_s: rate of the disk itself, without the page cache.
    """

    h2d_pinned_bytes_per_s: float | None = None
    h2d_pageable_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    ram_copy_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None


@dataclass(frozen=True)
class LinkRate:
    """Rate of pinned copies to one GPU while all others are copied to as well.

    Attributes:
        device: name of the GPU, "cuda:N".
        bytes_per_s: rate in bytes per second.
    """

    device: str
    bytes_per_s: float


@dataclass(frozen=True)
class MatmulRate:
    """Rate of a matmul with a matrix of a layer's size.

    Attributes:
        rows: number of activation rows, equal to the size of a tree.
        flop_per_s: operations per second; a multiplication and an addition count as two.
    """

    rows: int
    flop_per_s: float


@dataclass(frozen=True)
class Measured:
    """Rates and findings that took time to measure and are kept for the next report.

    Attributes:
        device: device that passes would run on.
        links: measured rates of memory, disk and GPU links.
        matmul: matmul rates of the device in `matmul_dtype`, by rows, with a matrix as a checkpoint stores it.
        packed: rates with a matrix that a CPU keeps packed or stored, whichever is faster; empty for GPUs.
        matmul_dtype: "bf16" or "fp32".
        gpu_uuid: identifier of the GPU; None for the CPU.
        pcie_under_load: generation and width of the GPU's link during copies; None where unknown.
        disk_is_cold: whether the disk's rate is free of cached bytes.
        pinning_works: whether host memory could be pinned for the copies; None where none were made.
        gpu_trouble: error that stopped the measurements on the GPU, or None.
        measured_at: time in ISO 8601, UTC.
        at_once: rates of the links of all GPUs at the same time; empty with less than two.
    """

    device: str
    links: Links
    matmul: tuple[MatmulRate, ...]
    packed: tuple[MatmulRate, ...]
    matmul_dtype: str
    gpu_uuid: str | None
    pcie_under_load: tuple[int, int] | None
    disk_is_cold: bool
    pinning_works: bool | None
    gpu_trouble: str | None
    measured_at: str
    at_once: tuple[LinkRate, ...] = ()
