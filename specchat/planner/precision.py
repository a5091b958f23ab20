"""Choose the precision of the target, and list the lower precisions for a draft.

The target's precision is the only choice that changes the text. So it must not change between runs: it depends on total
memory, never on free memory, and on typical rates, never on measured ones.
"""

from dataclasses import dataclass, replace

from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import weight_bytes
from specchat.planner.candidates import Candidates
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.planner.statistics import Statistics
from specchat.planner.workload import dtype_for
from specchat.records.model import AUTO_QUANTS, DTYPE_BYTES, ModelSpec, Quant

# int8 has no measurable loss (perplexity +0.00%), but it changes the weights, so the speed-up has to justify it.
LOWERED_IF_FASTER_BY = 1.3


def lower_quants(draft: ModelSpec) -> tuple[Quant, ...]:
    """Return the precisions that plans may quantize a draft to; none for small or pre-quantized drafts."""
    is_small = draft.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES
    return () if is_small or draft.quant != "none" else AUTO_QUANTS


@dataclass(frozen=True)
class Precision:
    """Target in the chosen precision, with the reason and the best other precision."""

    spec: ModelSpec
    why: str
    other: ModelSpec | None = None


def choose_quant(request: PlanRequest, inputs: PlanInputs) -> Precision:
    """Return the target in the requested precision, or for "auto" in the best that is reasonably fast.

    The same command must write the same text on the same machine, whichever other programs run.
    """
    if request.choices.quant != "auto":
        return Precision(inputs.target(request.choices.quant), "asked for")
    full = inputs.target("none")
    if full.quant != "none":
        return Precision(full, "pre-quantized checkpoint")
    dtype, total_bytes = dtype_for(request, inputs.machine, full), inputs.machine.total_bytes
    if weight_bytes(full, dtype) <= total_bytes:
        return _full_or_int8(request, inputs, full) if request.lowers_for_speed else Precision(full, "original weights")
    int8 = inputs.target("int8")
    if weight_bytes(int8, dtype) <= total_bytes:
        return Precision(int8, "original weights exceed all memory of this machine", full)
    return Precision(inputs.target("int4"), "int8 weights exceed all memory of this machine", int8)


def _full_or_int8(request: PlanRequest, inputs: PlanInputs, full: ModelSpec) -> Precision:
    """Return the original weights if they fit the device or int8 would be less than 1.3 times as fast, else int8."""
    typical = replace(inputs.typical, fused_s={})  # which kernels there are depends on installed packages
    idle = replace(inputs, machine=_idle(inputs.machine), rates=typical, statistics=Statistics())
    request = replace(request, copy=None)  # a copy depends on the free space of the disk
    plain = Candidates(request, idle, full).best
    if plain is not None and not plain.streams:
        return Precision(full, "original weights fit the device")
    int8 = inputs.target("int8")
    lower = Candidates(request, idle, int8).best
    if lower is None or (plain is not None and lower.tok_per_s < LOWERED_IF_FASTER_BY * plain.tok_per_s):
        return Precision(full, "original weights: int8 would not be much faster", int8)
    return Precision(int8, "no measurable loss, and faster" if plain else "original weights do not fit", full)


def _idle(machine: Machine) -> Machine:
    """Return the machine with all its memory free."""
    on_cpu = machine.device == "cpu"
    ram = machine.total_bytes if on_cpu else machine.total_bytes - machine.device_total_bytes
    return replace(machine, device_free_bytes=machine.device_total_bytes, ram_available_bytes=max(ram, 0))
