"""A model's tokenizer and chat template, and the parser of its answers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from specchat.errors import CorruptCheckpointError, UsageError
from specchat.records.chat import Message, Part


class Tokenizer:
    """A model's tokenizer and chat template, as far as specchat needs them."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chats (base models were not)."""
        return bool(self._hf.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence id, if the tokenizer names one."""
        token_id = self._hf.eos_token_id
        return None if token_id is None else int(token_id)

    @property
    def backend(self) -> Any | None:
        """The `tokenizers.Tokenizer` underneath, or None for a tokenizer written in Python."""
        return getattr(self._hf, "backend_tokenizer", None)

    @cached_property
    def thinking_switch(self) -> str | None:
        """The name of the template's variable that switches thinking on and off, if it has one."""
        return next((name for name in _THINKING_SWITCHES if name in self._template_variables()), None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        ending: Literal["answer", "continue", "none"] = "answer",
        thinking: bool | None = None,
    ) -> str:
        """The chat as the model's template writes it.

        Args:
            messages: all of it, the system prompt first.
            ending: up to where the next answer starts, or to where the last message leaves off, or no further.
            thinking: the template's switch for thinking; without effect where there is none.

        Raises:
            UsageError: the template refuses these messages (a system prompt it has no place for, say).
        """
        import jinja2

        turns = [_as_turn(message) for message in messages]
        if ending == "continue":
            _mark_end(turns[-1])
        switches = {} if thinking is None or self.thinking_switch is None else {self.thinking_switch: thinking}
        try:
            text = self._hf.apply_chat_template(
                turns, add_generation_prompt=ending == "answer", tokenize=False, **switches
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template refuses this chat: {error}") from error
        assert isinstance(text, str)
        return _up_to_mark(text) if ending == "continue" else text

    def response_parser(self, prompt: str) -> "ResponseParser | None":
        """What finds thinking and answer in the model's text, if it has a format that is described.

        Args:
            prompt: the rendered chat, which may begin the answer.
        """
        template = getattr(self._hf, "response_template", None) or self._known_format()
        return None if template is None else ResponseParser(self._hf, template, prompt)

    def _known_format(self) -> Mapping[str, Any] | None:
        """The format of models that need their special tokens to be understood and often ship no description."""
        tokens = set(self._hf.all_special_tokens)
        return _HARMONY if {"<|channel|>", "<|message|>"} <= tokens else None

    def _template_variables(self) -> set[str]:
        """What the template asks of its caller, besides messages."""
        import jinja2
        from jinja2.meta import find_undeclared_variables

        template = self._hf.get_chat_template() if self.has_chat_template else ""
        # blocks that mark answers for training mean nothing to plain jinja2
        template = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateError:  # rendering it will say what is wrong
            return set()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised, none is added unless asked."""
        ids = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, exactly as the tokenizer joins it (no clean-up of spaces)."""
        text = self._hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def vocabulary(self) -> Mapping[str, int]:
        """Every token and its id."""
        vocabulary: dict[str, int] = self._hf.get_vocab()
        return vocabulary


# What templates call the variable that switches thinking (Qwen3, GLM-4.5, SmolLM3; Granite, DeepSeek-V3.1).
_THINKING_SWITCHES = ("enable_thinking", "thinking")

# Marks in a rendered chat where the message to be continued leaves off.
_END_MARK = "[the message goes on here]"

# OpenAI's harmony format (gpt-oss): channels for thinking and answer, told apart by special tokens only.
_HARMONY: Mapping[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open_pattern": r"<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>",
            "close": ["<|end|>", "<|call|>"],
            "repeats": True,
            "join": "\n",
            "content": "text",
        },
        "content": {"open_pattern": r"<\|channel\|>final[^<]*<\|message\|>", "close": ["<|return|>", "<|end|>"]},
    },
}

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def _as_turn(message: Message) -> dict[str, str]:
    """A message in the words of templates, which have several for thinking."""
    turn = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn |= dict.fromkeys(_REASONING_FIELDS, message.reasoning)
    return turn


def _mark_end(turn: dict[str, str]) -> None:
    """Marks where the message leaves off: in its thinking, if it did not get further."""
    thinks = not turn["content"] and turn.get(_REASONING_FIELDS[0])
    for name in _REASONING_FIELDS if thinks else ("content",):
        turn[name] += _END_MARK


def _up_to_mark(text: str) -> str:
    # transformers' continue_final_message does the same, but not for thinking in all versions, and it drops blanks
    # at the end that the continued text then has twice.
    begin, found, _ = text.rpartition(_END_MARK)
    if not found:
        raise UsageError("the model's chat template cannot show this answer unfinished, so it cannot be continued")
    return begin


class ResponseParser:
    """Cuts a model's text, special tokens included, into thinking and answer, as its format is described.

    Args:
        hf: the tokenizer.
        template: transformers' description of the format.
        prompt: the rendered chat, which may begin the answer.
    """

    def __init__(self, hf: Any, template: Mapping[str, Any], prompt: str) -> None:
        self._parser = hf.get_response_parser(template, prefix=prompt)
        self._special_tokens = tuple(hf.all_special_tokens)
        self.part: Part = "answer"
        self._pieces(self._parser.initial_events)

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """The pieces that are certain after `text`; an empty one says that a part begins."""
        return self._pieces(self._parser.feed(text))

    def finish(self) -> list[tuple[Part, str]]:
        """What was held back, at the end of the text."""
        try:
            _, events = self._parser.finalize()
        except ValueError:  # a part that must be there is not: nothing to a chat
            return []
        return self._pieces(events)

    def _pieces(self, events: Iterable[Mapping[str, Any]]) -> list[tuple[Part, str]]:
        pieces: list[tuple[Part, str]] = []
        for event in events:
            part: Part = "reasoning" if event["field"] in _REASONING_FIELDS else "answer"
            self.part = "answer" if event["type"] == "region_close" else part
            if event["type"] != "region_close":
                pieces.append((part, self._without_special_tokens(event.get("text", ""))))
        return pieces

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder; never remote code, never the network.

    Raises:
        CorruptCheckpointError: the files are missing or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorruptCheckpointError(
            f"the tokenizer in {folder} cannot be read: {reason}", hint="download or copy the model's folder again"
        ) from error
