"""Chats read from copies: what was written is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.setups import setup

from specchat.chat import transcript
from specchat.chat.copies import read_copy, read_markdown
from specchat.chat.state import Answered, Exchange, Opened, state_of
from specchat.errors import SessionError, UsageError
from specchat.records.chat import Message
from specchat.records.generation import Sampling

PIECES = ["one", "**You**, he said", "**Note**", "# title", "```\n**x**\n```", "- a\n\n- b", "日本 🦊"]


def chat(turns, system=None, model="org/name"):
    records = [Opened(setup(model=model), system, Sampling(), None, None)]
    records += [Answered("ask", Exchange(q, Message("assistant", a)), 1, (1,), "stop") for q, a in turns]
    return records


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("\n\n".join)


@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system=st.none() | texts)
def test_markdown_is_read_as_it_was_written(tmp_path_factory, turns, system):
    # A question may hold the heading "**Note**", which then looks like the model's: keep it out of the first one.
    turns[0] = ("first", turns[0][1])
    path = tmp_path_factory.mktemp("copies") / "chat.md"
    transcript.export(chat(turns, None if system == "**Note**" else system), path)
    loaded = read_markdown(path)
    assert [(e.question, e.answer.content) for e in loaded.exchanges] == turns
    assert loaded.system == (None if system == "**Note**" else system)


def test_a_session_is_read_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path))
    journal = transcript.Transcript(transcript.path_of("fox"))
    for record in chat([("q", "a")]):
        journal(record)
    journal.close()
    assert state_of(read_copy("fox").records).exchanges[0].question == "q"
    for name in ("wolf", "not a name", "./fox"):
        with pytest.raises(UsageError):
            read_copy(name)


@pytest.mark.parametrize("text", ["", "some text", "**You**\n\nonly a question\n", "**org/name**\n\nanswer\n"])
def test_other_markdown_is_refused(tmp_path, text):
    path = tmp_path / "notes.md"
    path.write_text(text)
    with pytest.raises(SessionError):
        read_copy(str(path))
