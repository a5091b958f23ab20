"""A model's tokenizer, chat template and response parser."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from specchat.errors import AllocationError, CorruptCheckpointError, UsageError, is_lack_of_memory
from specchat.models.hf.chat_template import WITHOUT_TEMPLATE, ChatTemplate
from specchat.models.hf.response_parser import HARMONY, REASONING_FIELDS, ResponseParser
from specchat.models.hf.tokenizer_files import is_failure, read_tokenizer
from specchat.records.chat import Message
from specchat.threads import run_within


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        hf: tokenizer of transformers, which this object owns.

    Attributes:
        other_templates: names of the chat templates if none of them is the default one.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self.other_templates: tuple[str, ...] = ()
        if isinstance(hf.chat_template, dict):
            named, hf.chat_template = hf.chat_template, hf.chat_template.get("default")
            self.other_templates = () if hf.chat_template else tuple(sorted(named))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template; base models have none."""
        return bool(self._hf.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        """End-of-sequence id; None if the tokenizer has none."""
        token_id = self._hf.eos_token_id
        return None if token_id is None else int(token_id)

    @property
    def backend(self) -> Any | None:
        """Underlying `tokenizers.Tokenizer`; None for a tokenizer written in Python."""
        return getattr(self._hf, "backend_tokenizer", None)

    @cached_property
    def thinking_switch(self) -> str | None:
        """Name of the template's variable that turns thinking on and off; None if there is none."""
        return next((name for name in _THINKING_SWITCHES if name in self._template_variables()), None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        ending: Literal["answer", "continue", "none"] = "answer",
        thinking: bool | None = None,
    ) -> str:
        """Render a chat by the model's template.

        Args:
            messages: all messages of the chat, the system prompt first.
            ending: end of the text: "answer" adds the start of the next answer, "continue" stops within the last
                message so that it can go on, "none" adds nothing.
            thinking: value for the template's thinking switch; without effect if the template has none.

        Raises:
            UsageError: messages that the template refuses, such as a system prompt that it does not support; or a
                template that fails or renders nothing.
        """
        turns = [_as_turn(message) for message in messages]
        if ending == "continue":
            _mark_end(turns[-1])
        if self._wants_parts:
            turns = [_in_parts(turn) for turn in turns]
        switches = {} if thinking is None or self.thinking_switch is None else {self.thinking_switch: thinking}
        text = self._rendered(turns, is_prompt=ending == "answer", **switches)
        if ending == "answer" and not text:
            raise UsageError("the model's chat template renders nothing for this chat", hint=WITHOUT_TEMPLATE)
        return _up_to_mark(text) if ending == "continue" else text

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows text only as a list of parts, as templates of multimodal models do."""
        turn = {"role": "user", "content": _PROBE}
        return not self._shows_probe(turn) and self._shows_probe(_in_parts(turn))

    def _shows_probe(self, turn: dict[str, Any]) -> bool:
        try:
            return _PROBE in self._rendered([turn], is_prompt=True)
        except UsageError:
            return False

    def _rendered(self, turns: list[dict[str, Any]], *, is_prompt: bool, **switches: bool) -> str:
        names = {**self._hf.special_tokens_map, **switches}
        return self._template.render(turns, is_prompt=is_prompt, names=names)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._hf.get_chat_template())

    def response_parser(self, prompt: str) -> ResponseParser | None:
        """Return a parser that separates thinking from the answer; None if no description of the format exists.

        Args:
            prompt: rendered chat, which may contain the start of the answer.

        Raises:
            CorruptCheckpointError: the model's description of its format is invalid, or takes too long on the prompt.
        """
        template = getattr(self._hf, "response_template", None) or self._known_format()
        return None if template is None else ResponseParser(self._hf, template, prompt)

    def _known_format(self) -> Mapping[str, Any] | None:
        """Return the format of models that separate parts by special tokens and often ship no description of it."""
        tokens = set(self._hf.all_special_tokens)
        return HARMONY if {"<|channel|>", "<|message|>"} <= tokens else None

    def _template_variables(self) -> set[str]:
        """Return the variables that the template expects from its caller."""
        import jinja2
        from jinja2.meta import find_undeclared_variables

        template = self._hf.get_chat_template() if self.has_chat_template else ""
        # plain jinja2 does not know the blocks that mark answers for training
        template = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return find_undeclared_variables(environment.parse(template))
        except (jinja2.TemplateError, RecursionError):  # `render` reports the error
            return set()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of `text`, in which special tokens are recognised; none are added by default.

        Raises:
            CorruptCheckpointError: the tokenizer fails on the text, or does not end within a generous time.
            AllocationError: there is no memory for a thread.
        """

        def run() -> list[int]:
            return list(self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

        limit_s = _ENCODE_S + len(text) / _FEWEST_CHARACTERS_PER_S
        with _converted("this text"):
            return [int(i) for i in run_within(limit_s, run)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids` exactly as the tokenizer joins it, without clean-up of spaces.

        Raises:
            CorruptCheckpointError: the tokenizer fails on these tokens.
        """
        with _converted("these tokens"):
            text = self._hf.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text

    def vocabulary(self) -> Mapping[str, int]:
        """Return all tokens with their ids."""
        vocabulary: dict[str, int] = self._hf.get_vocab()
        return vocabulary


# Names of the thinking switch in templates (Qwen3, GLM-4.5, SmolLM3; Granite, DeepSeek-V3.1).
_THINKING_SWITCHES = ("enable_thinking", "thinking")

_HINT = "download or copy the model's folder again"

# Tokenizers take about a microsecond per character.
_ENCODE_S = 20.0
_FEWEST_CHARACTERS_PER_S = 20_000

# Stands for the text of a message, to see whether a template shows the text.
_PROBE = "specchatprobe"

# Marks the end of the message to be continued in a rendered chat.
_END_MARK = "[the message goes on here]"


@contextmanager
def _converted(what: str) -> Iterator[None]:
    """Convert any error of a tokenizer: its parts come from a file, and fail in any way on some texts.

    Args:
        what: input of the tokenizer, for the message.
    """
    try:
        yield
    except AllocationError:  # the machine's fault, not the tokenizer's
        raise
    except TimeoutError as error:
        raise CorruptCheckpointError(f"the model's tokenizer does not end on {what}", hint=_HINT) from error
    except BaseException as error:
        if not is_failure(error) or is_lack_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptCheckpointError(f"the model's tokenizer fails on {what}: {reason}", hint=_HINT) from error


def _in_parts(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose text is a list of parts."""
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _as_turn(message: Message) -> dict[str, Any]:
    """Convert a message for templates, which use several names for thinking."""
    turn = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn |= dict.fromkeys(REASONING_FIELDS, message.reasoning)
    return turn


def _mark_end(turn: dict[str, Any]) -> None:
    """Append the end mark to the message, or to its thinking if there is no answer yet."""
    thinks = not turn["content"] and turn.get(REASONING_FIELDS[0])
    for name in REASONING_FIELDS if thinks else ("content",):
        turn[name] += _END_MARK


def _up_to_mark(text: str) -> str:
    # transformers' continue_final_message does not handle thinking in all versions. It also drops trailing blanks,
    # which the continued text would then repeat.
    begin, found, _ = text.rpartition(_END_MARK)
    if not found:
        raise UsageError("the answer cannot be continued: the model's chat template cannot render an unfinished answer")
    return begin


# The tokenizer of the last check, until it is loaded: reading one of 128,000 tokens takes half a second.
_checked: dict[Path, Tokenizer] = {}


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer loads; the next `load_tokenizer` of this folder returns the tokenizer that was read.

    Raises:
        ModelError, NotAvailableError: the errors of `load_tokenizer`.
    """
    tokenizer = load_tokenizer(folder)
    _checked.clear()
    _checked[folder] = tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer from a model's folder, without remote code and without the network.

    Raises:
        ModelNotFoundError: there is no tokenizer.
        CorruptCheckpointError: invalid files.
        NotAvailableError: the tokenizer needs a package that is not installed, or a newer one.
    """
    return _checked.pop(folder, None) or Tokenizer(read_tokenizer(folder))
