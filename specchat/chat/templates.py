"""The check for a chat template, from a model's files and before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from specchat.chat.prompt import check_has_template
from specchat.files import read_regular

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_SETTINGS = "tokenizer_config.json"


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
        settings = json.loads(read_regular(folder / _SETTINGS))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and isinstance(settings.get("chat_template"), str)
