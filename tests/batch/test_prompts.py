"""Files of prompts: every usable line is found, and every other line says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specchat.batch.prompts import PromptLine, read_prompts
from specchat.errors import UsageError
from specchat.records.chat import Message


def read(folder: Path, *lines: object) -> tuple[PromptLine, ...]:
    path = folder / "in.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines), encoding="utf-8")
    return read_prompts(path)


def test_lines_of_all_kinds(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    lines = read(
        tmp_path,
        {"id": "a", "prompt": "one", "max_tokens": 5, "seed": 9, "temperature": 0.5, "top_k": 3},
        "",
        {"messages": messages, "temperature": None},
        {"id": 7, "question_id": 81, "category": "writing", "turns": ["first", "second"]},
    )
    assert lines == (
        PromptLine(
            1, "a", (Message("user", "one"),), {"temperature": 0.5, "top_k": 3, "seed": 9, "max_tokens": 5}, None
        ),
        PromptLine(3, 3, (Message("system", "Be brief."), Message("user", "Hi")), {}),
        PromptLine(4, 7, (Message("user", "first"),), {}),
    )
    assert isinstance(lines[0].values["seed"], int) and isinstance(lines[0].values["temperature"], float)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ({"id": 1.5, "prompt": "x"}, "id"),
        ({"id": "", "prompt": "x"}, "id"),
        ({"id": True, "prompt": "x"}, "id"),
        ({}, "no prompt, messages or turns"),
        ({"prompt": "x", "turns": ["y"]}, "prompt and turns"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"turns": []}, "turns"),
        ({"turns": [5]}, "turns"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": ""}]}, "content"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "temperature": True}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_token": 5}, "did you mean max_tokens"),
        ('{"prompt": "\\ud800"}', "not valid text"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
    ],
)
def test_a_bad_line_is_kept_with_its_error(tmp_path: Path, line: object, words: str):
    good, bad = read(tmp_path, {"prompt": "fine"}, line)
    assert good.error is None
    assert bad.error is not None and words in bad.error and "\n" not in bad.error
    assert bad.number == 2 and bad.messages == () and bad.values == {}


def test_an_id_is_used_once(tmp_path: Path):
    first, second, third = read(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, {"prompt": "z"})
    assert first.error is third.error is None
    assert second.error is not None and "line 1" in second.error and second.id == 2


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        read_prompts(path)
    with pytest.raises(UsageError, match="--prompts cannot read"):
        read_prompts(tmp_path / "missing.jsonl")
