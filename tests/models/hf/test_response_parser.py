"""Descriptions of answers that come from a model's folder: none holds the program, whatever its expressions are."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specchat.errors import CorruptCheckpointError
from specchat.models.hf.response_parser import ResponseParser

# Tries every way to cut a row of x into pieces: 10^12 ways for 60 of them.
EVIL = "(?:x|xx)+y"
ROW = "x" * 60 + "z"
LIMIT_S = 0.1


@pytest.fixture(scope="module")
def hf() -> Any:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))


def description(**content: Any) -> dict[str, Any]:
    return {"start_anchor": "[assistant]", "fields": {"thinking": {"open": "<<", "close": ">>"}, "content": content}}


def parser(hf: Any, template: dict[str, Any], prompt: str = "[assistant]") -> ResponseParser:
    return ResponseParser(hf, template, prompt, limit_s=LIMIT_S)


@pytest.mark.parametrize("where", ["open_pattern", "close_pattern"])
def test_an_expression_that_does_not_end_is_an_error_of_the_model(hf: Any, where: str):
    found = parser(hf, description(**{where: EVIL}))
    assert "".join(text for _, text in found.feed("Hello ")) == ("Hello " if where == "close_pattern" else "")
    begin = time.thread_time()
    for _ in range(3):  # also the next time
        with pytest.raises(CorruptCheckpointError, match="do not end on this text"):
            found.feed(ROW)
    with pytest.raises(CorruptCheckpointError, match="do not end on this text"):
        found.finish()
    assert time.thread_time() - begin < 3 * LIMIT_S


def test_the_limit_is_that_of_the_whole_answer(hf: Any):
    """Searches that each end in time, one for every piece of the text."""
    found = parser(hf, description(close_pattern="(?:x|xx)+y"))
    with pytest.raises(CorruptCheckpointError, match="do not end on this text"):
        for _ in range(10_000):
            found.feed("x" * 20 + "z")


@pytest.mark.parametrize("key", ["start_anchor_pattern", "fields"])
def test_expressions_on_the_prompt_are_limited_too(hf: Any, key: str):
    template = description(close_pattern=EVIL)
    if key == "start_anchor_pattern":
        template = {"start_anchor_pattern": EVIL, "fields": {"content": {"close": "!"}}}
    with pytest.raises(CorruptCheckpointError, match="do not end on this text"):
        parser(hf, template, "[assistant]" + ROW)


def test_expressions_that_match_nothing_for_ever(hf: Any):
    """A part that opens and closes before the same letter leaves the parser where it was."""
    fields = {"content": {"open_pattern": "(?=H)", "close_pattern": "(?=H)"}}
    with pytest.raises(CorruptCheckpointError, match="do not end on this text"):
        parser(hf, {"start_anchor": "[assistant]", "fields": fields}).feed("Hello you")


@pytest.mark.parametrize("pattern", ["(", "(?P<a>x)", "(" * 5000 + ")" * 5000, 3, None])
def test_invalid_expressions_are_errors_of_the_model(hf: Any, pattern: object):
    with pytest.raises(CorruptCheckpointError, match="does not describe the parts"):
        parser(hf, description(open_pattern=pattern, close="!"))


TOOLS: dict[str, Any] = {
    "start_anchor": "[assistant]",
    "defaults": {"role": "assistant", "content": 3},
    "fields": {
        "calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True, "transform": ["{content}"]},
        "pairs": {"open": "<xml>", "close": "</xml>", "content": "xml-inline", "content_args": {"tag_pattern": EVIL}},
        "number": {"open": "<n>", "close": "</n>", "content": "int", "optional": False},
        "content": {"close": "<end>"},
    },
}


def test_values_of_tool_calls_are_not_computed(hf: Any):
    """The model writes no JSON, no number, and what an evil expression never ends on."""
    found, text = parser(hf, TOOLS), f"Yes <call>{{no</call> or <xml>{ROW}</xml><n>many</n> no"
    pieces = [piece for letter in text for piece in found.feed(letter)] + found.finish()
    assert "".join(piece for _, piece in pieces) == f"Yes {{no or {ROW}many no"


def test_what_was_held_back_comes_at_the_end_of_an_unfinished_text(hf: Any):
    found = parser(hf, TOOLS)
    assert found.feed("Yes <ca") == [("answer", ""), ("answer", "Yes ")]
    assert [text for _, text in found.finish()] == ["<ca"]
