"""/set in our form and in ollama's."""

import pytest
from support.fake_engine import EOS, TOKENIZER, FakeEngine

from specchat.chat.assignments import parse_assignment
from specchat.chat.session import ChatSession
from specchat.chat.settings import SETTABLE, parse_value
from specchat.errors import UsageError
from specchat.records.generation import Sampling


def session_of(answer="one END two"):
    engine = FakeEngine([[*TOKENIZER.encode(answer), EOS]])
    return ChatSession(engine, TOKENIZER, sampling=Sampling(seed=3), stop_ids=frozenset({EOS}))


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("temperature=0.7", ("temperature", "0.7")),
        ("temperature 0.7", ("temperature", "0.7")),
        ("temperature = 0.7", ("temperature", "0.7")),
        ("parameter temperature 0.7", ("temperature", "0.7")),
        ("parameter num_predict 50", ("max_tokens", "50")),
        ("parameter repeat_penalty 1.1", ("repetition_penalty", "1.1")),
        ('system "You are = brief."', ("system", '"You are = brief."')),
        ("system=a=b", ("system", "a=b")),
        ('parameter stop "a" "b"', ("stop", '"a" "b"')),
        ("think", ("think", "on")),
        ("nothink", ("think", "off")),
        ("think=off", ("think", "off")),
    ],
)
def test_assignments(typed, parsed):
    assert parse_assignment(typed) == parsed


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("temperature", "KEY=VALUE"),
        ("parameter", "KEY=VALUE"),
        ("verbose", "/verbose"),
        ("parameter num_ctx 4096", "--ctx"),
        ("vram=8GiB", "--vram"),
        ("format json", "--json"),
    ],
)
def test_what_cannot_be_set_names_what_can(typed, words):
    with pytest.raises(UsageError) as error:
        parse_assignment(typed)
    assert words in f"{error.value.message} {error.value.hint}"


@pytest.mark.parametrize(
    ("key", "typed", "value", "shown"),
    [
        ("stop", '"END" "two words"', ("END", "two words"), "'END' 'two words'"),
        ("stop", "two words", ("two words",), "'two words'"),
        ("stop", "none", (), "none"),
        ("system", '"Be brief."', "Be brief.", "Be brief."),
        ("system", '"""Be\nbrief."""', "Be\nbrief.", "Be\nbrief."),
        ("system", "none", None, "none"),
        ("think", "off", False, "off"),
        ("think", "default", None, "model default"),
        ("overflow", "drop-oldest", "drop-oldest", "drop-oldest"),
        ("max-tokens", "none", None, "none"),
        ("Temperature", '"0.5"', 0.5, "0.5"),
    ],
)
def test_everything_that_is_listed_can_be_set(key, typed, value, shown):
    name, parsed = parse_value(key, typed)
    assert parsed == value
    session = session_of()
    assert session.set_value(key, typed).value == shown
    listed = {setting.name: setting for setting in session.settings()}
    assert (listed[name].value, listed[name].source) == (shown, "/set")
    assert set(listed) == set(SETTABLE)


@pytest.mark.parametrize(
    ("key", "typed"), [("stop", '""'), ("stop", '"open'), ("think", "maybe"), ("overflow", "burst"), ("seed", "x")]
)
def test_invalid_values_are_refused(key, typed):
    with pytest.raises(UsageError):
        parse_value(key, typed)


def test_a_random_seed_is_drawn():
    assert len({parse_value("seed", "random") for _ in range(5)}) > 1


def test_a_stop_string_that_was_set_ends_the_answer():
    session = session_of()
    session.set_value("stop", "END")
    *_, turn = session.ask("x")
    assert (turn.message.content, turn.finish_reason) == ("one ", "stop")
