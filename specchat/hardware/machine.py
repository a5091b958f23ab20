"""What the machine has, as plain data: for reports in full, for the planner in four figures."""

from dataclasses import dataclass
from pathlib import Path

_REMOTE_FILESYSTEMS = frozenset({"9p", "cifs", "drvfs", "fuse.sshfs", "nfs", "nfs4", "smb3", "virtiofs"})


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know: memory that can be used now.

    Attributes:
        device: "cpu" or "cuda:0".
        device_free_bytes: memory of that device; on the CPU the same as ram_available_bytes.
        ram_available_bytes: what the system or the container still gives.
        fast_bf16: whether the device multiplies bfloat16 faster than float32.
        total_bytes: memory of host and device together, used or not; a number that stays the same.
        device_total_bytes: likewise of the device alone; on the CPU the same as total_bytes.
    """

    device: str
    device_free_bytes: int
    ram_available_bytes: int
    fast_bf16: bool
    total_bytes: int = 1 << 62
    device_total_bytes: int = 1 << 62


@dataclass(frozen=True)
class PcieLink:
    """A GPU's way to host memory; None where the driver does not say (WSL, virtual GPUs).

    Attributes:
        gen, width: as negotiated now; an idle link steps down to save power.
        max_gen, max_width: what card and slot could do together.
    """

    gen: int | None = None
    width: int | None = None
    max_gen: int | None = None
    max_width: int | None = None


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or one MIG instance of it, as the driver describes it.

    Attributes:
        compute_capability: such as "8.9".
        is_mig: a slice of a larger card.
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
    """Something that is not as it should be, in words."""

    text: str
    hint: str | None = None


@dataclass(frozen=True)
class GpuSurvey:
    """What the NVIDIA driver said when it was asked.

    Attributes:
        gpus: those that answered.
        cuda_version: the newest CUDA that the driver serves, such as (12, 4).
        troubles: what kept it from answering in full.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda_version: tuple[int, int] | None = None
    troubles: tuple[Trouble, ...] = ()


@dataclass(frozen=True)
class Cpu:
    """The processors this process may use.

    Attributes:
        isa: instruction sets that bear on speed, by Linux's names.
    """

    name: str
    cores: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Ram:
    """Host memory.

    Attributes:
        available_bytes: the least of what the system and the control group still give.
        cgroup_limit_bytes: of the container or session; None if there is no limit.
        pin_limit_bytes: memory that may be locked (RLIMIT_MEMLOCK); None if there is no limit.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    swap_bytes: int
    pin_limit_bytes: int | None


@dataclass(frozen=True)
class Disk:
    """The disk that packs and measured figures are kept on.

    Attributes:
        path: the folder, which need not exist yet.
        filesystem: its type by the system's own name, such as "ext4"; "" if unknown.
    """

    path: Path
    free_bytes: int
    total_bytes: int
    filesystem: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether the files are on another system, or on the one that this one is a guest of."""
        return self.filesystem in _REMOTE_FILESYSTEMS


@dataclass(frozen=True)
class Platform:
    """The system.

    Attributes:
        wsl: Linux inside Windows, which has limits of its own.
    """

    system: str
    release: str
    python: str
    wsl: bool


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was made for, read without importing it.

    Attributes:
        cuda: such as (13, 0); None for builds without CUDA.
        hip: whether it was made for AMD.
    """

    version: str
    cuda: tuple[int, int] | None
    hip: bool = False


@dataclass(frozen=True)
class Hardware:
    """Everything that can be known without measuring."""

    survey: GpuSurvey
    cpu: Cpu
    ram: Ram
    disk: Disk
    platform: Platform
    torch: TorchBuild | None


@dataclass(frozen=True)
class Links:
    """Rates in bytes per second; None where there is no such link, or nobody has measured it.

    Attributes:
        h2d_pinned_bytes_per_s, h2d_pageable_bytes_per_s: host to device, from pinned and from ordinary memory.
        d2h_bytes_per_s: device to pinned memory.
        ram_copy_bytes_per_s: bytes copied (each is read once and written once), all processors together.
        disk_read_bytes_per_s: from the disk itself, nothing cached.
    """

    h2d_pinned_bytes_per_s: float | None = None
    h2d_pageable_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    ram_copy_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None


@dataclass(frozen=True)
class MatmulRate:
    """Rows times a layer-sized matrix.

    Attributes:
        rows: as many as a pass over a tree of that size has.
        flop_per_s: multiplications and additions counted apart.
    """

    rows: int
    flop_per_s: float


@dataclass(frozen=True)
class Measured:
    """What took time to find out, and is kept for the next report.

    Attributes:
        device: that passes would run on.
        links: rates.
        matmul: of the device, by rows, in `matmul_dtype`.
        matmul_dtype: "bf16" or "fp32".
        gpu_uuid: of the GPU that `device` is; None for the CPU.
        pcie_under_load: its generation and width while copies ran; None where unknown.
        disk_is_cold: nothing cached entered the disk's rate.
        pinning_works: host memory could be pinned for the copies; None where none were made.
        gpu_trouble: what stopped the measurements on the GPU, if something did.
        measured_at: ISO 8601, UTC.
    """

    device: str
    links: Links
    matmul: tuple[MatmulRate, ...]
    matmul_dtype: str
    gpu_uuid: str | None
    pcie_under_load: tuple[int, int] | None
    disk_is_cold: bool
    pinning_works: bool | None
    gpu_trouble: str | None
    measured_at: str
