"""Chats over a scripted engine: history, stop strings, interrupts, sums."""

import json
from pathlib import Path
from threading import Event

import pytest
from support.fake_engine import CHOSEN, EOS, PLAN, TOKENIZER, ByteTokenizer, FakeEngine

from specchat.chat.answer import Delta, Turn
from specchat.chat.result import chosen_object, delta_object, done_object, run_object
from specchat.chat.session import ChatSession
from specchat.errors import EmptyPromptError, PromptTooLongError, UsageError
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource


def session_of(engine, **settings):
    settings = {"sampling": Sampling(seed=3), "stop_ids": frozenset({EOS}), **settings}
    return ChatSession(engine, settings.pop("tokenizer", TOKENIZER), **settings)


def ask(session, text, cancel=None):
    *deltas, turn = session.ask(text, cancel)
    assert isinstance(turn, Turn)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert "".join(delta.text for delta in deltas) == turn.message.content
    assert tuple(i for delta in deltas for i in delta.token_ids) == turn.token_ids
    return turn


def said(text):
    return [*TOKENIZER.encode(text), EOS]


def test_history_is_rendered_again_each_turn():
    engine = FakeEngine([said("Hi 🦊!"), said("Bye")])
    session = session_of(engine, system="Be brief.")
    assert ask(session, "Hello").message == Message("assistant", "Hi 🦊!")
    assert ask(session, "And?").message.content == "Bye"
    expected = "[system]Be brief.\n[user]Hello\n[assistant]Hi 🦊!\n[user]And?\n[assistant]"
    assert TOKENIZER.decode(engine.prompts[1]) == expected
    session.clear()
    assert session.history == []


def test_the_end_of_the_history_is_a_restore_point():
    """Templates that strip thinking, or the switch of one, change what comes after it."""
    engine = FakeEngine([said("Hi"), said("Bye"), said(" now"), said("ab")])
    session = session_of(engine)
    ask(session, "Hello")
    ask(session, "And?")
    list(session.continue_last())
    ask(session_of(engine, base=True), "x")
    first = "[user]Hello\n"
    second = "[user]Hello\n[assistant]Hi\n[user]And?\n"
    assert engine.restore_points == [[first], [second], [], []]


def test_end_token_is_counted_but_not_shown():
    turn = ask(session_of(FakeEngine([said("ab")])), "x")
    assert turn.token_ids == (*TOKENIZER.encode("ab"), EOS)
    assert (turn.message.content, turn.finish_reason, turn.usage.completion_tokens) == ("ab", "stop", 3)


def test_non_special_end_token_is_not_shown():
    (mark,) = TOKENIZER.encode("!")
    turn = ask(session_of(FakeEngine(["ab!"]), stop_ids=frozenset({mark})), "x")
    assert (turn.message.content, turn.finish_reason, len(turn.token_ids)) == ("ab", "stop", 3)


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 7, 50])
def test_stop_string_cuts_text_tokens_and_caches(tokens_per_step):
    engine = FakeEngine([said("one two\nUser: three")], tokens_per_step=tokens_per_step)
    session = session_of(engine, stop_texts=["\nUser:", "zzz"])
    turn = ask(session, "x")
    assert (turn.message.content, turn.finish_reason) == ("one two", "stop")
    assert TOKENIZER.decode(turn.token_ids) == "one two\nUser:"
    assert engine.committed == [*engine.prompts[0], *turn.token_ids]
    assert engine.closed == 1
    assert session.history[-1].content == "one two"


def test_incomplete_stop_string_is_shown_as_text():
    turn = ask(session_of(FakeEngine([said("one\nUs")]), stop_texts=["\nUser:"]), "x")
    assert (turn.message.content, turn.finish_reason) == ("one\nUs", "stop")


def test_truncated_answer_ends_at_a_whole_character():
    turn = ask(session_of(FakeEngine([said("a🦊")]), max_tokens=3), "x")
    assert (turn.message.content, turn.finish_reason, len(turn.token_ids)) == ("a", "length", 3)


def test_interrupt_keeps_the_partial_answer():
    session = session_of(FakeEngine([said("a long answer")], cancel_after=2))
    turn = ask(session, "x", Event())
    assert (turn.finish_reason, turn.message.content) == ("interrupt", "a long")
    assert turn.speculation.steps == 2
    assert session.history == [Message("user", "x"), Message("assistant", "a long")]


def test_interrupt_before_the_first_token_leaves_no_trace():
    session = session_of(FakeEngine([said("one"), said("two")], cancel_after=0))
    turn = ask(session, "x", Event())
    assert (turn.finish_reason, turn.token_ids, turn.timings.tok_per_s) == ("interrupt", (), 0)
    assert session.history == []
    assert ask(session, "y").message.content == "two"


def test_error_leaves_the_history_unchanged():
    session = session_of(FakeEngine([said("one")]))
    ask(session, "x")
    before = list(session.history)
    with pytest.raises(PromptTooLongError):
        list(session.ask("y" * 500))
    assert session.history == before


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty_prompt_is_refused(text):
    with pytest.raises(EmptyPromptError):
        list(session_of(FakeEngine([])).ask(text))


def test_invalid_utf8_is_refused():
    with pytest.raises(UsageError, match="UTF-8"):
        list(session_of(FakeEngine([])).ask("a\udcff"))


def test_base_model_continues_the_text():
    engine = FakeEngine([said(" upon a time"), said("!")])
    with pytest.raises(UsageError, match="no chat template") as refusal:
        session_of(engine, tokenizer=ByteTokenizer(has_chat_template=False))
    assert "--base" in refusal.value.hint
    session = session_of(engine, tokenizer=ByteTokenizer(has_chat_template=False), base=True)
    ask(session, "Once")
    ask(session, "Then")
    assert engine.prompts[0] == [EOS, *TOKENIZER.encode("Once")]
    assert TOKENIZER.decode(engine.prompts[1]) == "Once upon a time\nThen"
    with pytest.raises(UsageError):
        session_of(engine, base=True, system="Be brief.")


def test_usage_timings_and_speculation_are_summed():
    session = session_of(FakeEngine([said("abcdefg"), said("h")]))
    first = ask(session, "x")
    second = ask(session, "y")
    assert (first.usage.cached_tokens, first.usage.completion_tokens) == (0, 8)
    # The caches match the new prompt up to the end token: the template writes a line break in its place.
    assert second.usage.cached_tokens == first.usage.prompt_tokens + 7
    assert second.usage.prompt_tokens == len("[user]x\n[assistant]abcdefg\n[user]y\n[assistant]")
    assert (first.speculation.steps, first.speculation.prefill_passes) == (3, 0)
    assert first.speculation.tokens_per_step == pytest.approx(8 / 3)
    assert first.speculation.accepted_per_step == pytest.approx(5 / 3)
    assert (first.speculation.mean_tree_nodes, first.speculation.tree_budget) == (64, 64)
    timings = first.timings
    assert (timings.load_s, timings.draft_s, timings.verify_s) == (1.5, pytest.approx(0.3), pytest.approx(0.9))
    assert timings.stream_wait_s == pytest.approx(0.15)
    assert timings.tok_per_s == pytest.approx(8 / (timings.ttft_s + timings.decode_s))


# --- JSON --------------------------------------------------------------------------------------------------------

RUN_KEYS = {
    "": "schema_version model revision draft retrieval quant device seed message token_ids finish_reason usage timings "
    "speculation memory",
    "message": "role content reasoning",
    "usage": "prompt_tokens cached_tokens completion_tokens reasoning_tokens",
    "timings": "load_s ttft_s decode_s draft_s verify_s stream_wait_s tok_per_s reasoning_s",
    "speculation": "steps prefill_passes tokens_per_step accepted_per_step mean_tree_nodes tree_budget by_source",
    "memory": "device_budget_bytes device_peak_bytes predicted_device_bytes host_peak_bytes runtime_bytes "
    "resident_layers streamed_layers streamed_bytes_per_step given_back_layers given_back_bytes "
    "expert_hits expert_misses useful_guesses useless_guesses devices",
}
PLAN_KEYS = (
    "target draft retrieval quant device dtype ctx tree_budget slots resident_layers expanded_layers "
    "streamed_layers disk_layers ledger device_bytes generation_bytes device_budget_bytes host_bytes host_ledger "
    "streamed_bytes_per_step devices microbatches experts recurrent predicted_pass_s predicted_tokens_per_step "
    "predicted_tok_per_s basis alternatives bound assumptions choices"
)


def test_run_object_has_the_documented_keys():
    turn = ask(session_of(FakeEngine([said("hé")])), "x")
    result = run_object(turn, target=ModelSource("demo", Path("x")), plan=PLAN, seed=3)
    assert list(result) == RUN_KEYS[""].split()
    for name, keys in RUN_KEYS.items():
        if name:
            assert set(result[name]) == set(keys.split())
    assert result["message"] == {"role": "assistant", "content": "hé", "reasoning": None}
    assert (result["schema_version"], result["seed"], result["draft"]) == (1, 3, "demo draft")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert done_object(result) == {"type": "done", **result}


def test_stream_objects():
    assert delta_object(Delta("a", (1, 2))) == {"type": "delta", "text": "a", "token_ids": [1, 2]}


def test_plan_object_has_the_documented_keys():
    result = chosen_object(CHOSEN)
    assert list(result) == PLAN_KEYS.split()
    assert (result["resident_layers"], result["streamed_layers"], result["disk_layers"]) == (2, 2, 2)
    assert result["ledger"][0] == {"item": "resident layers", "bytes": 100 << 20}
    assert (result["predicted_tok_per_s"], result["bound"], result["basis"]) == (6.0, "link", "measured")
    assert result["choices"][1] == {"option": "ctx", "value": "512", "why": "asked for", "pinned": True}
    assert result["alternatives"] == [{"option": "quant", "value": "int8", "predicted_tok_per_s": 9.0}]
