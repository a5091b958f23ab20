"""The precision of the target, and what a draft may be lowered to.

The target's precision is the one choice that changes the text, so it depends on nothing that changes from one run to
the next: on what the machine has, never on what is free, on what is typical of such machines, never on what was
measured.
"""

from dataclasses import dataclass, replace

from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import weight_bytes
from specchat.planner.candidates import Candidates, dtype_for
from specchat.planner.request import EXACT_BYTES, PlanInputs, PlanRequest
from specchat.planner.statistics import Statistics
from specchat.records.model import DTYPE_BYTES, LOWER_QUANTS, ModelSpec, Quant

# int8 loses nothing that could be measured (perplexity +0.00%), but it is not the original: it has to be worth it.
LOWERED_IF_FASTER_BY = 1.3


def lower_quants(draft: ModelSpec) -> tuple[Quant, ...]:
    """What a draft may be quantized to: of small ones nothing is gained, and some come quantized."""
    is_small = draft.num_params * DTYPE_BYTES["fp32"] <= EXACT_BYTES
    return () if is_small or draft.quant != "none" else LOWER_QUANTS


@dataclass(frozen=True)
class Precision:
    """The target in the precision that was chosen, and why that one."""

    spec: ModelSpec
    why: str
    other: ModelSpec | None = None


def choose_quant(request: PlanRequest, known: PlanInputs) -> Precision:
    """The target in the precision asked for, or with "auto" in the best that this machine can do with reasonably fast.

    The same command must give the same text on the same machine, whatever else runs there.
    """
    if request.choices.quant != "auto":
        return Precision(known.target(request.choices.quant), "asked for")
    full = known.target("none")
    if full.quant != "none":
        return Precision(full, "as it comes")
    dtype, total_bytes = dtype_for(request, known.machine, full), known.machine.total_bytes
    if weight_bytes(full, dtype) <= total_bytes:
        return _full_or_int8(request, known, full) if request.lowers_for_speed else Precision(full, "the original")
    int8 = known.target("int8")
    if weight_bytes(int8, dtype) <= total_bytes:
        return Precision(int8, "the original exceeds all memory of this machine", full)
    return Precision(known.target("int4"), "int8 exceeds all memory of this machine", int8)


def _full_or_int8(request: PlanRequest, known: PlanInputs, full: ModelSpec) -> Precision:
    """The original where it fits the device, or where int8 would not be much faster."""
    idle = replace(known, machine=_idle(known.machine), rates=known.typical, statistics=Statistics())
    plain = Candidates(request, idle, full).best
    if plain is not None and not plain.num_streamed:
        return Precision(full, "the original fits")
    int8 = known.target("int8")
    lower = Candidates(request, idle, int8).best
    if lower is None or (plain is not None and lower.tok_per_s < LOWERED_IF_FASTER_BY * plain.tok_per_s):
        return Precision(full, "the original, as int8 would hardly be faster", int8)
    return Precision(int8, "as good as the original, and faster" if plain else "the original does not fit", full)


def _idle(machine: Machine) -> Machine:
    """The machine with all its memory free."""
    on_cpu = machine.device == "cpu"
    ram = machine.total_bytes if on_cpu else machine.total_bytes - machine.device_total_bytes
    return replace(machine, device_free_bytes=machine.device_total_bytes, ram_available_bytes=max(ram, 0))
