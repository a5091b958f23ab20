"""The logits processors of transformers for a sampling."""

from typing import Any

from specchat.records.generation import Sampling


def logits_processors(sampling: Sampling) -> Any:
    """Return transformers' processors in its order: penalty, then (if sampling) temperature, top-k, top-p, min-p.

    Returns:
        Callable (input_ids int64 [B, S], scores float32 [B, V]) -> scores float32 [B, V].

    Source: transformers' GenerationMixin._get_logits_processor; a test compares the results.
    """
    import transformers as hf

    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    if sampling.greedy:
        return processors
    if sampling.temperature != 1.0:
        processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    return processors
