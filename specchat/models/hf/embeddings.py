"""Input embeddings with a norm of their own, as Muse's are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Name of the norm in transformers' MuseGlimmerTextEmbedding.
_NORM = "embed_norm"


@contextmanager
def without_norm(embeddings: Any) -> Iterator[None]:
    """Let embeddings leave out their norm within the scope; others are not changed."""
    norm = getattr(embeddings, _NORM, None)
    if norm is None:
        yield
        return
    setattr(embeddings, _NORM, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(embeddings, _NORM, norm)
