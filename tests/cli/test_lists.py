"""`specchat models` and `specchat sessions`: what is listed is there, and what is removed is gone."""

import json

import pytest
from support.stores import point_stores_to
from support.terminal import Terminal

from specchat.chat import transcript
from specchat.models.packs.inventory import packs_folder


@pytest.fixture
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    point_stores_to(monkeypatch, tmp_path)
    return tmp_path


def sessions(specchat, *arguments):
    return json.loads(specchat("sessions", *arguments, "--json").out)["sessions"]


def test_sessions_are_listed_searched_shown_and_removed(fake, state):
    assert fake("sessions").err == "no saved chats\n"
    fake("run", "demo", "Tell me about " + "very " * 20 + "large foxes", "--session", "fox")
    fake("run", "demo", "And bears?", "--session", "bear", "--system", "Be brief.")
    fake("run", "demo", "more", "--session", "bear")
    listed = sessions(fake)
    assert [(each["id"], each["turns"], each["model"]) for each in listed] == [("bear", 2, "demo"), ("fox", 1, "demo")]
    assert listed[0]["title"] == "And bears?" and listed[1]["title"].endswith("very…")
    table = fake("sessions").out.splitlines()
    assert table[0].split() == ["first", "words", "ID", "changed", "turns", "model"]
    assert len(table) == 3 and table[1].startswith("And bears?")
    assert [each["id"] for each in sessions(fake, "search", "LARGE", "foxes")] == ["fox"]
    assert sessions(fake, "search", "nothing") == []
    assert fake("sessions", "search", "nothing").err == "no saved chat contains that text\n"
    assert fake("sessions", "show", "bear").out.startswith("**System**\n\nBe brief.\n\n**You**\n\nAnd bears?\n")
    shown = json.loads(fake("sessions", "show", "bear", "--json").out)
    assert [each["question"] for each in shown["turns"]] == ["And bears?", "more"]
    refused = fake("sessions", "rm", "bear")
    assert refused.code == 2 and "add --yes" in refused.err and transcript.path_of("bear").exists()
    assert fake("sessions", "rm", "bear", "--yes").code == 0
    assert [each["id"] for each in sessions(fake)] == ["fox"]


def test_a_damaged_session_is_listed_and_can_be_removed(fake, state):
    fake("run", "demo", "hi", "--session", "fox")
    transcript.path_of("bad").write_text("{}\n")
    assert {each["id"]: each["model"] for each in sessions(fake)} == {"bad": None, "fox": "demo"}
    assert fake("sessions", "rm", "bad", "--yes").code == 0
    assert [each["id"] for each in sessions(fake)] == ["fox"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sessions", "nope"], "choose from list, search, show, rm"),
        (["sessions", "show"], "usage: specchat sessions show ID"),
        (["sessions", "rm", "nosuch"], "there is no saved chat 'nosuch'"),
        (["sessions", "list", "fox"], "search TEXT"),
        (["models", "nope"], "choose from list, rm"),
        (["models", "rm"], "usage: specchat models rm NAME"),
        (["models", "rm", "demo"], "demo is a part of specchat and cannot be removed"),
        (["models", "rm", "org/nosuch"], "nothing on this disk is named 'org/nosuch'"),
    ],
)
def test_mistakes_are_answered(fake, state, arguments, words):
    result = fake(*arguments)
    assert result.code in (2, 3) and result.out == "" and words in result.err


def cached(folder, name, complete=True):
    """Write a repository into the hub's cache."""
    commit = "a" * 40
    repo = folder / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(repo / "blobs" / "1")
    if complete:
        (repo / "blobs" / "2").write_bytes(b"\0" * 3000)
        (snapshot / "model.safetensors").symlink_to(repo / "blobs" / "2")
    return repo


def test_models_are_listed_and_removed(fake, state):
    assert "no models on this disk" in fake("models").err
    repo = cached(state, "org/name")
    draft = cached(state, "Qwen/Qwen3-0.6B")
    cached(state, "org/part", complete=False)
    pack = packs_folder() / "abc"
    pack.mkdir(parents=True)
    (pack / "manifest.json").write_text(json.dumps({"name": "org/name", "format": 1, "layout": 1}))
    found = json.loads(fake("models", "--json").out)["models"]
    kinds = {(each["name"], each["kind"]) for each in found}
    assert kinds == {
        ("org/name", "model"),
        ("Qwen/Qwen3-0.6B", "draft"),
        ("org/part", "other"),
        ("org/name", "pack"),
    }
    assert found == sorted(found, key=lambda each: (-each["bytes"], each["name"]))
    lines = fake("models").out.splitlines()
    assert lines[0].split() == ["name", "kind", "from", "size", "last", "used", "note"]
    assert lines[-1].endswith(" in total")
    assert fake("models", "rm", "org/name").code == 2 and repo.exists()
    assert fake("models", "rm", "org/name", "--yes").code == 0
    assert not repo.exists() and not pack.exists() and draft.exists()


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2)])
def test_on_a_terminal_removing_asks(fake, state, answer, code):
    fake("run", "demo", "hi", "--session", "fox")
    environment = {"SPECCHAT_STATE_DIR": str(state / "state")}
    with Terminal("support.fake_cli", "sessions", "rm", "fox", environment=environment) as terminal:
        terminal.wait_for("remove the saved chat fox? [y/N]")
        terminal.send(answer + "\r")
        assert terminal.exit_code() == code
    assert transcript.path_of("fox").exists() == (answer == "n")


def test_lists_are_readable_on_40_columns(fake, state):
    fake("run", "demo", "Tell me a story about a fox.", "--session", "fox")
    environment = {"SPECCHAT_STATE_DIR": str(state / "state")}
    with Terminal("support.fake_cli", "sessions", columns=40, environment=environment) as terminal:
        assert terminal.exit_code() == 0
        assert terminal.screen.startswith("Tell me a story about a fox.\n  fox · 20")
