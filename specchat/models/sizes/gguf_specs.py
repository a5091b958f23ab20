"""Sizes of known GGUF uploads, recorded from headers that have the types of each upload's quantization mix.

llama.cpp's mixes choose a type for every tensor, so these sizes are data. Tests record them again and compare. Nothing
here imports torch.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from specchat.models.sizes.hybrid_specs import unfolded
from specchat.records.model import ModelSpec

FILE = Path(__file__).with_suffix(".json")


def gguf_spec(model_id: str) -> ModelSpec:
    """Return the recorded sizes of a known GGUF upload."""
    return unfolded(_recorded()[model_id])


@cache
def _recorded() -> Mapping[str, Any]:
    recorded: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return recorded
