"""Prompts of a chat: what must hold before a model is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specchat.errors import EmptyPromptError, UsageError
from specchat.records.chat import Message

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer


def check_has_template(tokenizer: Tokenizer, *, base: bool) -> None:
    """Check that a model can chat.

    Args:
        tokenizer: tokenizer of the target.
        base: whether the user asked for plain text continuation, which needs no chat template.

    Raises:
        UsageError: the model has no chat template, and `base` is false.
    """
    if base or tokenizer.has_chat_template:
        return
    why = "this model has no chat template, so it can only continue text"
    if names := tokenizer.other_templates:
        why = f"this model has chat templates for special uses ({', '.join(names)}), but none for a chat"
    raise UsageError(why, hint="pass --base to continue the prompt as it stands")


def check_text(text: str) -> None:
    """Check that a message can be sent.

    Raises:
        EmptyPromptError: the text is blank.
        UsageError: the text is not valid UTF-8.
    """
    if not text.strip():
        raise EmptyPromptError("the prompt is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python decodes invalid bytes of arguments and keys to lone surrogates
        raise UsageError("the prompt is not UTF-8 text") from error


def running_text(messages: Sequence[Message]) -> str:
    """Join the messages to one text for a base model; each later message of the user starts a new line."""
    parts = [("\n" if i and m.role == "user" else "") + m.content for i, m in enumerate(messages)]
    return "".join(parts)
