"""Threads of draft passes: on a CPU, a tiny model computes on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from specchat.engine.model import TreeModel
from specchat.models.quant.modules import quant_linears

# Most weights that a row of a tiny model is multiplied with. A pass over 8 rows of the demo's draft (0.9M) takes
# 1.7 ms on one thread. Two threads would save little, and they wait for each other in each of its 50 operations: where
# other programs compute, too, or layers are read meanwhile, a pass takes 5 to 40 ms instead of 4 to 6.
_TINY = 1 << 22


def are_tiny(models: Sequence[TreeModel]) -> bool:
    """Return whether passes over all of these models are too short for several threads."""
    return bool(models) and all(_is_tiny(model) for model in models)


def _is_tiny(model: TreeModel) -> bool:
    skeleton = model.skeleton
    num_weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
    scoring = model.vocab_size * skeleton.config.hidden_size  # heads score with the target's matrix
    is_plain = next(quant_linears(skeleton.model), None) is None  # kernels are chosen for all threads
    return model.device.type == "cpu" and is_plain and num_weights + scoring <= _TINY


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread within the scope."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
