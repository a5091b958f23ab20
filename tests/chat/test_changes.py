"""After any changes to a chat, the next answer equals that of a fresh run on the same history, token for token.

The chat under test drafts, streams and keeps its KV caches. The fresh run has no draft and starts with empty caches. A
chat read from its file must give the same answer, too.
"""

import random
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from threading import Event

import pytest
import transformers as hf
from support import tiny_models
from support.engines import make_plan
from support.fake_engine import EOS, TOKENIZER
from support.hybrids import random_hybrid
from support.loading import load_engine
from support.setups import setup

from specchat.chat import transcript
from specchat.chat.answer import Delta, Turn
from specchat.chat.session import ChatSession
from specchat.chat.state import Opened, apply, state_of
from specchat.chat.transcript import Transcript
from specchat.errors import PromptTooLongError
from specchat.records.generation import Sampling

CTX = 300
LAYERS = 3
SETTINGS = [("temperature", "0"), ("temperature", "1.2"), ("top_k", "9"), ("seed", "4")]
QUESTIONS = ["Hi", "Why? 🦊", "And then", "日本", "tell me more\nplease"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Yield an engine that drafts and streams, and a plain engine."""
    config = hf.LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with opened_engines(tiny_models.random_model(config, seed=5), tmp_path_factory.mktemp("models")) as both:
        yield both


@pytest.fixture(scope="module", params=["qwen3_5_text", "falcon_h1"])
def hybrid_engines(request, tmp_path_factory):
    """Yield the engines of a hybrid, whose draft is one, too."""
    model = random_hybrid(request.param, vocab_size=EOS + 1)
    with opened_engines(model, tmp_path_factory.mktemp("models")) as both:
        yield both


@contextmanager
def opened_engines(model, folder):
    target = tiny_models.save(model, folder / "target")
    draft = tiny_models.save(tiny_models.perturbed(model, 0.2), folder / "draft")
    sizes = {"num_layers": model.config.num_hidden_layers, "ctx": CTX, "tree_budget": 8}
    with ExitStack() as stack:
        streamed = make_plan(target, draft, resident=[0], **sizes)
        plain = make_plan(target, None, **sizes)
        yield (
            stack.enter_context(load_engine(streamed, target, draft)),
            stack.enter_context(load_engine(plain, target, None)),
        )


def session_of(engine, state, journal=None):
    return ChatSession(
        engine,
        TOKENIZER,
        sampling=state.sampling,
        max_tokens=state.max_tokens,
        system=state.system,
        thinking=state.thinking,
        exchanges=state.exchanges,
        stop_texts=state.stops,
        stop_ids=frozenset({EOS}),
        overflow="drop-oldest",
        journal=journal,
    )


def follow(records, cancel, after):
    """Return the turn; interrupt it after `after` deltas."""
    if after == 0:
        cancel.set()
    for number, record in enumerate(records, 1):
        if isinstance(record, Turn):
            return record
        if isinstance(record, Delta) and number == after:
            cancel.set()
    raise AssertionError("no turn")


def abandon(records, num_deltas):
    """Stop reading an answer after `num_deltas` deltas."""
    for number, _ in enumerate(records, 1):
        if number >= num_deltas:
            break
    records.close()


def change(session, rng):
    """Apply one random user action to the chat and return its name; ask a question if the chat is empty."""
    num_turns = len(session.state.exchanges)
    kinds = ["ask", "ask", "interrupt", "abandon"]
    if num_turns:
        kinds += ["retry", "retry interrupted", "edit", "continue", "continue interrupted", "undo", "drop", "system"]
        kinds += ["set"]
    kind = rng.choice(kinds)
    question, cancel, after = rng.choice(QUESTIONS), Event(), rng.randrange(3)
    match kind:
        case "ask":
            follow(session.ask(question), cancel, None)
        case "interrupt":
            follow(session.ask(question, cancel), cancel, after)
        case "abandon":
            before = session.state
            abandon(session.ask(question), 1)
            assert len(session.state.exchanges) <= len(before.exchanges)
        case "retry":
            follow(session.retry(), cancel, None)
        case "retry interrupted":
            follow(session.retry(cancel), cancel, after)
        case "edit":
            follow(session.edit(question), cancel, None)
        case "continue":
            follow(session.continue_last(), cancel, None)
        case "continue interrupted":
            follow(session.continue_last(cancel), cancel, after)
        case "undo":
            session.undo()
        case "drop":
            session.drop(rng.randint(1, num_turns))
        case "system":
            session.set_system(rng.choice([None, "Be brief.", "Be long."]))
        case "set":
            session.set_value(*rng.choice([*SETTINGS, ("stop", "e")]))
    return kind


def play(engines, path, number):
    """Run a random chat and return its actions and the next answer: in the chat, in a fresh run, and read back."""
    engine, plain = engines
    rng = random.Random(number)
    opened = Opened(setup(model="tiny", overflow="drop-oldest"), None, Sampling(temperature=0.8, seed=number), 5, None)
    journal = Transcript(path)
    session = session_of(engine, state_of([opened]), journal)
    journal(opened)
    done = []
    for _ in range(rng.randint(2, 6)):
        try:
            done.append(change(session, rng))
        except PromptTooLongError:  # one answer was continued many times
            session.clear()
            done.append("clear")
    if not session.state.exchanges:
        follow(session.ask("Hi"), Event(), None)
    journal.close()
    state, saved = session.state, transcript.read(path).state
    assert saved == state, done
    session.set_value("overflow", "stop")
    answers = []
    for chat in (session, session_of(plain, state), session_of(plain, saved)):
        if chat is not session:
            plain.truncate(0)
        turn = follow(chat.ask("What next?"), Event(), None)
        answers.append((turn.token_ids, turn.message, turn.usage.prompt_tokens))
    return done, answers


def check(engines, folder, numbers):
    for number in numbers:
        done, (chat, fresh, read) = play(engines, folder / f"{number}.jsonl", number)
        assert chat == fresh == read, f"sequence {number}: {done}"


def test_the_next_answer_is_that_of_a_fresh_run(engines, tmp_path):
    check(engines, tmp_path, range(12))


@pytest.mark.slow
def test_the_next_answer_is_that_of_a_fresh_run_for_220_sequences(engines, tmp_path):
    check(engines, tmp_path, range(100, 320))


def test_the_next_answer_of_a_hybrid_is_that_of_a_fresh_run(hybrid_engines, tmp_path):
    check(hybrid_engines, tmp_path, range(3))


@pytest.mark.slow
def test_the_next_answer_of_a_hybrid_is_that_of_a_fresh_run_for_200_sequences(hybrid_engines, tmp_path):
    check(hybrid_engines, tmp_path, range(100, 300))


def test_turn_10_reads_no_more_than_turn_2_where_thinking_is_stripped(hybrid_engines):
    """The template drops all thinking, and the last token of each prompt, from the next prompt."""
    engine, _ = hybrid_engines
    engine.truncate(0)
    state = state_of([Opened(setup(), None, Sampling(temperature=0.8, seed=3), 8, True)])
    session = session_of(engine, state)
    turns = [follow(session.ask("Why not?"), Event(), None) for _ in range(10)]
    assert all(turn.message.reasoning and not turn.message.content for turn in turns)
    read = [turn.usage.prompt_tokens - turn.usage.cached_tokens for turn in turns]
    assert read[9] <= 1.2 * read[1] and turns[9].usage.prompt_tokens > 4 * read[9]
    print(f"read {read} of {[turn.usage.prompt_tokens for turn in turns]} prompt tokens")


def test_retries_differ_and_are_reproducible(engines):
    engine, plain = engines
    state = state_of([Opened(setup(), None, Sampling(temperature=1.0, seed=1), 8, None)])
    session = session_of(engine, state)
    attempts = [follow(session.ask("Hi"), Event(), None)]
    attempts += [follow(session.retry(), Event(), None) for _ in range(3)]
    assert len({turn.token_ids for turn in attempts}) == 4
    assert [turn.usage.cached_tokens for turn in attempts[1:]] == [attempts[0].usage.prompt_tokens - 1] * 3
    again = session_of(plain, replace(state, sampling=replace(state.sampling)))
    repeated = [follow(again.ask("Hi"), Event(), None)] + [follow(again.retry(), Event(), None) for _ in range(3)]
    assert [turn.token_ids for turn in attempts] == [turn.token_ids for turn in repeated]
    assert session.state.exchanges[-1].attempt == 3
    assert len(session.history) == 2


def begin_again(session, record):
    match record.how:
        case "ask":
            return session.ask(record.exchange.question)
        case "edit":
            return session.edit(record.exchange.question)
        case "retry":
            return session.retry()
    return session.continue_last()


def test_a_saved_chat_replays_token_for_token(engines, tmp_path):
    engine, plain = engines
    opened = Opened(setup(model="tiny"), "Be brief.", Sampling(temperature=0.9, seed=7), 6, None)
    journal = Transcript(tmp_path / "x.jsonl")
    session = session_of(engine, state_of([opened]), journal)
    journal(opened)
    cancel = Event()
    follow(session.ask("Hi"), cancel, None)
    follow(session.retry(), cancel, None)
    follow(session.ask("Why?", cancel), cancel, 1)
    follow(session.edit("How?"), cancel, None)
    follow(session.continue_last(), cancel, None)
    journal.close()
    state, replayed = state_of([opened]), 0
    for record in transcript.read(tmp_path / "x.jsonl").records[1:]:
        twin = session_of(plain, replace(state, max_tokens=len(record.token_ids)))
        turn = follow(begin_again(twin, record), Event(), None)
        assert (turn.token_ids, turn.message) == (record.token_ids, record.exchange.answer)
        state = apply(state, record)
        replayed += 1
    assert replayed == 5
