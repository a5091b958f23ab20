"""Settings from all sources: their precedence, their origin, and the errors about invalid ones."""

import errno
import json
import os
from pathlib import Path

import pytest
from support.setups import setup

from specchat.chat import transcript
from specchat.chat.state import Opened
from specchat.chat.transcript import Saved
from specchat.cli import sessions, settings
from specchat.cli.settings import RUN_KEYS, Layer, resolve
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

THOUGHT = "First this.\nThen that."  # what the fake model thinks, see support.fake_cli


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Give each test its own home folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def config(tmp_path):
    def write(text, path=None):
        path = path or tmp_path / "config" / "specchat" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def chosen(given=None, session=None):
    file, aliases = settings.config_file(None)
    return resolve(RUN_KEYS, [settings.flags(given or {}), *(session or []), settings.environment(), file], aliases)


def test_precedence_is_flag_session_environment_file(config, monkeypatch):
    path = config("temperature = 0.1\ntop-p = 0.2\ntop_k = 3\nmin_p = 0.4\ndraft = 'none'\n")
    monkeypatch.setenv("SPECCHAT_TEMPERATURE", "0.5")
    monkeypatch.setenv("SPECCHAT_TOP_P", "0.6")
    monkeypatch.setenv("SPECCHAT_TOP_K", "7")
    session = [Layer({"temperature": 0.8, "top_p": 0.9}, lambda _: "session fox", is_parsed=True)]
    result = chosen({"temperature": "1.1"}, session)
    keys = ("temperature", "top_p", "top_k", "min_p", "draft")
    assert [result.get(key) for key in keys] == [1.1, 0.9, 7, 0.4, "none"]
    assert [result.sources[key] for key in ("temperature", "top_p", "top_k", "min_p")] == [
        "--temperature",
        "session fox",
        "SPECCHAT_TOP_K",
        f"min_p in {path}",
    ]
    assert result.get("seed") is None
    assert "seed" not in result.sources


def test_config_file_takes_every_type_of_value(config):
    config(
        'model = "big"\nvram = "8GiB"\nctx = 2048\ntree_budget = "auto"\noffline = true\nthink = false\nsave = false\n'
        'stop = ["a", "b"]\nsystem = "Be brief."\noverflow = "drop-oldest"\nseed = 7\nmax_tokens = 50\nraw = true\n'
        '[aliases]\nbig = "org/name@main"\n'
    )
    result = chosen()
    assert result.model("model") == "org/name@main"
    assert result.get("vram") == 8 << 30
    assert [result.get(key) for key in ("ctx", "tree_budget", "seed", "max_tokens")] == [2048, None, 7, 50]
    assert [result.get(key) for key in ("offline", "think", "save", "raw")] == [True, False, False, True]
    assert [result.get(key) for key in ("stop", "system", "overflow")] == [("a", "b"), "Be brief.", "drop-oldest"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature = 1", ["temprature", "did you mean temperature?"]),
        ("xyzzy = 1", ["xyzzy", "choose from"]),
        ("temperature = 'hot'", ["temperature in", "hot"]),
        ("temperature = -1", ["temperature in", "at least 0"]),
        ("temperature = true", ["temperature in"]),
        ("top_p = [1]", ["top_p in"]),
        ("vram = 12", ["vram in", "8GiB"]),
        ("offline = 'perhaps'", ["offline in", "perhaps"]),
        ("stop = ''", ["stop in", "empty"]),
        ("overflow = 'burst'", ["overflow in", "drop-oldest"]),
        ("system = '@/no/such/file'", ["system in", "/no/such/file"]),
        ("model = ", ["not TOML"]),
        ("aliases = 3", ["aliases"]),
        ("[aliases]\ndemo = 'org/x'", ["demo"]),
        ("[aliases]\n'a/b' = 'org/x'", ["a/b"]),
    ],
)
def test_invalid_config_file_is_reported(fake, config, text, words):
    path = config(text)
    result = fake("run", "demo", "hi")
    assert (result.code, result.out) == (2, "")
    for word in [*words, str(path)]:
        assert word in result.err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SPECCHAT_TEMPRATURE", "1", ["SPECCHAT_TEMPRATURE", "did you mean SPECCHAT_TEMPERATURE?"]),
        ("SPECCHAT_NONSENSE", "1", ["SPECCHAT_NONSENSE", "hint: a variable is named like its option"]),
        ("SPECCHAT_TEMPERATURE", "hot", ["SPECCHAT_TEMPERATURE", "hot"]),
        ("SPECCHAT_THINK", "perhaps", ["SPECCHAT_THINK"]),
        ("SPECCHAT_CONFIG", "/no/such/file", ["/no/such/file"]),
    ],
)
def test_invalid_environment_variable_is_reported(fake, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    result = fake("run", "demo", "hi")
    assert result.code == 2
    assert all(word in result.err for word in words)


def test_config_option_and_variable_choose_the_file(fake, config, tmp_path, monkeypatch):
    config("nonsense = 1")
    mine = config("seed = 5", tmp_path / "mine.toml")
    assert json.loads(fake("run", "demo", "hi", "--json", "--config", str(mine)).out)["seed"] == 5
    monkeypatch.setenv("SPECCHAT_CONFIG", str(mine))
    assert json.loads(fake("run", "demo", "hi", "--json").out)["seed"] == 5
    assert json.loads(fake("run", "demo", "hi", "--json", "--seed", "6").out)["seed"] == 6
    assert fake("run", "demo", "hi", "--config", "/no/such/file").code == 2


def test_run_without_model_uses_the_config_file(fake, config):
    config('model = "toy"\ndraft = "none"\nmax_tokens = 3\n[aliases]\ntoy = "demo"\n')
    result = json.loads(fake("run", "--json", stdin=b"hello").out)
    assert (result["model"], result["finish_reason"]) == ("demo", "length")
    config('model = "toy"\n[aliases]\ntoy = "./no/such/folder"\n')
    assert fake("run", stdin=b"hello").code == 3


def test_bench_and_run_share_settings(fake, config):
    path = config('vram = "12"\n')
    assert str(path) in fake("bench", "demo").err
    config("temperature = 1\nmodel = 'demo'\n")
    assert "no MODEL is given" in fake("bench").err


# --- sessions ----------------------------------------------------------------------------------------------------


def questions(name):
    return [e.question for e in transcript.read(transcript.path_of(name)).state.exchanges]


def test_single_answers_are_saved_only_with_a_session(fake):
    fake("run", "demo", "hi")
    assert not transcript.sessions_folder().exists()
    assert fake("run", "demo", "hi", "--session", "fox", "--no-save").code == 0
    assert not transcript.sessions_folder().exists()
    fake("run", "demo", "hi", "--session", "fox")
    fake("run", "demo", "ho", "--session", "fox")
    assert questions("fox") == ["hi", "ho"]


def test_continue_resumes_the_last_chat(fake, monkeypatch):
    fake("run", "demo", "hi", "--session", "fox", "--seed", "9", "--temperature", "0.4", "--system", "Be brief.")
    monkeypatch.setenv("SPECCHAT_SEED", "10")
    result = fake("run", "-c", "--json", stdin=b"ho")
    assert json.loads(result.out)["seed"] == 9
    assert "session fox: 1 turn so far" in result.err
    result = fake("run", "demo", "ha", "-c", "--json", "--seed", "11")
    assert json.loads(result.out)["seed"] == 11
    saved = transcript.read(transcript.path_of("fox"))
    assert questions("fox") == ["hi", "ho", "ha"]
    assert (saved.state.sampling.temperature, saved.state.sampling.seed, saved.state.system) == (0.4, 11, "Be brief.")


def test_resumed_chat_can_stay_unsaved(fake):
    fake("run", "demo", "hi", "--session", "fox")
    result = json.loads(fake("run", "-c", "--no-save", "--json", stdin=b"ho").out)
    assert result["usage"]["prompt_tokens"] > len("[user]hi\n[assistant]You said: hi\n[user]ho")
    assert questions("fox") == ["hi"]


@pytest.mark.parametrize("options", [(), ("--json",), ("--json-stream",)], ids=["text", "json", "json-stream"])
def test_an_answer_that_could_not_be_saved_is_a_failure(fake, monkeypatch, options):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = fake("run", "demo", "hi", "--session", "fox", *options)
    assert (result.code, "hi" in result.out, "No space left" in result.err) == (1, True, True)


def test_repaired_session_is_reported(fake):
    fake("run", "demo", "hi", "--session", "fox")
    fake("run", "demo", "ho", "--session", "fox")
    path = transcript.path_of("fox")
    path.write_bytes(path.read_bytes()[:-5])
    result = fake("run", "-c", stdin=b"ha")
    assert (result.code, "incomplete last line" in result.err) == (0, True)
    assert questions("fox") == ["hi", "ha"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["-c"], 2, "no saved chat"),
        (["-c", "--session", "x"], 2, "--session"),
        (["demo", "hi", "--session", "../x"], 2, "../x"),
        (["demo", "hi", "--overflow", "burst"], 2, "--overflow"),
    ],
)
def test_invalid_session_options_are_refused(fake, arguments, code, word):
    result = fake("run", *arguments, stdin=b"hi")
    assert (result.code, word in result.err) == (code, True)


def test_a_lone_argument_beside_a_resumed_chat_is_the_prompt(fake):
    fake("run", "demo", "hi", "--session", "fox")
    assert fake("run", "-c", "And now?").out == "You said: And now?\n"
    assert fake("run", "-c", "continue").out == "You said: continue\n"
    assert fake("run", "--session", "fox", "more please").out == "You said: more please\n"
    assert questions("fox") == ["hi", "And now?", "continue", "more please"]
    assert fake("run", "-c", "demo", stdin=b"as a model").out == "You said: as a model\n"
    for model in ("./nosuch", "org/nosuch", "llama3.2"):  # models, if misspelt or missing
        assert fake("run", "-c", model, "--offline", stdin=b"x").code == 3
    assert len(questions("fox")) == 5


def test_a_new_session_says_so(fake):
    assert "session fox: a new chat\n" in fake("run", "demo", "hi", "--session", "fox").err
    assert "a new chat" not in fake("run", "demo", "hi", "--session", "fox").err
    assert "session foxy: a new chat (did you mean fox?)" in fake("run", "demo", "hi", "--session", "foxy").err
    transcript.path_of("empty").touch()  # a full disk may leave that
    assert "session empty: a new chat\n" in fake("run", "demo", "hi", "--session", "empty").err
    transcript.path_of("empty").unlink()
    missing = fake("run", "--session", "nosuch", stdin=b"hi")
    assert (missing.code, missing.out) == (2, "")
    assert "error: there is no saved chat 'nosuch'" in missing.err and "the last ones are foxy, fox" in missing.err
    assert "did you mean foxy?" in fake("run", "--session", "fxy", stdin=b"hi").err


def test_damaged_session_is_an_error(fake):
    fake("run", "demo", "hi", "--session", "fox")
    path = transcript.path_of("fox")
    path.write_bytes(b"{}\n" + path.read_bytes())
    result = fake("run", "-c", stdin=b"ha")
    assert (result.code, "line 1" in result.err) == (1, True)


def test_resuming_with_another_model_is_reported(fake):
    fake("run", "demo", "hi", "--session", "fox", "--draft", "none")
    folder = str(Path(__file__).parents[2] / "specchat" / "demo" / "target")
    result = fake("run", folder, "hi", "-c", "--json", "--draft", "none")
    assert "this chat used demo so far" in result.err
    assert json.loads(fake("run", "-c", "--json", stdin=b"x").out)["model"] == folder


def test_resumed_hub_model_keeps_its_revision(monkeypatch, tmp_path):
    facts = setup(model="org/name", revision="abc", dtype="bf16", ctx=512)
    record = Opened(facts, None, Sampling(), None, None)
    saved = Saved(tmp_path / "fox.jsonl", (record,), 0, 0)
    (layer,) = sessions.layers(saved, None)
    assert (layer.values["model"], layer.values["dtype"], layer.values["ctx"]) == ("org/name@abc", "bf16", 512)
    assert sessions.layers(saved, "org/name")[0].values["model"] == "org/name@abc"
    assert "dtype" not in sessions.layers(saved, "org/other")[0].values
    assert sessions.was_with(saved, ModelSource("org/name@abc", tmp_path, "abc"))
    assert not sessions.was_with(saved, ModelSource("org/name", tmp_path, "abd"))
    assert not sessions.was_with(saved, ModelSource("org/other", tmp_path, "abc"))


# --- thinking and a full context ---------------------------------------------------------------------------------


def test_thinking_goes_to_stderr(fake):
    result = fake("run", "demo", "think")
    assert result.out == "So it is.\n"
    assert all(line in result.err for line in THOUGHT.splitlines())
    done = json.loads(fake("run", "demo", "think", "--json").out)
    assert done["message"] == {"role": "assistant", "content": "So it is.", "reasoning": THOUGHT}
    assert done["usage"]["reasoning_tokens"] > 10
    lines = [json.loads(line) for line in fake("run", "demo", "think", "--json-stream").out.splitlines()]
    assert "".join(line["text"] for line in lines[:-1]) == "So it is."
    assert "".join(line.get("reasoning", "") for line in lines[:-1]) == THOUGHT
    assert [i for line in lines[:-1] for i in line["token_ids"]] == lines[-1]["token_ids"]


def test_drop_oldest_makes_room_in_the_context(fake):
    for i in range(6):
        result = fake("run", "demo", f"{i}" * 30, "--session", "fox", "--overflow", "drop-oldest", "--max-tokens", "40")
        assert result.code == 0
    assert "oldest" in result.err
    assert [q[0] for q in questions("fox")] == ["2", "3", "4", "5"]
    result = fake("run", "demo", "x" * 250, "--session", "fox", "--overflow", "stop")
    assert result.code == 4


@pytest.mark.parametrize("command", ["run", "bench", "probe"])
def test_every_command_has_the_parameters_of_its_settings(command):
    """Compare the names of its parameters with the keys of its settings."""
    import typer

    from specchat.cli.app import app

    parameters = {parameter.name for parameter in typer.main.get_command(app).commands[command].params}
    keys = {key.name for key in (RUN_KEYS if command == "run" else settings.SHARED_KEYS)}
    assert keys - parameters == ({"history", "vi", "bell"} if command == "run" else set())
