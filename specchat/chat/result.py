"""The JSON objects that scripts read: bytes, seconds, unformatted numbers.

The man page documents the objects; tests pin their keys.
"""

from dataclasses import asdict
from typing import Any

from specchat.chat.answer import Delta, Speculation, Turn
from specchat.planner.explain import ExplainedPlan
from specchat.planner.recommendations import Recommendation, Recommendations
from specchat.records.model import ModelSource
from specchat.records.plan import DevicePlan, ExpertForecast, Plan, StateMemory

SCHEMA_VERSION = 1


def run_object(turn: Turn, *, target: ModelSource, plan: Plan, seed: int) -> dict[str, Any]:
    """Build the object that `run --json` prints.

    Args:
        turn: finished answer.
        target: model that wrote the answer.
        plan: plan that the engine ran under.
        seed: seed of the sampling.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "model": target.name,
        "revision": target.revision,
        "draft": plan.draft,
        "retrieval": plan.retrieval,
        "quant": plan.quant,
        "device": plan.work.device,
        "seed": seed,
        "message": asdict(turn.message),
        "token_ids": list(turn.token_ids),
        "finish_reason": turn.finish_reason,
        "usage": asdict(turn.usage),
        "timings": asdict(turn.timings),
        "speculation": _speculation_object(turn.speculation),
        "memory": {**asdict(turn.memory), "devices": [asdict(each) for each in turn.memory.devices]},
    }


def _speculation_object(speculation: Speculation) -> dict[str, Any]:
    """Build the figures of speculative decoding, with lists for tuples."""
    sources = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(each).items()}
        for each in speculation.by_source
    ]
    return {**asdict(speculation), "by_source": sources}


def delta_object(delta: Delta) -> dict[str, Any]:
    """Build one line of `run --json-stream`.

    Thinking has a key of its own, so the joined `text` values are the answer.
    """
    if delta.part == "reasoning":
        return {"type": "delta", "text": "", "reasoning": delta.text, "token_ids": list(delta.token_ids)}
    return {"type": "delta", "text": delta.text, "token_ids": list(delta.token_ids)}


def done_object(run: dict[str, Any]) -> dict[str, Any]:
    """Build the last line of `run --json-stream`: the run object with type "done"."""
    return {"type": "done", **run}


def plan_object(plan: Plan) -> dict[str, Any]:
    """Build the object of a plan without predictions; the predicted values are null."""
    return {
        "target": plan.target,
        "draft": plan.draft,
        "retrieval": plan.retrieval,
        "quant": plan.quant,
        "device": plan.work.device,
        "dtype": plan.work.dtype,
        "ctx": plan.work.ctx,
        "tree_budget": plan.work.tree_budget,
        "slots": plan.placement.slots,
        "resident_layers": len(plan.placement.resident),
        "expanded_layers": len(plan.placement.expanded),
        "streamed_layers": len(plan.placement.streamed),
        "disk_layers": plan.placement.tiers.count("disk"),
        "ledger": [asdict(item) for item in plan.ledger],
        "device_bytes": plan.device_bytes,
        "generation_bytes": plan.generation_bytes,
        "device_budget_bytes": plan.vram_bytes,
        "host_bytes": plan.host_bytes,
        "host_ledger": [asdict(item) for item in plan.host_ledger],
        "streamed_bytes_per_step": plan.streamed_bytes_per_step,
        "devices": [_device_object(each) for each in plan.devices],
        "microbatches": [{"rows": rows, "count": count} for rows, count in plan.placement.microbatches.counts],
        "experts": None if plan.experts is None else _experts_object(plan, plan.experts),
        "recurrent": None if plan.states is None else _states_object(plan.states),
        "predicted_pass_s": None,
        "predicted_tokens_per_step": None,
        "predicted_tok_per_s": None,
        "basis": "none",
        "alternatives": [],
    }


def _device_object(device: DevicePlan) -> dict[str, Any]:
    return {
        "device": device.device,
        "resident_layers": device.resident,
        "streamed_layers": device.streamed,
        "ledger": [asdict(item) for item in device.ledger],
        "device_bytes": device.num_bytes,
        "device_budget_bytes": device.vram_bytes,
        "streamed_bytes_per_step": device.streamed_bytes,
        "link_bytes_per_s": device.link_bytes_per_s,
        "predicted_link_s": device.link_s,
        "predicted_compute_s": device.compute_s,
    }


def _experts_object(plan: Plan, experts: ExpertForecast) -> dict[str, Any]:
    slots = plan.placement.experts
    assert slots is not None
    return {
        "layers": experts.num_layers,
        "experts_per_layer": experts.num_experts,
        "expert_bytes": experts.expert_bytes,
        "kept_per_layer": slots.quota,
        "shared_slots": slots.shared,
        "looks_ahead": slots.looks_ahead,
        "cached_layers": len(plan.placement.in_ram),
        "pinned_per_layer": slots.in_host,
        "predicted_rows": experts.rows,
        "predicted_used": experts.used,
        "predicted_hit_rate": experts.hit_rate,
        "predicted_missed_bytes": experts.missed_bytes,
        "all_bytes": experts.all_bytes,
    }


def _states_object(states: StateMemory) -> dict[str, Any]:
    return {
        "recurrent_layers": states.num_recurrent,
        "attention_layers": states.num_attention,
        "state_bytes": states.state_bytes,
        "working_copy_bytes": states.working_bytes,
        "stash_bytes": {str(nodes): nbytes for nodes, nbytes in states.stash_bytes},
        "restore_points": states.num_points,
        "restore_point_bytes": states.point_bytes,
        "kv_bytes": states.kv_bytes,
    }


def chosen_object(chosen: ExplainedPlan) -> dict[str, Any]:
    """Build the object that `run --plan --json` prints: the plan, its predicted speed and the reasons."""
    prediction = chosen.prediction
    return {
        **plan_object(chosen.plan),
        "predicted_pass_s": prediction.pass_s,
        "predicted_tokens_per_step": prediction.tokens_per_step,
        "predicted_tok_per_s": prediction.tok_per_s,
        "bound": prediction.bound,
        "basis": prediction.basis,
        "assumptions": list(chosen.assumptions),
        "choices": [
            {"option": each.option, "value": each.value, "why": each.why, "pinned": each.pinned}
            for each in chosen.choices
        ],
        "alternatives": [
            {
                "option": each.option,
                "value": each.alternative.value,
                "predicted_tok_per_s": each.alternative.tok_per_s,
            }
            for each in chosen.choices
            if each.alternative is not None
        ],
    }


def recommendations_object(recommendations: Recommendations, flags: str) -> dict[str, Any]:
    """Build the object of recommended models that `probe --json` prints.

    Args:
        recommendations: recommendations for this machine.
        flags: further flags of the user, appended to each command.
    """
    return {
        "runs": [_recommendation_object(recommendation, flags) for recommendation in recommendations.best],
        "too_large": list(recommendations.too_large),
        "no_disk": list(recommendations.no_disk),
    }


def _recommendation_object(recommendation: Recommendation, flags: str) -> dict[str, Any]:
    plan, prediction = recommendation.plan, recommendation.prediction
    return {
        "model": recommendation.model.id,
        "command": f"{recommendation.command}{flags}",
        "cached": recommendation.is_cached,
        "gated": recommendation.model.gated,
        "download_bytes": recommendation.download_bytes,
        "disk_bytes": recommendation.disk_bytes,
        "quant": plan.quant,
        "dtype": plan.work.dtype,
        "draft": plan.draft,
        "ctx": plan.work.ctx,
        "tree_budget": plan.work.tree_budget,
        "slots": plan.placement.slots,
        "resident_layers": len(plan.placement.resident),
        "ram_layers": len(plan.placement.in_ram),
        "disk_layers": plan.placement.tiers.count("disk"),
        "predicted_pass_s": prediction.pass_s,
        "predicted_tokens_per_step": prediction.tokens_per_step,
        "predicted_tok_per_s": prediction.tok_per_s,
        "basis": prediction.basis,
    }
