"""Refusals of architectures: whatever a model's own modules raise becomes a reason in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from specchat.errors import SpecchatError, UnsupportedModelError, is_lack_of_memory

HINT = "use a model with rotary attention, such as Llama, Qwen3 or Gemma, or a hybrid such as Qwen3.5 or LFM2"

CANNOT_BUILD = "has a config.json from which transformers cannot build the model"
CANNOT_SHRINK = "cannot be shrunk to the tiny model on which specchat checks trees"
CANNOT_RUN = "has modules that cannot run with specchat's attention, masks and cache"

# Parts of foreign messages, and the reasons behind them.
_REASONS = {
    "row_layout": "makes its own attention masks, so it cannot receive the masks of trees",
    "RowMask": "computes with attention masks in its layers, so it cannot receive the masks of trees",
    "'specchat.": "has its own choice of attention functions, so it cannot call tree attention",
}


@contextmanager
def refusing(kind: str, reason: str) -> Iterator[None]:
    """Refuse an architecture if its modules raise an error within the scope; errors of specchat and the system pass.

    Args:
        kind: model type.
        reason: predicate of the refusal for errors whose cause is not known, such as `CANNOT_RUN`.

    Raises:
        UnsupportedModelError: the modules raised an error.
    """
    try:
        yield
    except (SpecchatError, OSError):
        raise
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        known = (words for part, words in _REASONS.items() if part in str(error))
        raise UnsupportedModelError(f"'{kind}' {next(known, reason)}", HINT) from error
