"""A model's description of its answers (`response_template`), whose expressions run within limits of time.

The description comes from a model's folder. An expression in it may take forever on some texts, or match nothing again
and again at one place.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from specchat.errors import CorruptCheckpointError, is_lack_of_memory
from specchat.records.chat import Part
from specchat.threads import run_within

T = TypeVar("T")

# Names of thinking in templates and descriptions.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# OpenAI's harmony format (gpt-oss): channels for thinking and answer, separated by special tokens only.
HARMONY: Mapping[str, Any] = {
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

_HINT = "download or copy the model's folder again"

# Real expressions take microseconds per token.
PARSE_S = 10.0
# The parser's next step depends on the open part and on the place alone: a long stay at one place never ends.
_MOST_AT_ONE_PLACE = 10_000


class ResponseParser:
    """A parser that splits a model's text, special tokens included, into thinking and answer.

    Args:
        hf: tokenizer of transformers.
        template: description of the format, as transformers defines it.
        prompt: rendered chat, which may contain the start of the answer.
        limit_s: processor time of all searches in the prompt and the answer.

    Raises:
        CorruptCheckpointError: the description is invalid, or its expressions take too long.
    """

    def __init__(self, hf: Any, template: Mapping[str, Any], prompt: str, *, limit_s: float = PARSE_S) -> None:
        self._budget = _Budget(limit_s)
        try:
            # compiling an expression may take long as well
            limited = run_within(limit_s, lambda: _limited(template, self._budget))
            self._parser = hf.get_response_parser(limited, prefix=prompt)
        except TimeoutError as error:
            raise _endless() from error
        except Exception as error:
            if is_lack_of_memory(error):
                raise
            raise CorruptCheckpointError(
                "tokenizer_config.json: response_template does not describe the parts of an answer", hint=_HINT
            ) from error
        self._special_tokens = tuple(hf.all_special_tokens)
        self.part: Part = "answer"
        self._pieces(self._parser.initial_events)

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """Parse more text and return the pieces that are certain now; an empty piece marks the start of a part.

        Raises:
            CorruptCheckpointError: the expressions take too long.
        """
        return self._pieces(self._events(lambda: self._parser.feed(text))) if text else []

    def finish(self) -> list[tuple[Part, str]]:
        """Return the pieces that were held back until the end of the text.

        Raises:
            CorruptCheckpointError: the expressions take too long.
        """
        return self._pieces(self._events(lambda: self._parser.finalize()[1]))

    def _events(self, parse: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterable[Mapping[str, Any]]:
        try:
            return parse()
        except TimeoutError as error:
            raise _endless() from error

    def _pieces(self, events: Iterable[Mapping[str, Any]]) -> list[tuple[Part, str]]:
        pieces: list[tuple[Part, str]] = []
        for event in events:
            part: Part = "reasoning" if event["field"] in REASONING_FIELDS else "answer"
            self.part = "answer" if event["type"] == "region_close" else part
            if event["type"] != "region_close":
                pieces.append((part, self._without_special_tokens(event.get("text", ""))))
        return pieces

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text


def _endless() -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "tokenizer_config.json: the expressions of response_template do not end on this text", hint=_HINT
    )


def _limited(template: Mapping[str, Any], budget: "_Budget") -> Any:
    """Return a description for transformers' parser that finds the parts of an answer, and nothing else.

    A chat needs no values of tool calls. Computing them would run more expressions, and would fail on what the model
    wrote in another form.
    """
    from transformers.utils.chat_parsing.response_templates import load_response_template

    def bounded(pattern: Any) -> "_BoundedPattern | None":
        return None if pattern is None else _BoundedPattern(pattern, budget)

    loaded = load_response_template(dict(template))
    text_only: dict[str, Any] = {
        **{"content": "text", "content_args": {}, "transform": None, "transform_each": False, "optional": True}
    }
    fields = {
        name: replace(field, open_re=bounded(field.open_re), close_re=bounded(field.close_re), **text_only)
        for name, field in loaded.fields.items()
    }
    return replace(loaded, defaults={}, fields=fields, start_anchor_re=bounded(loaded.start_anchor_re))


class _Budget:
    """The time that the searches of one answer may still take.

    Args:
        seconds: processor time of all searches.
    """

    def __init__(self, seconds: float) -> None:
        self._left_s = seconds
        self._place = (0, 0)
        self._num_here = 0

    def arrive(self, place: tuple[int, int]) -> None:
        """Note a search that begins at a place.

        Args:
            place: length of the text, and position in it.

        Raises:
            TimeoutError: the parser does not leave this place.
        """
        self._num_here = self._num_here + 1 if place == self._place else 0
        self._place = place
        if self._num_here > _MOST_AT_ONE_PLACE:
            raise TimeoutError

    def run(self, search: Callable[[float], T]) -> T:
        """Run a search that raises TimeoutError after the seconds that it is given.

        Raises:
            TimeoutError: no time is left.
        """
        if self._left_s <= 0:
            raise TimeoutError
        begin = time.thread_time()
        try:
            return search(self._left_s)
        finally:
            self._left_s -= time.thread_time() - begin


class _BoundedPattern:
    """A compiled expression of the package regex, which can end a search and lets other threads run meanwhile.

    Args:
        pattern: compiled expression.
        budget: time of this and other expressions.
    """

    def __init__(self, pattern: Any, budget: _Budget) -> None:
        self._pattern = pattern
        self._budget = budget

    def search(self, text: str, position: int, *, partial: bool = False) -> Any:
        """Return the first match from a position on, or None."""
        self._budget.arrive((len(text), position))
        return self._budget.run(lambda left_s: self._pattern.search(text, position, partial=partial, timeout=left_s))

    def finditer(self, text: str) -> Iterator[Any]:
        """Yield all matches."""
        found = self._budget.run(lambda left_s: self._pattern.finditer(text, timeout=left_s))
        while (match := self._budget.run(lambda _: next(found, None))) is not None:
            yield match
