"""Splitting text into thinking and answer does not depend on where the text is cut."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import EOS, TOKENIZER, FakeEngine
from tokenizers import decoders, models, pre_tokenizers

from specchat.chat.answer import Turn
from specchat.chat.reasoning import Parts, ThinkTags
from specchat.chat.session import ChatSession
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling

CASES = [
    # text, prompt ends within the thinking, thinking, answer
    ("Hello.", False, "", "Hello."),
    ("  Hello <think>x</think>", False, "", "  Hello <think>x</think>"),
    ("<think>\nLet me see.\n\n  Yes.\n</think>\n\nHello.\n", False, "Let me see.\n\n  Yes.", "Hello.\n"),
    ("\n<think></think>\n\nHi", False, "", "Hi"),
    ("Let me see.\n</think>\n\nHello.", True, "Let me see.", "Hello."),
    ("no end </thin", True, "no end </thin", ""),
    ("<thi", False, "", "<thi"),
    ("<think>a </thinking> b</think>c</think>", False, "a </thinking> b", "c</think>"),
    ("", True, "", ""),
]


def split(parser, pieces):
    parts = Parts(parser)
    found = [piece for text in pieces for piece in parts.feed(text)] + parts.finish()
    joined = {"reasoning": "", "answer": ""}
    for part, text in found:
        assert text
        joined[part] += text
    return joined["reasoning"], joined["answer"]


def cut(text, places):
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(("text", "opened", "thinking", "answer"), CASES)
def test_think_tags(text, opened, thinking, answer):
    assert split(ThinkTags(opened=opened), [text]) == (thinking, answer)
    assert split(ThinkTags(opened=opened), text) == (thinking, answer)


@settings(deadline=None, max_examples=100)
@given(case=st.sampled_from(CASES), places=st.lists(st.integers(0, 60), max_size=8))
def test_think_tags_split_at_any_place(case, places):
    text, opened, thinking, answer = case
    assert split(ThinkTags(opened=opened), cut(text, places)) == (thinking, answer)


def test_text_without_thinking_is_not_held_back():
    parts = Parts(ThinkTags())
    assert parts.feed("H") == [("answer", "H")]
    assert parts.feed("<think>") == [("answer", "<think>")]
    thinking = Parts(ThinkTags(opened=True))
    assert (thinking.part, thinking.feed("Let me")) == ("reasoning", [("reasoning", "Let me")])


# --- transformers' parser ----------------------------------------------------------------------------------------

SPECIAL = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|eot|>"]
TAGGED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "thinking": {"open": "<<", "close": ">>", "content": "text"},
        "content": {"close": "<|eot|>", "content": "text"},
    },
}


def tokenizer_in(folder, **config):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    settings |= {"additional_special_tokens": SPECIAL, "eos_token": "<|return|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


HARMONY = "<|channel|>analysis<|message|>Hm, a fox.<|end|><|start|>assistant<|channel|>final<|message|>A fox!"


@settings(deadline=None, max_examples=40)
@given(places=st.lists(st.integers(0, 200), max_size=8))
def test_parser_shipped_with_the_model(tmp_path_factory, places):
    tokenizer = tokenizer_in(tmp_path_factory.mktemp("model"), response_template=TAGGED)
    for text, prompt, expected in [
        ("<<Hm.>> Yes, <|eot|>", "[user]x[assistant]", ("Hm.", "Yes, ")),
        ("Hm.>> Yes", "[user]<<no>>[assistant]<<", ("Hm.", "Yes")),
        ("Yes", "[user]x[assistant]", ("", "Yes")),
    ]:
        assert split(tokenizer.response_parser(prompt), cut(text, places)) == expected


@settings(deadline=None, max_examples=40)
@given(places=st.lists(st.integers(0, 200), max_size=8))
def test_harmony_format_is_parsed(tmp_path_factory, places):
    tokenizer = tokenizer_in(tmp_path_factory.mktemp("model"))
    parser = tokenizer.response_parser("<|start|>user<|message|>x<|end|><|start|>assistant")
    assert split(parser, cut(HARMONY, places)) == ("Hm, a fox.", "A fox!")


def test_special_tokens_in_answers(tmp_path):
    tokenizer = tokenizer_in(tmp_path)
    (eos,) = tokenizer.encode("<|return|>")
    engine = FakeEngine([[*tokenizer.encode(HARMONY), eos]])
    session = ChatSession(engine, tokenizer, sampling=Sampling(), stop_ids=frozenset({eos}))
    *deltas, turn = session.ask("What is it?")
    assert turn.message == Message("assistant", "A fox!", "Hm, a fox.")
    assert "".join(delta.text for delta in deltas if delta.part == "answer") == "A fox!"
    assert sum(len(delta.token_ids) for delta in deltas) == len(turn.token_ids) == len(tokenizer.encode(HARMONY)) + 1
    assert "A fox!" not in "".join(delta.text for delta in deltas if delta.part == "reasoning")
    assert 10 <= turn.usage.reasoning_tokens < len(turn.token_ids) - 6


# --- in a chat ---------------------------------------------------------------------------------------------------


def chat(*answers, **settings):
    engine = FakeEngine([[*TOKENIZER.encode(text), EOS] for text in answers])
    return ChatSession(engine, TOKENIZER, sampling=Sampling(), stop_ids=frozenset({EOS}), **settings)


def finish(records):
    *deltas, turn = records
    assert isinstance(turn, Turn)
    return deltas, turn


def test_thinking_is_separated_from_the_answer():
    deltas, turn = finish(chat("<think>\nHm.\n</think>\n\nYes.").ask("x"))
    assert turn.message == Message("assistant", "Yes.", "Hm.")
    assert "".join(d.text for d in deltas if d.part == "reasoning") == "Hm."
    assert "".join(d.text for d in deltas if d.part == "answer") == "Yes."
    # Only the last byte of the tag shows that it starts the thinking, so its first bytes do not count.
    assert turn.usage.reasoning_tokens == len("<think>\nHm.\n</think>") - len("<think")
    assert 0 <= turn.timings.reasoning_s <= turn.timings.decode_s


def test_template_that_opens_the_thinking():
    session = chat("Hm.</think>Yes.", thinking=True)
    assert finish(session.ask("x"))[1].message == Message("assistant", "Yes.", "Hm.")
    session = chat("No.</think>", thinking=False)
    assert finish(session.ask("x"))[1].message == Message("assistant", "No.</think>")


def test_stop_strings_do_not_end_thinking():
    session = chat("<think>one.\ntwo.</think>three.\nfour.", stop_texts=[".\n"])
    assert finish(session.ask("x"))[1].message == Message("assistant", "three", "one.\ntwo.")


def test_base_model_does_not_think():
    session = chat("<think>x</think>y", base=True)
    assert finish(session.ask("x"))[1].message == Message("assistant", "<think>x</think>y")


def test_truncated_thinking_is_continued():
    session = chat("<think>one two", " three</think>four")
    assert finish(session.ask("x"))[1].message == Message("assistant", "", "one two")
    deltas, turn = finish(session.continue_last())
    assert turn.message == Message("assistant", "four", "one two three")
    assert next((d.part, d.text) for d in deltas if d.text) == ("reasoning", " th")
