"""Golden plans: what each machine of tests/machines gets for a few models, and why that is sensible.

    PYTHONPATH=.:tests python -m support.golden

writes tests/planner/golden anew. A plan that has changed loses its reason: read it, and write down why it is sensible;
one that is not is a mistake of the planner. The tests want every plan as it is written there, with a reason.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from specchat.errors import DoesNotFitError
from specchat.models.catalog.known_models import known_models
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, recommend
from support.machines import MACHINES, read_machine

FOLDER = Path(__file__).parents[1] / "planner" / "golden"
MODELS = (
    "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-32B-AWQ",
    "meta-llama/Llama-3.3-70B-Instruct",
)
# Mixtures of experts, on a few machines only: cards of 8 to 24 GB, and a machine without one.
MIXTURES = (
    "Qwen/Qwen3.6-35B-A3B",
    "unsloth/gpt-oss-20b-BF16",
    "unsloth/gpt-oss-120b-BF16",
    "google/gemma-4-26B-A4B-it",
)
# GGUF uploads, whose layers have types of their own, on the same machines.
UPLOADS = ("lmstudio-community/Qwen3.8-27B-GGUF:Q4_K_M", "ggml-org/gpt-oss-20b-GGUF:MXFP4")
MACHINES_FOR_MIXTURES = (
    "desktop-8gb-pcie4x8-64gb",
    "desktop-12gb-pcie4x16-32gb",
    "desktop-16gb-pcie5x16-64gb",
    "desktop-24gb-pcie4x16-64gb",
    "laptop-none-avx2-16gb",
)
KEYS = ("plan", "experts", "bytes")


def golden_plans(machine: str) -> dict[str, dict[str, str]]:
    """By model, the plan's essentials in words; predicted figures to two digits."""
    models = (*MODELS, *MIXTURES, *UPLOADS) if machine in MACHINES_FOR_MIXTURES else MODELS
    return {model: _essentials(machine, model) for model in models}


def read_golden(machine: str) -> dict[str, dict[str, str]]:
    """As they are written down, with `why`; empty if they are not."""
    file = FOLDER / f"{machine}.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


def _essentials(machine: str, model: str) -> dict[str, str]:
    file = read_machine(machine)
    rates, typical = (rates_of(file.hardware, file.machine, measured) for measured in (file.measured, None))
    try:
        recommendation = recommend(known_models()[model], ANYTHING, file.machine, rates, typical)
    except DoesNotFitError as error:
        return {"plan": f"none: {error.message}"}
    plan, prediction = recommendation.plan, recommendation.prediction
    tiers = plan.placement.tiers
    counts = [f"{tiers.count(tier)} {tier}" for tier in ("device", "ram", "disk") if tiers.count(tier)]
    stored = f" in {plan.draft_quant}" if plan.draft_quant in ("int8", "int4") else ""
    draft = f"draft {plan.draft}{stored}, tree {plan.work.tree_budget}" if plan.draft else "no draft"
    slots = f", {plan.placement.slots} slots" if plan.placement.slots else ""
    if plan.experts is not None and plan.placement.experts is not None:
        kept = plan.placement.experts
        in_ram = f", {kept.in_host} in RAM" if file.machine.device != "cpu" else ""
        slots = f" with {kept.quota} of {plan.experts.num_experts} experts{in_ram}"
    found = {
        "plan": f"{plan.quant} in {plan.work.dtype}, ctx {plan.work.ctx}, layers {' + '.join(counts)}{slots}, {draft}",
        "speed": f"{_two_digits(prediction.tok_per_s)} tok/s, {prediction.basis}: "
        f"{_two_digits(prediction.tokens_per_step)} tokens with {prediction.tree_nodes} nodes "
        f"a step of {_two_digits(prediction.pass_s)} s, "
        f"waiting for the {prediction.bound}",
        "bytes": f"{plan.device_bytes / 2**30:.1f} GiB of {plan.vram_bytes / 2**30:.1f} on the device, "
        f"{plan.streamed_bytes_per_step / 2**30:.1f} streamed",
    }
    if (experts := plan.experts) is not None and (kept := plan.placement.experts) is not None:
        rows = "1 row" if experts.rows == 1 else f"{experts.rows} rows"
        ahead = ", some read ahead" if kept.looks_ahead else ""
        found["experts"] = (
            f"{experts.used:.0f} of {experts.num_experts} used by {rows}, {experts.hit_rate:.0%} in memory: "
            f"{experts.missed_bytes / 1e9:.2f} GB of {experts.all_bytes / 1e9:.1f} read{ahead}"
        )
    return found


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _write(machine: str) -> int:
    """Returns how many plans have no reason now."""
    old, blocks, unexplained = read_golden(machine), [], 0
    for model, plan in golden_plans(machine).items():
        before = dict(old.get(model, {}))
        why = before.pop("why", "")
        kept = why if {**before, "speed": ""} == {**plan, "speed": ""} else ""
        unexplained += not kept
        lines = [f'{key} = "{text}"' for key, text in {**plan, "why": kept}.items()]
        blocks.append("\n".join([f'["{model}"]', *lines]))
    head = f"# {read_machine(machine).about}.\n# Written by: python -m support.golden; a person writes each why.\n\n"
    (FOLDER / f"{machine}.toml").write_text(head + "\n\n".join(blocks) + "\n")
    return unexplained


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for machine in MACHINES:
        print(f"{machine}: {_write(machine)} plans to be explained")


if __name__ == "__main__":
    main()
