"""Where layers and experts are, in words."""

from specchat.records.generation import Step
from specchat.records.plan import ExpertForecast, ExpertSlots, Plan
from specchat.records.usage import MemoryReport
from specchat.units import format_bytes


def expert_facts(plan: Plan, experts: ExpertForecast) -> list[tuple[str, str]]:
    """Return the lines of a plan about its experts: names and texts."""
    slots = plan.placement.experts
    assert slots is not None
    kept = format_bytes(slots.quota * experts.num_layers * experts.expert_bytes)
    memory = "memory" if plan.work.device == "cpu" else "VRAM"
    all_bytes = format_bytes(experts.all_bytes)
    rows = "1 row" if experts.rows == 1 else f"{experts.rows} rows"
    return [
        (
            "experts",
            f"{experts.num_experts} in each of {experts.num_layers} layers, {format_bytes(experts.expert_bytes)} each, "
            f"{all_bytes}; {slots.quota} of each layer stay in {memory} ({kept}){_ahead(slots)}",
        ),
        (
            "streamed",
            f"{format_bytes(experts.missed_bytes)} per pass of {rows}, from {_places(plan, experts)}: it "
            f"uses about {experts.used:.0f} experts of a layer, of which {experts.hit_rate:.0%} are in {memory} (all "
            f"experts: {all_bytes})",
        ),
    ]


def _ahead(slots: ExpertSlots) -> str:
    return "; likely ones of the next layer are read ahead" if slots.looks_ahead else ""


def _places(plan: Plan, experts: ExpertForecast) -> str:
    slots = plan.placement.experts
    assert slots is not None
    if plan.work.device != "cpu":
        if slots.in_host == experts.num_experts:
            return "pinned RAM"
        return f"pinned RAM ({slots.in_host} experts of each layer) and disk" if slots.in_host else "disk"
    num_cached = len(plan.placement.in_ram)
    if num_cached == experts.num_layers:
        return "the page cache"
    return f"the page cache (layers: {num_cached}) and disk" if num_cached else "disk"


def kept_experts(plan: Plan) -> str:
    """Return how many experts stay in memory."""
    assert plan.placement.experts is not None and plan.experts is not None
    return f"{plan.placement.experts.quota} of {plan.experts.num_experts} experts of each layer"


def expected_hits(experts: ExpertForecast) -> str:
    """Return the expected share of used experts that is in memory, and the bytes that a pass reads."""
    moved, all_bytes = format_bytes(experts.missed_bytes), format_bytes(experts.all_bytes)
    return f"{experts.hit_rate:.0%} of those used; {moved} of {all_bytes} read per pass"


def expert_lines(memory: MemoryReport, plan: Plan) -> list[str]:
    """Return the lines of /stats about experts; none if no experts are read one by one."""
    if plan.experts is None or memory.expert_hit_rate is None:
        return []
    used = memory.expert_hits + memory.expert_misses
    num_read = memory.expert_misses + memory.useless_guesses
    lines = [
        f"experts: {memory.expert_hit_rate:.0%} of {used:,} were in memory (expected: {plan.experts.hit_rate:.0%}), "
        f"{format_bytes(num_read * plan.experts.expert_bytes)} read"
    ]
    if guesses := memory.useful_guesses + memory.useless_guesses:
        share = memory.useful_guesses / max(memory.expert_misses, 1)
        lines.append(
            f"experts read ahead: {guesses:,}, of which {memory.useful_guesses / guesses:.0%} were used; "
            f"{share:.0%} of what was missing"
        )
    return lines


def step_experts(step: Step) -> str:
    """Return the share of a step's experts that were in memory; empty if none was read."""
    used = step.expert_hits + step.expert_misses
    return f"{step.expert_hits / used:.0%} of experts in memory" if step.expert_misses else ""


def places_of(plan: Plan, memory: str) -> str:
    """Return where the layers are, in one line.

    Args:
        plan: plan of the target.
        memory: name of the device memory.
    """
    placement, size = plan.placement, format_bytes(plan.device_bytes)
    if plan.devices:
        memory = " and ".join(device.device for device in plan.devices)
        size = format_bytes(sum(device.num_bytes for device in plan.devices))
    streamed = f"{format_bytes(plan.streamed_bytes_per_step)} streamed per pass"
    if plan.experts is not None:
        return f"{kept_experts(plan)} in {memory} ({size}) · {streamed}"
    if not placement.streamed:
        return f"all in {memory} ({size})"
    return f"{len(placement.resident)} of {placement.num_layers} layers in {memory} ({size}) · {streamed}"
