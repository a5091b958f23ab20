"""Prompts of a chat: what must hold before a model is asked, and what the chat template renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specchat.chat.reasoning import ThinkTags
from specchat.chat.state import Exchange
from specchat.errors import EmptyPromptError, UsageError
from specchat.records.chat import Message

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """The prompt of an answer.

    Attributes:
        before: exchanges before the question.
        question: message of the user.
        so_far: answer to continue, or None.
        text: prompt as rendered by the chat template.
        ids: token ids of `text`.
        ending_ids: token ids that ask for an answer, at the end of `ids`; empty if the prompt ends otherwise.
    """

    before: tuple[Exchange, ...]
    question: str
    so_far: Message | None
    text: str
    ids: list[int]
    ending_ids: Sequence[int] = ()

    @property
    def restore_at(self) -> tuple[int, ...]:
        """Lengths of the prompt at which a later prompt may differ: templates may end the next history there."""
        num_ending = len(self.ending_ids)
        ends_so = 0 < num_ending < len(self.ids) and self.ids[-num_ending:] == list(self.ending_ids)
        return (len(self.ids) - num_ending,) if ends_so else ()

    def think_tags(self) -> ThinkTags:
        """Return a parser for models without one of their own, in the state in which the prompt ends."""
        if self.so_far is not None:
            is_thinking = not self.so_far.content and bool(self.so_far.reasoning)
            return ThinkTags(opened=is_thinking, begun=not is_thinking)
        return ThinkTags.after(self.text)


def ending_after(history: str, text: str) -> str:
    """Return the part of a prompt that asks for an answer; empty if the template changes the history for it.

    Args:
        history: messages as rendered without asking for an answer.
        text: the same messages, and the part that asks.
    """
    return text.removeprefix(history) if text.startswith(history) else ""


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
