"""The questions of the bench: built-in ones, or a file in MT-Bench's format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specchat.errors import UsageError
from specchat.files import read_given

_FORM = 'write one object per line, such as {"question_id": 1, "category": "math", "turns": ["...", "..."]}'


@dataclass(frozen=True)
class Question:
    """The user's side of one conversation.

    Attributes:
        question_id: name of the question, the same across runs and files.
        category: kind of question, for example "math".
        turns: messages of the user, in order.
    """

    question_id: str
    category: str
    turns: tuple[str, ...]


BUILT_IN = (
    Question(
        "writing-1",
        "writing",
        (
            "Write the opening of a short story in which a lighthouse keeper finds a letter addressed to nobody.",
            "Now write the letter itself, in the voice of someone who has never seen the sea.",
        ),
    ),
    Question(
        "roleplay-1",
        "roleplay",
        (
            "You are the owner of a small bicycle workshop. A customer asks why the chain keeps falling off. Answer.",
            "The customer wants to do it alone. Stay in your part and explain the first three steps.",
        ),
    ),
    Question(
        "reasoning-1",
        "reasoning",
        (
            "Anna is taller than Ben, Ben is taller than Clara, and David is shorter than Clara. "
            "Who is the second tallest? Explain how you know.",
            "Now Eve joins them, and she is taller than David but shorter than Clara. List all five by height.",
        ),
    ),
    Question(
        "math-1",
        "math",
        (
            "A baker sells rolls in bags of 6 and bags of 9. How can she sell exactly 48 rolls? Show the steps.",
            "Which numbers of rolls up to 30 can she not sell with these bags, and why?",
        ),
    ),
    Question(
        "coding-1",
        "coding",
        (
            "Write a Python function that returns the words of a text that occur more than once, in order of "
            "appearance.",
            "Change it so that case and punctuation do not matter, and add two short examples.",
        ),
    ),
    Question(
        "extraction-1",
        "extraction",
        (
            "From this note, list who must do what by when: 'Tom promised the drawings for Monday. Mira checks the "
            "costs until the 14th. If both are done, Lena sends the offer on the 16th.'",
            "Write the same as JSON with the keys person, task and date.",
        ),
    ),
    Question(
        "stem-1",
        "stem",
        (
            "Why does a metal spoon feel colder than a wooden one in the same room? Explain it simply.",
            "Describe an experiment with things from a kitchen that shows this.",
        ),
    ),
    Question(
        "humanities-1",
        "humanities",
        (
            "What changed in everyday life when printed books became cheap? Name three things.",
            "Compare one of them with what the internet changed, in a few sentences.",
        ),
    ),
)


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read questions from a JSONL file in MT-Bench's format.

    Args:
        path: file with one object per line: question_id, category, turns. Other keys are ignored.

    Raises:
        UsageError: the file cannot be read, has no questions, or has an invalid line.
    """
    try:
        lines = read_given(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--prompts cannot read {path}: {reason}") from error
    questions = tuple(_question(path, i, line) for i, line in enumerate(lines, start=1) if line.strip())
    if not questions:
        raise UsageError(f"{path} has no questions", hint=_FORM)
    seen = [question.question_id for question in questions]
    twice = next((name for name in seen if seen.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"{path} has two questions with the question_id {twice}", hint="give each question its own question_id"
        )
    return questions


def _question(path: Path, number: int, line: str) -> Question:
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise UsageError(f"{path} line {number} is nested too deeply", hint=_FORM) from error
    except ValueError as error:  # invalid JSON, or a number with too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UsageError(f"{path} line {number} is not JSON: {reason}", hint=_FORM) from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} line {number} is not an object", hint=_FORM)
    for key, is_right in (("question_id", _is_id), ("category", _is_text), ("turns", _are_turns)):
        if not is_right(values.get(key)):
            raise UsageError(f"{path} line {number} has no valid {key}", hint=_FORM)
    return Question(str(values["question_id"]), values["category"], tuple(values["turns"]))


def _is_id(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))
