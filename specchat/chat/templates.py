"""The checks for a chat template, one of them from a model's files before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from specchat.errors import UsageError

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_SETTINGS = "tokenizer_config.json"


def check_has_template(tokenizer: Tokenizer, *, base: bool) -> None:
    """Check that a model can chat.

    Args:
        tokenizer: tokenizer of the target.
        base: whether the user asked for plain text continuation, which needs no chat template.

    Raises:
        UsageError: the model has no chat template, and `base` is false.
    """
    if not base and not tokenizer.has_chat_template:
        raise UsageError(
            "this model has no chat template, so it can only continue text",
            hint="pass --base to continue the prompt as it stands",
        )


def check_can_chat(folder: Path, *, base: bool) -> None:
    """Check that a model has a chat template, unless its tokenizer is not there yet.

    Only a model whose files declare no template is asked for one through its tokenizer, which imports transformers.

    Args:
        folder: folder of the target.
        base: whether the user asked for plain text continuation, which needs no chat template.

    Raises:
        UsageError: the model has no chat template, and `base` is false.
    """
    if base or _declares_template(folder) or not any(folder.glob("tokenizer*")):
        return
    from specchat.models.hf.tokenizer import load_tokenizer

    check_has_template(load_tokenizer(folder), base=base)


def _declares_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATE_FILES):
        return True
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
