"""Requests that arrive while others are answered, and the seats that they get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import Event

import pytest
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.engine import Engine
from specchat.engine.seats import choose_seat
from specchat.records.generation import Request, Sampling, Step

SEATS = 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A streamed model without a draft, so that each pass writes one token of each answer."""
    model = random_model(make_config("llama"))
    source = save(model, tmp_path_factory.mktemp("seats"))
    num_layers = make_config("llama").num_hidden_layers
    with load_engine(make_plan(source, None, num_layers=num_layers, resident=(0,), seats=SEATS), source, None) as found:
        yield found


def request_of(length: int, num_tokens: int = 6, **changes) -> Request:
    return replace(
        Request(tuple(random_prompt(length, VOCAB, seed=length)), Sampling(), max_tokens=num_tokens), **changes
    )


def text_of(steps: list[tuple[int, Step]], index: int) -> list[int]:
    return [token for number, step in steps for token in step.token_ids if number == index]


def alone(engine: Engine, request: Request) -> list[int]:
    engine.forget()
    return write(engine, list(request.prompt_ids), request.sampling, request.max_tokens or 0)[0]


def test_a_request_joins_a_running_pass(engine: Engine):
    first, second = request_of(9), request_of(14)
    expected = [alone(engine, each) for each in (first, second)]
    engine.forget()
    looks: list[int] = []

    def arriving() -> Iterator[Request | None]:
        yield first
        for look in range(100):
            looks.append(look)
            yield second if look == 2 else None

    steps = list(engine.generate_many(arriving()))
    assert [text_of(steps, index) for index in (0, 1)] == expected
    sharing = [step.num_sharing for number, step in steps if number == 1]
    assert sharing[:4] == [2, 2, 2, 2] and sharing[-1] == 1
    assert len(looks) < 12, "without answers in progress, the iterator ends instead of asking again"


def test_without_requests_the_iterator_ends_and_can_be_begun_again(engine: Engine):
    request = request_of(9, 3)
    arriving = iter([None, request, None, request])
    assert list(engine.generate_many(arriving)) == []
    assert len(list(engine.generate_many(arriving))) == 6


def test_a_request_that_is_cancelled_while_it_waits_costs_no_pass(engine: Engine):
    cancelled = Event()
    cancelled.set()
    (step,) = list(engine.generate_many([request_of(9, cancel=cancelled)]))
    assert step == (0, Step.without_pass("interrupt"))
    steps = list(engine.generate_many([request_of(9, cancel=cancelled), request_of(5)]))
    assert [number for number, _ in steps] == [0, *[1] * 6]


def test_each_of_two_chats_keeps_its_seat(engine: Engine):
    """Two chats take turns, and no rows of their earlier turns are computed again."""
    engine.forget()
    chats = {name: random_prompt(length, VOCAB, seed=length) for name, length in (("a", 40), ("b", 25))}
    for turn, name in enumerate("abbaab"):
        prompt = [*chats[name], *random_prompt(3, VOCAB, seed=turn)]
        request = Request(tuple(prompt), Sampling(), max_tokens=5)
        steps = list(engine.generate_many([request]))
        if turn > 1:
            # All rows are held, except that of the last token of the answer.
            assert steps[0][1].cached_rows == len(chats[name]) - 1
        chats[name] = prompt + text_of(steps, 0)


@pytest.mark.parametrize(
    ("held", "prompt", "seats", "expected"),
    [
        pytest.param(["", ""], "abc", [1, 0], 1, id="new seats: the first"),
        pytest.param(["abcd", ""], "abcdef", [1, 0], 0, id="goes on"),
        pytest.param(["abcd", "abcdef"], "abcdefg", [0, 1], 1, id="goes on with the longer one"),
        pytest.param(["abcd", ""], "abx", [1, 0], 0, id="keeps half"),
        pytest.param(["abcd", ""], "axy", [1, 0], 1, id="keeps less than half"),
        pytest.param(["abcdefgh", ""], "abc", [1, 0], 0, id="answers again"),
        pytest.param(["abcd", "abcd"], "xyz", [1, 0], 1, id="all others: the least recent"),
        pytest.param(["abcd", "xy"], "abcdef", [1], 1, id="taken"),
    ],
)
def test_choose_seat(held: list[str], prompt: str, seats: list[int], expected: int):
    tokens = [[ord(letter) for letter in each] for each in held]
    assert choose_seat(seats, tokens, tuple(ord(letter) for letter in prompt)) == expected
