"""Refusals of architectures: whatever a model's own modules raise becomes a reason in one line."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from specchat.errors import DoesNotFitError, SpecchatError, UnsupportedModelError, is_lack_of_memory

HINT = "use a model with rotary attention, such as Llama, Qwen3 or Gemma, or a hybrid such as Qwen3.5 or LFM2"

HAS_ENCODER = "has an encoder, but only models of decoder layers are supported"
CANNOT_BUILD = "has a config.json from which transformers cannot build the model"
CANNOT_SHRINK = "cannot be shrunk to the tiny model on which specchat checks trees"
CANNOT_RUN = "has modules that cannot run with specchat's attention, masks and cache"
CANNOT_COMPUTE = "has a config.json with which its modules cannot compute"

# Parts of foreign messages, and the reasons behind them.
_REASONS = {
    "row_layout": "makes its own attention masks, so it cannot receive the masks of trees",
    "PassMask": "computes with attention masks in its layers, so it cannot receive the masks of trees",
    "no attribute `embed_tokens`": "names its token embeddings in a way of its own, so specchat cannot find them",
    "'specchat.": "has its own choice of attention functions, so it cannot call tree attention",
}


@contextmanager
def refusing(kind: str, reason: str) -> Iterator[None]:
    """Refuse an architecture if its modules raise an error within the scope; errors of specchat and of files pass.

    Args:
        kind: model type.
        reason: predicate of the refusal for errors whose cause is not known, such as `CANNOT_RUN`.

    Raises:
        UnsupportedModelError: the modules raised an error.
        DoesNotFitError: too little memory for the modules' buffers, or config.json has absurd sizes.
    """
    try:
        yield
    except (SpecchatError, OSError):
        raise
    except Exception as error:
        if is_lack_of_memory(error):
            raise DoesNotFitError(
                f"'{kind}' needs more memory for its tables than there is", "close other programs, or check config.json"
            ) from error
        known = (words for part, words in _REASONS.items() if part in str(error))
        raise UnsupportedModelError(f"'{kind}' {next(known, reason)}", HINT) from error


@contextmanager
def computing(model: str) -> Iterator[None]:
    """Refuse a model whose modules raise an error in a pass; the tiny model of the check has other sizes.

    Args:
        model: name of the model.

    Raises:
        UnsupportedModelError: the code of transformers raised an error. Errors of specchat's code and of devices pass.
    """
    try:
        yield
    except (SpecchatError, OSError):
        raise
    except Exception as error:
        if is_lack_of_memory(error) or "CUDA" in str(error) or not _is_from_modules(error):
            raise
        raise UnsupportedModelError(f"{model} {CANNOT_COMPUTE}", "download or copy config.json again") from error


def _is_from_modules(error: Exception) -> bool:
    """Return whether an error was raised by transformers, or by torch when transformers called it."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    callers = [name for name in modules if not name.startswith("torch.")]
    return bool(callers) and callers[-1].startswith("transformers.")
