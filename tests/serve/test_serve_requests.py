"""What clients may send: every mistake is named in OpenAI's error object, and nothing breaks the server."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.echoes import Echoes
from support.fake_engine import EOS, PLAN, TOKENIZER, ByteTokenizer
from support.plans import changed
from support.serving import Gate, Served, serving, text_of, wait_until

from specchat.errors import AllocationError, BrokenScoresError
from specchat.loading.sampling import SamplingChoices
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.generation import Step
from specchat.serve import streams
from specchat.serve.access import Access
from specchat.serve.app import MOST_BODY_BYTES
from specchat.serve.preparing import ServerDefaults

DEFAULTS = GenerationDefaults(stop_ids=frozenset({EOS}))
CTX = 200


@dataclass
class Echoing:
    """A server around an engine that repeats the question."""

    served: Served
    engine: Echoes
    gate: Gate = field(default_factory=Gate)


@contextmanager
def echoing(tokenizer: Any = TOKENIZER, **options: Any) -> Iterator[Echoing]:
    gate = Gate()
    engine = Echoes(ctx=CTX, before_pass=gate)
    plan = changed(PLAN, ctx=CTX, seats=engine.seats)
    options = {"model_defaults": DEFAULTS, **options}
    with serving(engine, tokenizer, plan, vocab_size=EOS + 1, **options) as served:
        yield Echoing(served, engine, gate)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echoing]:
    with echoing() as found:
        yield found


@pytest.fixture
def fresh() -> Iterator[Echoing]:
    with echoing() as found:
        yield found


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["grün", "日本語", "👩‍👩‍👧 family", "é́ \u2028 end", "a\x1bb\x07", '"quo\\ted"\n'])
def test_characters_are_whole_in_every_chunk(echo: Echoing, text: str):
    """The tokens are single bytes, two in a pass, so that every character is split."""
    whole = echo.served.chat(text).json["choices"][0]["message"]["content"]
    events = echo.served.chat(text, stream=True).events
    assert text_of(events) == whole == f"You said: {text}"
    assert not any("\N{REPLACEMENT CHARACTER}" in json.dumps(event, ensure_ascii=False) for event in events)


def test_an_answer_cut_within_a_character_ends_before_it(echo: Echoing):
    events = echo.served.chat("日本語", stream=True, max_tokens=len("You said: 日".encode()) + 2).events
    assert text_of(events) == "You said: 日"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_text_held_back_for_a_stop_string_is_sent_at_the_end(echo: Echoing):
    events = echo.served.chat("no end", stream=True, stop=["endless", "d!"]).events
    assert text_of(events) == "You said: no end"


def test_a_stop_string_frees_the_seat(fresh: Echoing):
    """The engine knows nothing of stop strings: it is told, and computes no further pass of that answer."""
    assert fresh.served.chat("x" * 80, stop="said").json["choices"][0]["message"]["content"] == "You "
    assert fresh.served.chat("later").status == 200
    assert fresh.gate.num_passes == sum(len(job.answer.steps) for job, _ in fresh.served.ended)


def test_special_tokens_are_no_text(echo: Echoing):
    assert echo.served.chat("hi").status == 200
    assert echo.served.submitted[-1].answer.detokenizer.feed(EOS) == ""


def test_comments_keep_a_client_waiting(fresh: Echoing, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "_COMMENT_AFTER_S", 0.01)
    fresh.gate.close()
    with closing(fresh.served.connect()) as connection:
        connection.request("POST", CHAT, json.dumps({"messages": [USER], "stream": True}))
        response = connection.getresponse()
        lines = [response.readline() for _ in range(4)]
        assert lines[0].startswith(b"data: {") and lines[1:] == [b"\n", b": waiting\n", b"\n"]
        fresh.gate.open()
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_thinking_has_a_field_of_its_own(echo: Echoing):
    """The question closes the thinking that the template has opened."""
    fields = {"chat_template_kwargs": {"enable_thinking": True}}
    message = echo.served.chat("so</think>yes", **fields).json["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("You said: so", "yes")
    events = echo.served.chat("so</think>yes", stream=True, **fields).events
    thoughts = [each["choices"][0]["delta"].get("reasoning_content", "") for each in events]
    assert ("".join(thoughts), text_of(events)) == ("You said: so", "yes")
    assert echo.served.chat("hi", **fields).json["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_parts_and_roles_make_the_prompt(echo: Echoing):
    chat = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q", "name": "me"},
        {"role": "assistant", "content": "r", "refusal": None, "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    assert echo.served.post(CHAT, {"messages": chat}).status == 200
    prompt = TOKENIZER.decode(echo.engine.requests[-1].prompt_ids)
    assert prompt == "[system]a\nb\n[user]q\n[assistant]r\n[user]\n[assistant]"
    # A later request of the chat may differ from here on: recurrent layers keep a copy of their states.
    assert echo.engine.requests[-1].restore_at == (len(prompt) - len("[assistant]"),)


def test_a_text_begins_with_the_tokenizers_special_tokens(echo: Echoing):
    assert echo.served.post(TEXT, {"prompt": "ab"}).status == 200
    assert echo.engine.requests[-1].prompt_ids == (EOS, *TOKENIZER.encode("ab"))


def test_a_model_without_a_template_continues_texts_only():
    with echoing(ByteTokenizer(has_chat_template=False)) as echo:
        reply = echo.served.chat("hi")
        assert reply.status == 400 and "no chat template" in reply.error["message"]
        assert echo.served.post(TEXT, {"prompt": "ab"}).status == 200


# --- settings --------------------------------------------------------------------------------------------------------


def test_values_of_the_client_come_before_those_of_the_server_and_the_model():
    model = GenerationDefaults(stop_ids=frozenset({EOS}), do_sample=True, temperature=0.5, top_k=7, top_p=0.6)
    server = ServerDefaults(SamplingChoices(temperature=0.8, min_p=0.1), max_tokens=4, thinking=True)
    with echoing(model_defaults=model, defaults=server) as echo:
        echo.served.chat("hi", top_p=0.9, seed=3)
        first = echo.engine.requests[-1]
        assert (first.sampling.temperature, first.sampling.top_k, first.sampling.top_p) == (0.8, 7, 0.9)
        assert (first.sampling.min_p, first.sampling.seed, first.max_tokens) == (0.1, 3, 4)
        assert TOKENIZER.decode(first.prompt_ids).endswith("<think>")
        fields = {"max_tokens": 5, "max_completion_tokens": 6, "chat_template_kwargs": {"thinking": False}}
        echo.served.chat("hi", temperature=0, repeat_penalty=1.5, top_k=-1, **fields)
        second = echo.engine.requests[-1]
        assert (second.sampling.temperature, second.sampling.repetition_penalty) == (0.0, 1.5)
        assert (second.sampling.top_k, second.max_tokens) == (0, 6)
        assert not TOKENIZER.decode(second.prompt_ids).endswith("<think>")


def test_other_servers_words_for_none_are_understood(echo: Echoing):
    fields = {"max_tokens": -1, "seed": -1, "top_k": 5.0, "temperature": 1e-9, "presence_penalty": 0, "n": 1}
    ignored = {"tools": [], "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "user": "me", "store": True}
    asked = {**fields, **ignored, "response_format": {"type": "text"}, "modalities": ["text"], "stream_options": None}
    reply = echo.served.chat("hi", **asked, tool_choice="auto", nonsense={"a": [1]}, stop=None, stream=None)
    assert reply.status == 200
    request = echo.engine.requests[-1]
    assert request.max_tokens is None and request.sampling.top_k == 5 and request.sampling.temperature == 0
    assert echo.served.chat("hi", seed=-3).json["specchat"]["seed"] == 2**63 - 3


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    # fields of a chat, parameter at fault, code
    ({}, "messages", "missing_required_parameter"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "unsupported_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [USER, {"role": "user", "content": [7]}]}, "messages[1].content[0]", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"n": 2}, "n", "unsupported_parameter"),
    ({"n": "1"}, "n", "invalid_type"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": True}, "temperature", "invalid_type"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 101}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": "9"}, "max_completion_tokens", "invalid_type"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"stop": 5}, "stop", "invalid_type"),
    ({"stop": ["a", 5]}, "stop", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": list("abc" * 11)}, "stop", "invalid_value"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking", "invalid_type"),
    ({"messages": [{"role": "user", "content": "x" * CTX}]}, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("fields", "param", "code"), MISTAKES, ids=[f"{i}-{m[1]}" for i, m in enumerate(MISTAKES)])
def test_mistakes_are_named(echo: Echoing, fields: dict[str, Any], param: str, code: str):
    body = fields if "messages" in fields or not fields else {"messages": [USER], **fields}
    reply = echo.served.post(CHAT, body)
    assert reply.status == 400 and (reply.error["param"], reply.error["code"]) == (param, code), reply.body
    assert reply.error["type"] == "invalid_request_error"
    assert (
        param.partition("[")[0].partition(".")[0] in reply.error["message"]
        or code == "context_length_exceeded"
        or (code == "unsupported_parameter")
    )


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [""]}, "prompt", "invalid_value"),
        ({"prompt": ["a", "b"]}, "prompt", "unsupported_parameter"),
        ({"prompt": [1, "b"]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [EOS + 1]}, "prompt", "invalid_value"),
        ({"prompt": {"text": "a"}}, "prompt", "invalid_type"),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"prompt": "a", "echo": True}, "echo", "unsupported_parameter"),
        ({"prompt": "a", "suffix": "z"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "best_of": 3}, "best_of", "unsupported_parameter"),
    ],
)
def test_mistakes_of_completions_are_named(echo: Echoing, fields: dict[str, Any], param: str, code: str):
    reply = echo.served.post(TEXT, fields)
    assert reply.status == 400 and (reply.error["param"], reply.error["code"]) == (param, code), reply.body


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_objects_are_refused(echo: Echoing, body: bytes):
    reply = echo.served.post(CHAT, body)
    assert reply.status == 400 and reply.error["code"] in ("invalid_json", "invalid_type")


def test_a_body_that_is_too_large_is_refused(echo: Echoing):
    reply = echo.served.post(CHAT, b" " * (MOST_BODY_BYTES + 1))
    assert reply.status == 413 and reply.error["code"] == "body_too_large"


def test_paths_and_methods_that_do_not_exist(echo: Echoing):
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/x", 404),
    ):
        reply = echo.served.ask(method, path)
        assert reply.status == status and reply.error["code"] == "not_found"
        assert "the API is below /v1" in reply.error["message"]


# --- fuzz ------------------------------------------------------------------------------------------------------------

NAMES = sorted(
    {name for fields, *_ in MISTAKES for name in fields}
    | {"prompt", "min_p", "repeat_penalty", "presence_penalty", "functions", "echo", "suffix", "best_of", "user"}
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=8), st.text(max_size=5)
)
KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage", "enable_thinking", "tool_calls", "x"])
VALUES = st.recursive(
    SCALARS | st.sampled_from(["user", "assistant", "system", "text", "tool"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=9)}
)
BODIES = st.builds(
    lambda valid, wild: {**valid, **wild},
    st.fixed_dictionaries({}, optional={"messages": st.lists(MESSAGE, max_size=3), "prompt": st.text(max_size=9)}),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
)


@settings(max_examples=250)
@given(path=st.sampled_from([CHAT, TEXT]), body=BODIES | VALUES)
def test_no_body_breaks_the_server(echo: Echoing, path: str, body: Any):
    reply = echo.served.post(path, body)
    assert reply.status in (200, 400, 404), (body, reply.body)
    if reply.status != 200:
        assert reply.error["message"] and reply.error["type"] == "invalid_request_error"
    elif reply.headers["content-type"] == "application/json":
        assert reply.json["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert reply.events[-1]["object"]
    assert not echo.served.warnings


# --- access ----------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for():
    with echoing(access=Access(api_key="sesame")) as echo:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            for reply in (echo.served.chat("hi"), echo.served.ask("GET", "/v1/models", **headers)):
                assert reply.status == 401 and reply.error["code"] == "invalid_api_key"
                assert "sesame" not in reply.error["message"]
        assert echo.served.ask("GET", "/v1/models", Authorization="Bearer sesame").status == 200
        assert echo.served.post(CHAT, {"messages": [USER]}, Authorization="bearer sesame").status == 200
        assert echo.served.ask("GET", "/health").status == 200
        assert len(echo.engine.requests) == 1


def test_the_man_page_has_all_of_our_figures(echo: Echoing):
    page = (Path(__file__).parents[2] / "man" / "specchat.1").read_text().replace("\\", "")
    section = page[page.index(".SH SERVE") : page.index(".SH MODELS")]
    reply = echo.served.chat("hi").json
    names = {*reply["specchat"], *echo.served.post(CHAT, {}).error}
    assert not [name for name in names if not re.search(rf"\b{name}\b", section)]


def test_pages_of_other_origins_are_refused(echo: Echoing):
    """A page may send such a request without asking first, and would use the engine even if it may not read."""
    num_before = len(echo.engine.requests)
    reply = echo.served.post(CHAT, {"messages": [USER]}, Origin="https://example.com")
    assert reply.status == 403 and reply.error["code"] == "origin_not_allowed"
    assert "--allow-origin https://example.com" in reply.error["message"]
    assert len(echo.engine.requests) == num_before
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_pages_of_allowed_origins_may_ask():
    page = "https://chat.example"
    with echoing(access=Access(api_key="k", origins=(page,))) as echo:
        ask = {
            "Origin": page,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        before = echo.served.ask("OPTIONS", CHAT, **ask)
        assert before.status == 200 and before.headers["access-control-allow-origin"] == page
        reply = echo.served.post(CHAT, {"messages": [USER]}, Origin=page, Authorization="Bearer k")
        assert reply.status == 200 and reply.headers["access-control-allow-origin"] == page
        assert echo.served.post(CHAT, {"messages": [USER]}, Origin="https://x", Authorization="Bearer k").status == 403


# --- queue, failures and the end -------------------------------------------------------------------------------------


def test_a_full_queue_refuses():
    with echoing(most_waiting=2) as echo:
        echo.gate.close()
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(echo.served.chat, "0")
            echo.gate.wait()
            others = [pool.submit(echo.served.chat, str(number)) for number in (1, 2)]
            wait_until(lambda: echo.served.worker.num_waiting == 2)
            refused = echo.served.chat("too many")
            assert refused.status == 429 and refused.error["code"] == "queue_full"
            assert refused.headers["retry-after"] and refused.error["type"] == "rate_limit_error"
            assert echo.served.ask("GET", "/health").json == {"status": "ok", "answering": 1, "waiting": 2}
            echo.gate.open()
            assert [each.result().status for each in (first, *others)] == [200] * 3
        assert echo.served.chat("later").status == 200


def test_a_pass_that_fails_ends_its_answers_only(fresh: Echoing):
    def fails() -> None:
        raise AllocationError("no memory is left", "use a smaller --ctx")

    fresh.engine.before_pass = fails
    for fields in ({}, {"stream": True}):
        reply = fresh.served.chat("hi", **fields)
        error = reply.events[-1]["error"] if fields else reply.error
        assert error["type"] == "server_error" and error["message"] == "no memory is left (use a smaller --ctx)"
    fresh.engine.before_pass = lambda: 1 // 0
    reply = fresh.served.chat("hi")
    assert reply.status == 500 and reply.error["code"] == "internal_error"
    assert fresh.served.warnings[-1] == "answers failed: ZeroDivisionError: integer division or modulo by zero"
    fresh.engine.before_pass = lambda: None
    assert fresh.served.chat("hi").status == 200


def test_an_answer_that_fails_alone_is_reported(fresh: Echoing):
    error = Step.without_pass("error", BrokenScoresError("the model computes NaN"))
    generate = fresh.engine.generate_many
    fresh.engine.generate_many = lambda requests, cancel: [(0, error)] if next(requests) else []  # type: ignore
    reply = fresh.served.chat("hi")
    assert reply.status == 500 and reply.error["message"] == "the model computes NaN"
    fresh.engine.generate_many = generate  # type: ignore[method-assign]
    assert fresh.served.chat("hi").status == 200


def test_the_end_of_the_server_ends_all_answers(fresh: Echoing):
    fresh.gate.close()
    with ThreadPoolExecutor(9) as pool:
        whole = pool.submit(fresh.served.chat, "a")
        fresh.gate.wait()
        stream = pool.submit(fresh.served.chat, "b", stream=True)
        waiting = pool.submit(fresh.served.chat, "c")
        wait_until(lambda: fresh.served.worker.num_waiting == 2)
        num_before = fresh.gate.num_passes
        fresh.served.server.should_exit = True
        wait_until(fresh.served.worker._stop.is_set)
        fresh.gate.open()
        assert [whole.result().status, waiting.result().status] == [503, 503]
        assert whole.result().error["code"] == "shutting_down"
        assert stream.result().events[-1]["error"]["code"] == "shutting_down"
    assert fresh.gate.num_passes == num_before + 1
