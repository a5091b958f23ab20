"""The server over the demo pair: texts are those of the engine, whatever shares its passes, in OpenAI's objects."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import make_plan
from support.loading import load_engine
from support.serving import Gate, Reply, Served, serving, text_of, wait_until

from specchat.engine.engine import Engine
from specchat.loading.engine import stop_ids
from specchat.models.catalog.ref import demo_source
from specchat.models.checkpoint.generation_config import load_generation_defaults
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling

SEATS = 2
QUESTION = "Who are you?"


@dataclass
class World:
    """A server over a real engine whose passes can be held."""

    served: Served
    engine: Engine
    gate: Gate

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.served.url, api_key="none", max_retries=0)

    def alone(self, text: str, num_tokens: int, sampling: Sampling = Sampling()) -> str:  # noqa: B008
        """The answer of the engine itself, without a server."""
        ids = TOKENIZER.encode(TOKENIZER.render([Message("user", text)]))
        written = []
        for step in self.engine.generate(ids, sampling, stop_ids=STOP_IDS, max_tokens=num_tokens):
            written += step.token_ids
        return TOKENIZER.decode(written)


TARGET = demo_source("target")
TOKENIZER = load_tokenizer(TARGET.path)
DEFAULTS = load_generation_defaults(TARGET.path)
STOP_IDS = stop_ids(DEFAULTS, TOKENIZER)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    draft = demo_source("draft")
    num_layers = json.loads((TARGET.path / "config.json").read_text())["num_hidden_layers"]
    plan = make_plan(TARGET, draft, num_layers=num_layers, tree_budget=8, seats=SEATS)
    with load_engine(plan, TARGET, draft) as engine:
        gate, forward = Gate(), engine.target.forward

        def held(*arguments: Any, **named: Any) -> Any:
            gate()
            return forward(*arguments, **named)

        engine.target.forward = held  # type: ignore[method-assign]
        vocab_size = engine.target.vocab_size
        with serving(engine, TOKENIZER, plan, vocab_size=vocab_size, model_defaults=DEFAULTS) as served:
            yield World(served, engine, gate)


def greedy(**fields: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": 24, **fields}


def messages(text: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_client_gets_the_engines_text(world: World):
    expected = world.alone(QUESTION, 24)
    whole = world.client.chat.completions.create(model="tiny", messages=messages(), **greedy())
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    stream = world.client.chat.completions.create(model="tiny", messages=messages(), stream=True, **greedy())
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != whole.id
    assert max(len(each.tree.tokens) for each in world.served.ended[-1][0].answer.steps if each.tree) > 1


def test_the_client_continues_texts(world: World):
    ids = TOKENIZER.encode("Once upon a time", add_special_tokens=True)
    steps = world.engine.generate(ids, Sampling(), stop_ids=STOP_IDS, max_tokens=20)
    expected = TOKENIZER.decode([token for step in steps for token in step.token_ids])
    ask = world.client.completions.create
    for prompt in ("Once upon a time", ["Once upon a time"], ids, [ids]):
        whole = ask(model="org/tiny", prompt=prompt, temperature=0, max_tokens=20)
        assert whole.choices[0].text == expected and whole.object == "text_completion"
    stream = ask(model="org/tiny", prompt="Once upon a time", temperature=0, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_the_client_lists_models(world: World):
    (model,) = world.client.models.list().data
    assert model.id == world.client.models.retrieve("org/tiny").id == world.client.models.retrieve("tiny").id
    assert world.served.ask("GET", "/v1/models/").json == world.served.ask("GET", "/v1/models").json
    with pytest.raises(openai.NotFoundError) as caught:
        world.client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="org/tiny"):
        world.client.chat.completions.create(model="gpt-4o", messages=messages())


def test_drawn_texts_depend_on_their_seed_alone(world: World):
    expected = world.alone(QUESTION, 24, Sampling(temperature=0.9, top_p=0.9, seed=5))
    ask = world.client.chat.completions.create
    fields = {"model": "tiny", "messages": messages(), "temperature": 0.9, "top_p": 0.9, "max_tokens": 24}
    texts = [ask(seed=seed, **fields).choices[0].message.content for seed in (5, 5, 6)]
    assert texts[0] == texts[1] == expected != texts[2]
    random = [ask(**fields) for _ in range(2)]
    seeds = [each.model_extra["specchat"]["seed"] for each in random]
    assert seeds[0] != seeds[1]
    assert ask(seed=seeds[0], **fields).choices[0].message.content == random[0].choices[0].message.content


def test_usage_and_figures(world: World):
    world.engine.forget()
    first = world.served.chat(QUESTION, **greedy()).json
    prompt_ids = TOKENIZER.encode(TOKENIZER.render([Message("user", QUESTION)]))
    usage = first["usage"]
    assert usage["prompt_tokens"] == len(prompt_ids) and usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    figures = first["specchat"]
    steps = world.served.ended[-1][0].answer.steps
    assert figures["steps"] == len(steps) and figures["tokens_per_step"] == 24 / len(steps)
    drafted, accepted = (sum(getattr(step, name) for step in steps) for name in ("tree_nodes", "accepted"))
    assert figures["draft_acceptance"] == accepted / drafted > 0
    assert figures["tok_per_s"] > 0 and figures["ttft_s"] > 0 and figures["queue_s"] >= 0
    answer = first["choices"][0]["message"]
    chat = [*messages(), {"role": "assistant", "content": answer["content"]}, *messages("Really?")]
    again = world.served.post("/v1/chat/completions", {"messages": chat, **greedy()}).json
    # All tokens of the first chat, except those that another text may tokenize differently at its end.
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt_ids) + 20
    assert (
        again["choices"][0]["message"]["content"]
        == world.served.post("/v1/chat/completions", {"messages": chat, **greedy()}).json["choices"][0]["message"][
            "content"
        ]
    )


# --- the raw shapes of other clients ---------------------------------------------------------------------------------


def test_the_shape_of_llm(world: World):
    """Simon Willison's `llm`, with its key in a header and the counts at the end."""
    body = {
        "messages": [{"role": "system", "content": "Be short."}, *messages()],
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        **greedy(),
    }
    reply = world.served.post("/v1/chat/completions", body, Authorization="Bearer DUMMY", Accept="application/json")
    *events, counts = reply.events
    assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == 24
    assert all(event["usage"] is None for event in events)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    whole = world.served.post("/v1/chat/completions", {**body, "stream": False}).json
    assert text_of(events) == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == counts["usage"]["completion_tokens"]


def test_the_shape_of_aichat(world: World):
    """aichat sends parts when there are several, no stream options, and reads chunks until [DONE]."""
    parts = [{"type": "text", "text": QUESTION}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "stream": True, **greedy()}
    events = world.served.post("/v1/chat/completions", body).events
    assert text_of(events) == world.alone(QUESTION, 24)
    assert all("usage" not in event for event in events) and "specchat" in events[-1]


def test_developer_is_system(world: World):
    def prompt_of(role: str) -> tuple[int, ...]:
        body = {"messages": [{"role": role, "content": "Be brief."}, *messages()], **greedy(max_tokens=1)}
        assert world.served.post("/v1/chat/completions", body).status == 200
        return world.served.submitted[-1].request.prompt_ids

    assert prompt_of("developer") == prompt_of("system") != prompt_of("user")


# --- stop strings ----------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(data=st.data())
def test_stop_strings_end_the_text_and_never_show(world: World, data: st.DataObject):
    full = world.alone(QUESTION, 24)
    begin = data.draw(st.integers(1, len(full) - 2))
    stop = full[begin : begin + data.draw(st.integers(1, 8))]
    expected = full[: full.index(stop)]
    asked = greedy(stop=data.draw(st.sampled_from([stop, [stop], ["zebra", stop]])))
    events = world.served.chat(QUESTION, stream=True, **asked).events
    assert text_of(events) == expected and events[-1]["choices"][0]["finish_reason"] == "stop"
    whole = world.served.chat(QUESTION, **asked).json["choices"][0]
    assert whole["message"]["content"] == expected and whole["finish_reason"] == "stop"


# --- several clients -------------------------------------------------------------------------------------------------


def test_two_clients_share_passes_and_a_third_waits(world: World):
    questions = [QUESTION, "Tell me a story about a fox.", "What is the weather like?"]
    expected = [world.alone(each, 24) for each in questions]
    world.gate.close()
    num_before = len(world.served.ended)
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(world.served.chat, questions[0], **greedy())]
        world.gate.wait()  # the first one has a seat
        for number, each in enumerate(questions[1:], 1):
            replies.append(pool.submit(world.served.chat, each, stream=number == 1, **greedy()))
            wait_until(lambda number=number: world.served.worker.num_waiting == number)
        world.gate.open()
        found = [each.result() for each in replies]
    assert text_of(found[1].events) == expected[1]
    assert [each.json["choices"][0]["message"]["content"] for each in (found[0], found[2])] == expected[::2]
    jobs = [job for job, _ in world.served.ended[num_before:]]
    assert max(step.num_sharing for job in jobs for step in job.answer.steps) == SEATS


# --- clients that leave ----------------------------------------------------------------------------------------------


def leaving(world: World, *, streams: bool) -> http.client.HTTPConnection:
    """A client whose answer is held before its first pass."""
    connection = world.served.connect()
    body = {"messages": messages("Tell me a story."), "stream": streams, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    return connection


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_the_engine_within_one_pass(world: World, streams: bool):
    world.engine.forget()
    world.gate.close()
    connection = leaving(world, streams=streams)
    for _ in range(3):
        world.gate.wait()
        world.gate.let_through()
    world.gate.wait()
    job = world.served.submitted[-1]
    num_before = world.gate.num_passes
    connection.close()
    wait_until(job.cancel.is_set)
    world.gate.open()
    wait_until(lambda: (job, None) in world.served.ended)
    assert world.gate.num_passes == num_before + 1 and job.answer.finish_reason is None
    assert world.served.chat(QUESTION, **greedy()).json["choices"][0]["message"]["content"] == world.alone(QUESTION, 24)


def test_a_client_that_leaves_while_it_waits_costs_no_pass(world: World):
    world.gate.close()
    num_before = len(world.served.submitted)
    with ThreadPoolExecutor(SEATS) as pool:
        others = [pool.submit(world.served.chat, QUESTION, **greedy(max_tokens=9)) for _ in range(SEATS)]
        wait_until(lambda: len(world.served.submitted) == num_before + SEATS)
        connection = leaving(world, streams=True)
        wait_until(lambda: len(world.served.submitted) == num_before + SEATS + 1)
        connection.close()
        job = world.served.submitted[-1]
        wait_until(job.cancel.is_set)
        world.gate.open()
        assert all(each.result().status == 200 for each in others)
    wait_until(lambda: (job, None) in world.served.ended)
    assert job.answer.steps == [] and job.queue_s == 0


@pytest.mark.slow
def test_many_clients_that_come_and_go_at_random(world: World):
    """Eight clients, of which some leave in the middle; each other one gets the text of the engine alone."""
    questions = [f"{text}{'?' * (1 + number % 3)}" for number, text in enumerate(["Who are you", "Tell me more"] * 3)]
    expected = {each: world.alone(each, 40) for each in questions}

    def ask(number: int) -> None:
        rng = random.Random(number)
        question, num_tokens = rng.choice(questions), rng.choice([1, 7, 40])
        if rng.random() < 0.4:
            stream = world.client.chat.completions.create(
                model="tiny", messages=messages(question), stream=True, temperature=0, max_tokens=200
            )
            with stream:
                for _ in zip(range(rng.randint(0, 9)), stream, strict=False):
                    pass
            return
        text = world.served.chat(question, stream=True, **greedy(max_tokens=num_tokens))
        assert text_of(text.events) == expected[question] if num_tokens == 40 else text_of(text.events)

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(ask, number) for number in range(300)]:
            each.result()
    wait_until(lambda: len(world.served.ended) == len(world.served.submitted))
    assert not [error for _, error in world.served.ended if error is not None]
    assert (
        world.served.chat(questions[0], **greedy(max_tokens=40)).json["choices"][0]["message"]["content"]
        == (expected[questions[0]])
    )


# --- values at the edge ----------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 1e-9, 1e-4, 0.5, 1.0, 2.0, 1e6, 1e308, 10**30, -5, True, "1", None, [], {}]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(2**70), 2**70),
)


@settings(max_examples=60)
@given(
    fields=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"]), NUMBERS, max_size=5
    )
)
def test_no_sampling_value_breaks_the_engine(world: World, fields: dict[str, Any]):
    reply = world.served.chat(QUESTION, max_tokens=3, **fields)
    assert reply.status in (200, 400), reply.body
    if reply.status == 400:
        assert reply.error["param"] in fields
    else:
        assert 1 <= reply.json["usage"]["completion_tokens"] <= 3


def test_a_prompt_beyond_the_context_is_named(world: World):
    reply = world.served.chat("word " * 600)
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
    assert reply.error["param"] == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        world.client.completions.create(model="tiny", prompt=[5] * 256)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    assert world.served.post("/v1/completions", {"prompt": [10**9]}).error["code"] == "invalid_value"


def test_an_answer_that_fills_the_context_has_ended_by_length(world: World):
    reply = world.served.post("/v1/completions", {"prompt": [5] * 250, "temperature": 0, "stop": None}).json
    assert reply["choices"][0]["finish_reason"] in ("length", "stop")
    assert reply["specchat"]["finish_reason"] in ("context", "stop")
    assert reply["usage"]["total_tokens"] <= 256


def test_no_event_or_thread_is_left(world: World):
    assert world.served.warnings == []
    assert threading.active_count() < 20
    assert isinstance(world.served.ask("GET", "/health"), Reply)
