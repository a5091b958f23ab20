"""What transformers itself writes, token by token, and the rule by which two floating-point texts are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from specchat.engine.sampling import Noise
from specchat.records.generation import Sampling

# Two best scores closer than this may change places when batch shapes change the rounding.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Reference:
    """A text and, per token, how far the winner's score was ahead of the second."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]

    def first_difference(self, tokens: list[int]) -> int | None:
        """Index of the first token that differs, None if all are equal as far as both go (a prefix must be whole)."""
        for i, (ours, theirs) in enumerate(zip(tokens, self.tokens, strict=False)):
            if ours != theirs:
                return i
        return None if len(tokens) == len(self.tokens) else min(len(tokens), len(self.tokens))

    def is_near_tie(self, index: int) -> bool:
        return index < len(self.margins) and self.margins[index] < NEAR_TIE


def generate(model: Any, prompt: list[int], sampling: Sampling, num_tokens: int) -> Reference:
    """transformers' `generate` on the same model; sampled: with torch.multinomial replaced by the keyed race."""
    settings: dict[str, Any] = {
        "max_new_tokens": num_tokens,
        "do_sample": not sampling.greedy,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    if not sampling.greedy:
        settings |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    noise = Noise(sampling.seed, vocab_size, torch.device("cpu"))
    position = len(prompt)

    def race(probabilities: torch.Tensor, num_samples: int, **_: Any) -> torch.Tensor:
        nonlocal position
        winner = (probabilities.log() + noise.row(position)).argmax(-1, keepdim=True)
        position += 1
        return winner

    with patch("torch.multinomial", race), torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), **settings)
    margins = []
    for i, scores in enumerate(out.scores):
        ranked = scores[0] if sampling.greedy else scores[0] + noise.row(len(prompt) + i)
        best = ranked.topk(2).values
        margins.append(float(best[0] - best[1]))
    return Reference(prompt, out.sequences[0, len(prompt) :].tolist(), margins)
