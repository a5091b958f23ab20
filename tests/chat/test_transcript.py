"""Saved chats: every answer is on the disk, and reading the file restores the chat."""

import json
import os
import resource
import stat
from pathlib import Path

import pytest
from support.fake_engine import EOS, TOKENIZER, FakeEngine
from support.setups import setup

from specchat.chat import transcript
from specchat.chat.session import ChatSession
from specchat.chat.state import Opened
from specchat.chat.transcript import Transcript
from specchat.cli import sessions
from specchat.errors import SessionError, UsageError
from specchat.records.chat import Message
from specchat.records.generation import Sampling

OPENED = Opened(setup(), "Be brief.", Sampling(seed=3, temperature=0.5), None, None)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    return transcript.path_of("fox")


def chat(path, answers, saved=None):
    """Return a session that writes to `path` and resumes `saved`, and its transcript."""
    journal = Transcript(path, saved)
    engine = FakeEngine([[*TOKENIZER.encode(text), EOS] for text in answers])
    state = saved.state if saved else None
    session = ChatSession(
        engine,
        TOKENIZER,
        sampling=state.sampling if state else OPENED.sampling,
        system=state.system if state else OPENED.system,
        exchanges=state.exchanges if state else (),
        thinking=state.thinking if state else None,
        max_tokens=state.max_tokens if state else None,
        stop_ids=frozenset({EOS}),
        journal=journal,
    )
    if saved is None:
        journal(OPENED)
    return session, journal


def finish(records):
    return list(records)[-1]


def everything_that_can_happen(session):
    finish(session.ask("one"))
    finish(session.ask("two 🦊"))
    finish(session.retry())
    finish(session.edit("zwei"))
    finish(session.continue_last())
    session.undo()
    finish(session.ask("three"))
    finish(session.ask("four"))
    session.drop(1)
    session.set_system("Be long.")
    session.set_value("top-k", "5")
    session.set_value("max_tokens", "50")
    session.set_thinking(True)


ANSWERS = ["1", "2", "2 again", "zwei", " und mehr", "3", "4"]


def test_read_restores_the_chat(path):
    session, journal = chat(path, ANSWERS)
    everything_that_can_happen(session)
    journal.close()
    saved = transcript.read(path)
    assert saved.state == session.state
    assert [m.content for m in session.history] == ["three", "3", "four", "4"]
    assert saved.records == tuple(journal.records)
    assert (saved.repair, saved.session_id, saved.good_bytes) == (None, "fox", path.stat().st_size)
    assert saved.opened == OPENED


def test_clear_and_load_are_saved(path, tmp_path):
    session, journal = chat(path, ANSWERS)
    everything_that_can_happen(session)
    copy = tmp_path / "copy.jsonl"
    transcript.export(journal.records, copy)
    before = session.state
    session.clear()
    session.set_system(None)
    assert transcript.read(path).state == session.state
    session.load(transcript.read(copy).records, str(copy))
    assert session.state == before
    assert transcript.read(path).state == before


def test_resumed_chat_appends_to_the_same_file(path):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    journal.close()
    session, journal = chat(path, ["2"], transcript.read(path))
    finish(session.ask("two"))
    assert [m.content for m in transcript.read(path).state.messages] == ["one", "1", "two", "2"]
    assert "[user]one\n[assistant]1\n[user]two" in TOKENIZER.decode(session.engine.prompts[0])


def test_only_the_owner_can_read_the_file(path):
    old = os.umask(0)
    try:
        session, _ = chat(path, ["1"])
        finish(session.ask("one"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_file_before_the_first_answer(path):
    session, _ = chat(path, ["1"])
    session.set_system("x")
    assert not path.exists()
    finish(session.ask("one"))
    assert [json.loads(line)["type"] for line in path.read_text().splitlines()] == ["open", "system", "answer"]


def test_every_turn_is_synced_before_the_caller_sees_it(path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    session, _ = chat(path, ["1", "2"])
    for question in ("one", "two"):
        records = session.ask(question)
        while not hasattr(record := next(records), "finish_reason"):
            pass
        assert record.message.content
        assert path.stat().st_size in synced


@pytest.mark.parametrize("num_bytes", [1, 7, 200])
def test_incomplete_last_line_is_skipped_with_a_warning(path, num_bytes):
    session, journal = chat(path, ["1", "2"])
    finish(session.ask("one"))
    size = path.stat().st_size
    finish(session.ask("two"))
    journal.close()
    os.truncate(path, path.stat().st_size - num_bytes)
    saved = transcript.read(path)
    assert [m.content for m in saved.state.messages] == ["one", "1"]
    assert saved.good_bytes == size
    assert str(path) in saved.repair
    session, journal = chat(path, ["zwei"], saved)
    finish(session.ask("two"))
    saved = transcript.read(path)
    assert [m.content for m in saved.state.messages] == ["one", "1", "two", "zwei"]
    assert saved.repair is None


def test_zero_filled_last_line_is_skipped(path):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    journal.close()
    with path.open("ab") as file:
        file.write(b"\0" * 50 + b"\n")  # a file system may leave this after a power cut
    saved = transcript.read(path)
    assert saved.repair
    assert len(saved.state.exchanges) == 1


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda lines: [lines[0], b"{nonsense}", *lines[1:]], "line 2"),
        (lambda lines: lines[1:], "not a specchat session"),
        (lambda lines: [lines[0].replace(b'"version": 1', b'"version": 2'), *lines[1:]], "newer version"),
        (lambda lines: [lines[0], lines[1].replace(b'"answer", "at"', b'"anser", "at"'), lines[0]], "line 2"),
        (lambda lines: [lines[0].replace(b', "base": false', b""), *lines[1:]], "line 1"),
        (lambda lines: [lines[0].replace(b'"stop": []', b'"stop": 7'), *lines[1:]], "line 1"),
        (lambda lines: [lines[0].replace(b'"seed": 3', b'"seed": -3'), *lines[1:]], "line 1"),
        (lambda lines: [lines[0], lines[1].replace(b'"question": "one"', b'"question": null'), lines[1]], "line 2"),
        (lambda lines: [lines[0], b'{"type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", lines[1]], "line 2"),
    ],
    ids=["nonsense", "headless", "future", "unknown", "incomplete", "number", "negative", "null", "deep"],
)
def test_damage_before_the_last_line_is_an_error(path, spoil, word):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    journal.close()
    damaged = b"\n".join(spoil(path.read_bytes().splitlines())) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(SessionError, match=word):
        transcript.read(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"my notes", b"{}", b"\0"])
@pytest.mark.parametrize("through_link", [False, True])
def test_another_file_is_never_overwritten(path, tmp_path, content, through_link):
    path.parent.mkdir(parents=True)
    file = tmp_path / "notes" if through_link else path
    file.write_bytes(content)
    if through_link:
        path.symlink_to(file)
    with pytest.raises(SessionError, match="not a specchat session"):
        sessions.resumed("fox", continues=False)
    assert file.read_bytes() == content


def test_names_that_cannot_be_read_are_errors(path, tmp_path):
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(SessionError, match="regular file"):
        sessions.resumed("fox", continues=False)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SessionError, match="link to nowhere"):
        sessions.resumed("fox", continues=False)
    assert transcript.last_session() is None  # a dangling link is no session


def test_the_start_of_a_torn_first_line_is_no_loss(path):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    journal.close()
    path.write_bytes(path.read_bytes().partition(b"\n")[0][:40])
    assert sessions.resumed("fox", continues=False) is None


def test_session_is_locked_against_a_second_writer(path):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    saved = transcript.read(path)
    with pytest.raises(SessionError, match="another specchat"):
        Transcript(path, saved)
    journal.close()
    Transcript(path, saved).close()


def test_failed_write_is_retried_with_the_next_turn(path, monkeypatch):
    session, _ = chat(path, ["1", "2", "3"])
    finish(session.ask("one"))
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in finish(session.ask("two")).unsaved
    assert len(session.state.exchanges) == 2
    with pytest.raises(SessionError, match="No space left"):
        session.set_system("x")
    monkeypatch.setattr(os, "fsync", real)
    finish(session.ask("three"))
    assert transcript.read(path).state == session.state


def test_last_session_is_the_most_recently_written(path):
    assert transcript.last_session() is None
    for name, when in (("a", 300), ("b", 200), ("c", 400)):
        other = transcript.path_of(name)
        session, journal = chat(other, ["1"])
        finish(session.ask("one"))
        journal.close()
        os.utime(other, (when, when))
    (path.parent / "empty.jsonl").touch()
    assert transcript.last_session() == transcript.path_of("c")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 200, "ü"])
def test_invalid_session_ids_are_refused(path, name):
    with pytest.raises(UsageError):
        transcript.path_of(name)
    assert transcript.path_of(transcript.new_id())


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    session, journal = chat(None, ["1"])
    finish(session.ask("one"))
    assert list(tmp_path.iterdir()) == []
    transcript.export(journal.records, tmp_path / "x.jsonl")
    assert transcript.read(tmp_path / "x.jsonl").state == session.state


def test_export_as_markdown(path, tmp_path):
    session, journal = chat(path, ["Hello!\n\n```\ncode\n```", "Bye."])
    finish(session.ask("Hi"))
    finish(session.ask("Go"))
    out = tmp_path / "chat.md"
    transcript.export(journal.records, out)
    assert out.read_text() == (
        "**System**\n\nBe brief.\n\n**You**\n\nHi\n\n**demo**\n\nHello!\n\n```\ncode\n```\n\n"
        "**You**\n\nGo\n\n**demo**\n\nBye.\n"
    )
    with pytest.raises(UsageError, match="exists"):
        transcript.export(journal.records, out)
    with pytest.raises(UsageError, match="no session"):
        transcript.read(tmp_path / "nothing.jsonl")


def test_thinking_is_saved(path):
    session, _ = chat(path, ["<think>\nhm\n</think>\n\nYes."])
    finish(session.ask("one"))
    assert transcript.read(path).state.messages[-1] == Message("assistant", "Yes.", "hm")


def test_sessions_and_history_are_in_the_state_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECCHAT_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert transcript.sessions_folder() == tmp_path / "specchat" / "sessions"
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "x"))
    assert transcript.history_file() == Path(tmp_path / "x" / "history")


def test_a_disk_that_takes_a_part_is_an_error(path, monkeypatch):
    """An unbuffered write may write less than it is given, without an error; the next turn writes all of it."""
    session, journal = chat(path, ["1", "2"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        turn = finish(session.ask("one"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot save the chat" in turn.unsaved
    assert finish(session.ask("two")).unsaved is None
    journal.close()
    assert transcript.read(path).state == session.state


def test_a_session_that_another_process_begins_meanwhile_is_not_overwritten(path):
    """Both looked before the first answer: the turns of the first stay, and the others are said to be unsaved."""
    (first, ours), (second, theirs) = (chat(path, ["1", "2"]) for _ in range(2))
    assert finish(first.ask("one")).unsaved is None
    ours.close()
    for question in ("uno", "due"):
        unsaved = finish(second.ask(question)).unsaved
        assert unsaved is not None and "another specchat has begun this session" in unsaved
    assert [each.question for each in transcript.read(path).state.exchanges] == ["one"]
    theirs.close()


def test_a_session_that_another_process_continues_meanwhile_is_not_cut(path):
    session, journal = chat(path, ["1"])
    finish(session.ask("one"))
    journal.close()
    saved = transcript.read(path)
    other, journal = chat(path, ["2"], transcript.read(path))
    finish(other.ask("two"))
    journal.close()
    with pytest.raises(SessionError, match="changed by another specchat"):
        Transcript(path, saved)
    assert [each.question for each in transcript.read(path).state.exchanges] == ["one", "two"]
