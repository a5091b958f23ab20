"""Combine the user's sampling values with those of the model."""

from dataclasses import dataclass

from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.generation import Sampling


@dataclass(frozen=True)
class SamplingChoices:
    """Sampling values of the user; None leaves a value to the model."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def resolve_sampling(chosen: SamplingChoices, defaults: GenerationDefaults, seed: int) -> Sampling:
    """Return the effective sampling settings.

    The user's choice overrides the model's generation_config, which overrides greedy decoding. A generation_config
    without do_sample means greedy decoding; its temperature, top_k, top_p and min_p are then ignored. Its repetition
    penalty always applies, as in transformers.

    Args:
        chosen: the user's choices.
        defaults: the model's generation_config.
        seed: seed of the random draws.
    """
    samples = bool(defaults.do_sample)
    return Sampling(
        temperature=_first(chosen.temperature, _first(defaults.temperature, None, 1.0) if samples else None, 0.0),
        top_k=int(_first(chosen.top_k, defaults.top_k if samples else None, 0)),
        top_p=_first(chosen.top_p, defaults.top_p if samples else None, 1.0),
        min_p=_first(chosen.min_p, defaults.min_p if samples else None, 0.0),
        repetition_penalty=_first(chosen.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=seed,
    )


def _first(chosen: float | None, default: float | None, fallback: float) -> float:
    if chosen is not None:
        return chosen
    return fallback if default is None else default
