"""Write the README's table of predicted speeds from the golden plans.

    PYTHONPATH=.:tests python -m support.speeds

The golden plans hold what the planner predicts for the machines of tests/machines: see `support.golden`.
"""

from __future__ import annotations

from pathlib import Path

from specchat.bench.readme import with_measured
from support.golden import read_golden
from support.machines import read_machine

PAGE = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- speeds: PYTHONPATH=.:tests python -m support.speeds writes the table below -->"
END = "<!-- speeds: end -->"
MACHINES = (
    "laptop-8gb-pcie4x8-16gb",
    "desktop-12gb-pcie3x16-32gb",
    "desktop-12gb-pcie4x16-32gb",
    "desktop-16gb-pcie5x16-64gb",
    "desktop-24gb-pcie4x16-64gb",
    "desktop-none-avx512bf16-64gb",
    "laptop-none-avx2-16gb",
)
MODELS = {
    "Qwen/Qwen3-8B": "Qwen3-8B",
    "Qwen/Qwen3-30B-A3B": "Qwen3-30B-A3B",
    "Qwen/Qwen3-32B": "Qwen3-32B",
    "Qwen/Qwen3-32B-AWQ": "Qwen3-32B-AWQ",
    "meta-llama/Llama-3.3-70B-Instruct": "Llama-3.3-70B",
}


def table() -> str:
    """Return the table in Markdown: one row for each machine, one column for each model."""
    rows = [["machine", *MODELS.values()], ["---"] + ["---:"] * len(MODELS)]
    for machine in MACHINES:
        plans = read_golden(machine)
        rows.append([_name(machine), *(_cell(plans[model]) for model in MODELS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _name(machine: str) -> str:
    found = read_machine(machine).hardware
    ram = f"{round(found.ram.total_bytes / 2**30 / 8) * 8} GB RAM"
    if not found.survey.gpus:
        bf16 = ", bf16 CPU" if "avx512_bf16" in found.cpu.isa else ""
        return f"no GPU, {ram}{bf16}"
    gpu = found.survey.gpus[0]
    name = gpu.name.removeprefix("NVIDIA GeForce ").removesuffix(" GPU")
    return f"{name} {gpu.vram_total_bytes / 2**30:.0f} GB, {ram}, PCIe {gpu.pcie.max_gen}"


def _cell(plan: dict[str, str]) -> str:
    """Return tokens per second, and the precision of the weights."""
    quant, _, rest = plan["plan"].partition(" in ")
    precision = rest.partition(",")[0] if quant == "none" else quant.removeprefix("awq ")
    return f"**{plan['speed'].partition(' ')[0]}** {precision}"


def write(page: Path = PAGE) -> None:
    page.write_text(with_measured(page.read_text(), [table()], BEGIN, END))


if __name__ == "__main__":
    write()
