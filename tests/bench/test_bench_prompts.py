"""The built-in questions, and files of questions."""

import json

import pytest

from specchat.bench.prompts import BUILT_IN, read_questions
from specchat.errors import UsageError

CATEGORIES = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


def test_built_in_questions_cover_the_categories():
    assert {question.category for question in BUILT_IN} == CATEGORIES
    assert all(len(question.turns) == 2 for question in BUILT_IN)
    assert len({question.question_id for question in BUILT_IN}) == len(BUILT_IN)
    # two turns and two answers fit into 1,024 tokens
    assert all(len(turn) < 400 for question in BUILT_IN for turn in question.turns)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


GOOD = {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": ["ignored"]}


def test_files_in_the_form_of_mt_bench(tmp_path):
    (first, second) = read_questions(
        write(tmp_path / "q.jsonl", GOOD, "", {"question_id": "x", "category": "math", "turns": ["c"]})
    )
    assert (first.question_id, first.category, first.turns) == ("81", "writing", ("a", "b"))
    assert second.question_id == "x"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        pytest.param("[" * 200_000, "line 2 is nested too deeply", id="deep"),
        pytest.param("1" * 5000, "line 2 is not JSON: Exceeds the limit", id="long number"),
        ("[1]", "line 2 is not an object"),
        ({**GOOD, "turns": []}, "line 2 has no valid turns"),
        ({**GOOD, "turns": ["a", 1]}, "line 2 has no valid turns"),
        ({**GOOD, "turns": "a"}, "line 2 has no valid turns"),
        ({**GOOD, "question_id": True}, "line 2 has no valid question_id"),
        ({**GOOD, "category": " "}, "line 2 has no valid category"),
        (GOOD, "question_id 81"),
    ],
)
def test_errors_name_line_and_key(tmp_path, line, words):
    with pytest.raises(UsageError, match=words):
        read_questions(write(tmp_path / "q.jsonl", GOOD, line))


def test_empty_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no questions"):
        read_questions(write(tmp_path / "q.jsonl", ""))
    with pytest.raises(UsageError, match="No such file"):
        read_questions(tmp_path / "none")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_questions(tmp_path / "b")
