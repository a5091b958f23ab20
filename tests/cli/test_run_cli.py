"""`specchat run` in scripts: its streams, exit codes and errors."""

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import fake_cli
from support.threads import FAILURES, at_most, watched_threads

from specchat.cli.exit_status import EXIT_CODES, code_of
from specchat.cli.other_tools import _ELSEWHERE, COMMANDS
from specchat.errors import AllocationError, SpecchatError
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.hub.download import Download
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

DEMO = Path(__file__).parents[2] / "specchat" / "demo" / "target"
TESTS = Path(__file__).parents[1]


def fails(result, code, *words):
    assert result.code == code, result.err
    assert result.out == ""
    banner = re.compile(r"specchat \d|.* \(details: --plan\)$")
    complaint = [line for line in result.err.splitlines() if not banner.match(line)]
    assert 1 <= len(complaint) <= 3, result.err
    assert complaint[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in complaint[1:])
    for word in words:
        assert word in result.err


# --- invalid usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nope"], ["--nope"]),
        (["run", "demo", "hi", "--nope"], ["--nope", "specchat run --help"]),
        (["run", "demo", "hi", "--seed"], ["--seed"]),
        (["run", "demo", "hi", "there"], ["there"]),
        (["rum"], ["rum", "run"]),
        (["prove"], ["prove"]),
        (["run"], ["demo", "specchat run demo"]),
        (["run", "demo", "hi", "--vram", "12"], ["--vram", "'12'", "8GiB"]),
        (["run", "demo", "hi", "--ctx", "0"], ["--ctx"]),
        (["run", "demo", "hi", "--ctx", "many"], ["--ctx", "many"]),
        (["run", "demo", "hi", "--tree-budget", "0"], ["--tree-budget", "--draft none"]),
        (["run", "demo", "hi", "--tree-budget", "x"], ["--tree-budget"]),
        (["run", "demo", "hi", "--max-tokens", "0"], ["--max-tokens"]),
        (["run", "demo", "hi", "--seed", "-1"], ["--seed"]),
        (["run", "demo", "hi", "--seed", str(2**63)], ["--seed"]),
        (["run", "demo", "hi", "--dtype", "int3"], ["--dtype", "bf16"]),
        (["run", "demo", "hi", "--device", "gpu"], ["--device", "cuda:N"]),
        (["run", "demo", "hi", "--device", "cuda:x"], ["--device"]),
        (["run", "demo", "hi", "--temperature", "-0.1"], ["--temperature"]),
        (["run", "demo", "hi", "--temperature", "nan"], ["--temperature"]),
        (["run", "demo", "hi", "--temperature", "inf"], ["--temperature"]),
        (["run", "demo", "hi", "--top-p", "0"], ["--top-p"]),
        (["run", "demo", "hi", "--top-p", "1.01"], ["--top-p"]),
        (["run", "demo", "hi", "--top-k", "-1"], ["--top-k"]),
        (["run", "demo", "hi", "--top-k", "1.5"], ["--top-k"]),
        (["run", "demo", "hi", "--min-p", "2"], ["--min-p"]),
        (["run", "demo", "hi", "--repetition-penalty", "0"], ["--repetition-penalty"]),
        (["run", "demo", "hi", "--stop", ""], ["--stop"]),
        (["run", "demo", "hi", "--system", "@/no/such/file"], ["--system", "/no/such/file"]),
        (["run", "demo", "hi", "--system", "x", "--base"], ["--base", "--system"]),
        (["run", "demo", "hi", "--json", "--json-stream"], ["--json-stream"]),
        (["run", "demo", "hi", "--plan", "--json-stream"], ["--plan"]),
        (["run", "demo", "hi", "-q", "-v"], ["--quiet", "--verbose"]),
        (["run", "demo", "hi", "--draft", "self", "--quant", "int4"], ["--draft self", "(int4)", "--quant none"]),
        (["run", "demo", "hi", "--draft", "none+retrieval"], ["--draft none", "use --draft retrieval"]),
        (["run", "demo"], ["empty"]),
        (["run", "demo", ""], ["empty"]),
        (["run", "demo", " \n"], ["empty"]),
    ],
    ids=" ".join,
)
def test_invalid_usage_exits_with_2(specchat, arguments, words):
    fails(specchat(*arguments), 2, *words)


@pytest.mark.parametrize("command", ["run", "bench", "probe"])
@pytest.mark.parametrize("word", sorted({*_ELSEWHERE, *COMMANDS}))
def test_commands_in_the_place_of_a_model_are_answered_with_ours(specchat, command, word):
    result = specchat(command, word)
    fails(result, 2, f"'{word}' is a command, not a model")
    assert "hint: " in result.err and "specchat" in result.err.splitlines()[1]


def test_an_alias_may_have_the_name_of_a_command(fake, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[aliases]\nlist = "demo"\n')
    assert fake("run", "list", "hi", "--config", str(config)).out == "You said: hi\n"


@pytest.mark.parametrize("word", sorted(_ELSEWHERE))
def test_commands_of_other_tools_are_answered_with_ours(specchat, word):
    result = specchat(word)
    fails(result, 2, f"there is no command '{word}'")
    ours = re.findall(r"`specchat ([a-z-]+)", result.err)
    assert ours or "`hf cache rm`" in result.err
    assert all(specchat(each, "--help").code == 0 for each in ours)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo"], 2, ["did you mean specchat run demo?"]),
        (["Qwen/Qwen3-8B"], 2, ["did you mean specchat run Qwen/Qwen3-8B?"]),
        (["Tell me a story"], 2, ["usage: specchat run MODEL [PROMPT]"]),
        (["run", "Tell me a story"], 3, ["'Tell me a story' looks like a prompt", "specchat run MODEL [PROMPT]"]),
        (["run", "llama3.2", "hi"], 3, ["did you mean meta-llama/Llama-3.2-1B-Instruct, "]),
        (["run", "wrok", "hi"], 3, ["'wrok' is not a model", "did you mean work?"]),
        (["run", "demo", "hi", "--draft", "wrok"], 3, ["did you mean work?"]),
        (["run", str(DEMO / "config.json"), "hi"], 3, [f"did you mean its folder, {DEMO}?"]),
    ],
)
def test_what_was_meant_is_suggested(specchat, tmp_path, monkeypatch, arguments, code, words):
    config = tmp_path / "config.toml"
    config.write_text('[aliases]\nwork = "demo"\n')
    monkeypatch.setenv("SPECCHAT_CONFIG", str(config))
    fails(specchat(*arguments), code, *words)


def test_stdin_that_is_not_text(specchat):
    fails(specchat("run", "demo", stdin=b"\xff\xfe"), 2, "UTF-8")


@pytest.mark.parametrize("draft", [[], ["--draft", "./no/such/folder"]], ids=["target", "draft"])
def test_no_such_folder(specchat, draft):
    fails(specchat("run", "demo" if draft else "./no/such/folder", "hi", *draft), 3, "no/such/folder")


def test_not_cached_while_offline(specchat):
    fails(specchat("run", "specchat-tests/no-such-model", "hi", "--offline"), 3, "cache")


def test_every_error_has_a_documented_exit_code():
    def kinds(kind):
        yield kind
        for child in kind.__subclasses__():
            yield from kinds(child)

    # some are made with more than a message, which no code depends on
    assert all(code_of(kind.__new__(kind)) in EXIT_CODES for kind in kinds(SpecchatError))


def test_internal_error_is_one_line_and_debug_adds_a_traceback(fake, monkeypatch):
    fails(fake("run", "demo", "crash"), 1, "internal error: RuntimeError: the first line", "SPECCHAT_DEBUG=1")
    monkeypatch.setenv("SPECCHAT_DEBUG", "1")
    assert "Traceback" in fake("run", "demo", "crash").err


def test_tracebacks_and_errors_mask_secrets(fake, monkeypatch):
    monkeypatch.setenv("SPECCHAT_DEBUG", "1")
    monkeypatch.setenv("HF_TOKEN", "the second")
    monkeypatch.setenv("SPECCHAT_API_KEY", "first")
    err = fake("run", "demo", "crash").err
    assert "RuntimeError: the *** line\n*** line" in err and "internal error: RuntimeError: the *** line" in err
    assert "second" not in err and " first" not in err


# --- errors that need a model ------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Return a copy of the demo target, to damage it."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    return folder


def ask(specchat, folder, *arguments):
    return specchat("run", str(folder), "hi", "--max-tokens", "1", *arguments)


def test_a_corrupt_header(specchat, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    fails(ask(specchat, broken), 3)


def test_a_truncated_shard(specchat, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    fails(ask(specchat, broken), 3)


def test_a_pickled_checkpoint(specchat, broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    fails(ask(specchat, broken), 3, "pickle")


def test_an_unreadable_tokenizer(specchat, broken):
    (broken / "tokenizer.json").write_text("{")
    fails(ask(specchat, broken), 3, "tokenizer")


def test_an_unsupported_architecture(specchat, broken):
    config = json.loads((broken / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (broken / "config.json").write_text(json.dumps(config))
    fails(ask(specchat, broken), 2)


def test_no_chat_template(specchat, broken):
    (broken / "chat_template.jinja").unlink()
    config = json.loads((broken / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    fails(ask(specchat, broken), 2, "--base")
    assert ask(specchat, broken, "--base", "-q").code == 0


def test_a_draft_with_another_vocabulary(specchat, broken):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i ^ 1 if i >= 512 else i for token, i in vocabulary.items()}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    fails(specchat("run", "demo", "hi", "--draft", str(broken)), 2, "vocabular")


def test_a_prompt_longer_than_the_context(specchat):
    fails(specchat("run", "demo", "fox " * 200, "--ctx", "64"), 4, "64")


def test_a_budget_too_small(specchat):
    fails(specchat("run", "demo", "hi", "--vram", "1MiB"), 4, "MiB")


def test_a_context_beyond_the_model(specchat):
    fails(specchat("run", "demo", "hi", "--ctx", "4096"), 2, "--ctx")


def test_a_device_that_is_not_there(specchat):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    fails(specchat("run", "demo", "hi", "--device", "cuda"), 5, "CUDA", "--device cpu")


def test_the_plan(specchat):
    plan = json.loads(specchat("run", "demo", "--plan", "--json").out)
    assert (plan["target"], plan["device"], plan["ctx"]) == ("demo", "cpu", 1024) and plan["predicted_tok_per_s"] > 0
    assert plan["device_bytes"] == sum(item["bytes"] for item in plan["ledger"])
    table = specchat("run", "demo", "--plan", "--draft", "none").out
    assert "a toy model for exercising the software" in table
    assert "no draft" in table


# --- the demo, as a process --------------------------------------------------------------------------------------

QUESTION = ("run", "demo", "Tell me a story about a fox.", "--seed", "1", "--max-tokens", "12", "--tree-budget", "64")


@pytest.fixture(scope="module")
def answer():
    command = [sys.executable, "-m", "specchat", *QUESTION, "--json"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)


def test_json(answer):
    result = json.loads(answer.stdout)
    assert (result["model"], result["draft"], result["device"], result["seed"]) == ("demo", "demo draft", "cpu", 1)
    assert (result["finish_reason"], len(result["token_ids"])) == ("length", 12)
    assert result["usage"]["completion_tokens"] == 12
    assert result["message"]["content"]
    assert result["speculation"]["tokens_per_step"] == pytest.approx(12 / result["speculation"]["steps"])
    assert result["memory"]["resident_layers"] + result["memory"]["streamed_layers"] == 8


def test_stderr_has_only_the_banner(answer):
    first, second = answer.stderr.splitlines()
    assert first.startswith("specchat ")
    assert "a toy model for exercising the software" in first
    assert re.fullmatch(r"all in RAM \([\d.]+ MiB\) · context 1,024 · about [\d.]+ tok/s \(details: --plan\)", second)


def test_text_and_json_stream_have_the_same_answer(answer, specchat):
    expected = json.loads(answer.stdout)
    text = specchat(*QUESTION)
    assert text.out == expected["message"]["content"] + "\n"
    assert "tok/pass" in text.err
    quiet = specchat(*QUESTION, "--draft", "none", "-q", "--json-stream")
    assert quiet.err == ""
    *deltas, done = [json.loads(line) for line in quiet.out.splitlines()]
    assert {delta["type"] for delta in deltas} == {"delta"}
    assert "".join(delta["text"] for delta in deltas) == done["message"]["content"] == expected["message"]["content"]
    assert [i for delta in deltas for i in delta["token_ids"]] == done["token_ids"] == expected["token_ids"]
    assert (done["type"], done["draft"]) == ("done", None)


def test_the_head_of_the_demo_writes_the_same_text(answer, specchat):
    expected, drafted = json.loads(answer.stdout), specchat(*QUESTION, "--draft", "mtp", "--json")
    result = json.loads(drafted.out)
    assert (result["draft"], result["retrieval"]) == ("mtp", False)
    assert "draft mtp" in drafted.err and "warning" not in drafted.err
    assert result["token_ids"] == expected["token_ids"]
    (source,) = result["speculation"]["by_source"]
    assert source["source"] == "mtp" and source["accepted"] > 0


def test_small_budget_streams_and_keeps_the_text(answer, specchat):
    expected = json.loads(answer.stdout)
    small = json.loads(specchat(*QUESTION, "--vram", "40MiB", "--json").out)
    assert small["token_ids"] == expected["token_ids"]
    memory = small["memory"]
    assert memory["streamed_layers"] >= 6
    assert memory["streamed_bytes_per_step"] > 0
    assert memory["device_peak_bytes"] <= memory["device_budget_bytes"] == 40 << 20


# --- streams and signals, without a model ------------------------------------------------------------------------


def test_the_answer_is_byte_exact_off_a_terminal(fake):
    assert fake("run", "demo", "escape").out.encode() == "a\x1b[31mb\x07c\r\nd\x9b2J &#x202e;\n".encode()


@pytest.mark.parametrize(
    ("prompt", "stdin", "asked"),
    [
        (["q"], b"", "q"),
        ([], b"from a pipe\n", "from a pipe"),
        (["q"], b"a\nfile\n\n", "a\nfile\n\nq"),
        (["q"], "日本🦊".encode(), "日本🦊\n\nq"),
        ([""], b"piped", "piped"),
    ],
)
def test_prompt_comes_from_argument_stdin_or_both(fake, prompt, stdin, asked):
    assert fake("run", "demo", *prompt, stdin=stdin).out.strip() == f"You said: {asked}"


def test_a_silent_pipe_is_remarked_on():
    """The remark comes before anything is written to the pipe, and the text still counts."""
    command = [sys.executable, "-m", "support.fake_cli", "run", "demo", "and more"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "FAKE_SILENT_S": "0"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert "waiting for the end of standard input" in process.stderr.readline()
        out, err = process.communicate("a text")
    assert out.strip() == "You said: a text\n\nand more"
    assert "waiting" not in err


def test_no_remark_on_stdin_without_a_pipe():
    command = [sys.executable, "-m", "support.fake_cli", "run", "demo", "hello"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "FAKE_SILENT_S": "0"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert "waiting" not in done.stderr


def test_stop_and_max_tokens(fake):
    stopped = json.loads(fake("run", "demo", "hi. there", "--stop", "zzz", "--stop", ". t", "--json").out)
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("You said: hi", "stop")
    cut = json.loads(fake("run", "demo", "hi", "--max-tokens", "3", "--json").out)
    assert (cut["message"]["content"], cut["finish_reason"]) == ("You", "length")


def test_quiet_and_verbose(fake):
    assert fake("run", "demo", "hi", "-q").err == ""
    assert "step 2: 3 tok · tree 64 nodes" in fake("run", "demo", "hi", "-v").err


def test_flag_without_effect_is_reported(fake):
    result = fake("run", "demo", "hi", "--top-p", "0.5")
    assert (result.code, "warning: --top-p has no effect" in result.err) == (0, True)
    assert "warning" not in fake("run", "demo", "hi", "--top-p", "0.5", "--temperature", "1").err


def test_tree_budget_without_a_draft_is_reported(fake):
    result = fake("run", "demo", "hi", "--draft", "none", "--tree-budget", "8")
    assert (result.code, "--tree-budget has no effect" in result.err, "no draft" in result.err) == (0, True, True)


def test_download_needs_consent(fake, monkeypatch):
    """Ask once for both models."""
    asked = []

    def look_up(ref, *, offline, **_):
        return Download(ref, "abc", 10, 4, 100, Path("cache"))

    def agree(downloads, confirm):
        asked.append(([each.name for each in downloads], confirm(downloads)))

    monkeypatch.setattr("specchat.models.locate.look_up", look_up)
    monkeypatch.setattr("specchat.loading.locate.agree", agree)
    monkeypatch.setattr("specchat.loading.locate.refuse_by_configuration", lambda *_: None)  # there is none
    monkeypatch.setattr("specchat.models.locate.obtain", lambda download, **_: ModelSource(download.name, DEMO))
    monkeypatch.setattr("specchat.loading.locate.relative_in_cache", lambda _: None)
    assert "no draft known for this model" in fake("run", "org/name", "hi").err
    fake("run", "org/name", "hi", "--yes", "--draft", "org/small", "--offline")
    assert asked == [(["org/name"], False), (["org/name", "org/small"], True)]


def test_unsupported_model_is_refused_before_a_download(fake):
    result = fake("run", "tiiuae/Falcon-Mamba-7B-Instruct", "hi")
    assert (result.code, "recurrent" in result.err) == (2, True)


def test_less_free_memory_than_planned_makes_the_plan_smaller(specchat, monkeypatch):
    """Report a smaller plan and answer; exit with 4 if no smaller plan exists."""
    from specchat.engine.engine import Engine

    load, plans = Engine.load, []

    def fail_first(plan, *others, **named):
        plans.append(plan)
        if len(plans) == 1:
            raise AllocationError("cannot allocate 9 GiB on cpu")
        return load(plan, *others, **named)

    monkeypatch.setattr(Engine, "load", fail_first)
    result = specchat("run", "demo", "hi", "--max-tokens", "4", "--device", "cpu")
    assert result.code == 0 and "9 GiB" in result.err and "trying again with" in result.err
    assert plans[1].device_bytes < plans[0].device_bytes and len(plans[1].placement.resident) < len(
        plans[0].placement.resident
    )

    def fail(plan, *_, **__):
        raise AllocationError("cannot allocate 9 GiB on cpu")

    monkeypatch.setattr(Engine, "load", fail)
    fails(
        specchat("run", "demo", "hi", "--device", "cpu", "-q", "--ctx", "64", "--tree-budget", "2"),
        4,
        "cannot be allocated",
    )


@pytest.mark.parametrize("failure", FAILURES)
def test_a_thread_that_cannot_start_makes_the_plan_smaller(specchat, monkeypatch, failure):
    """Release what was loaded before, then load the smaller plan."""
    from specchat.loading.engine import load_planned
    from specchat.models.hf.skeleton import build_skeleton

    load, build, models = load_planned, build_skeleton, []

    def build_and_watch(*arguments, **named):
        skeleton = build(*arguments, **named)
        models.append(weakref.ref(skeleton.model))
        return skeleton

    def load_and_look(*arguments, **named):
        assert not any(model() is not None for model in models)
        gc.disable()  # so that reference counts alone free the models
        try:
            return load(*arguments, **named)
        finally:
            gc.enable()

    monkeypatch.setattr("specchat.models.weights.open.build_skeleton", build_and_watch)
    monkeypatch.setattr("specchat.loading.engine.load_planned", load_and_look)
    arguments = ("run", "demo", "hi", "--max-tokens", "2", "--device", "cpu", "--vram", "40MiB")
    with at_most(60), watched_threads(1, failure) as threads:
        result = specchat(*arguments)
    assert result.code == 0 and result.out and "thread" in result.err and "trying again with" in result.err
    assert threads.count > 1 and not threads.num_running and models


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("can't start new thread"), OSError(errno.ENOMEM, "Cannot allocate memory")],
    ids=repr,
)
def test_running_out_of_memory_exits_with_4(specchat, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("specchat.cli.run.parse_models", fail)
    fails(specchat("run", "demo", "hi"), 4, "out of memory")


def test_closed_stdout_is_silent():
    command = f"{sys.executable} -m support.fake_cli run demo hi -q >&-"
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    done = subprocess.run(
        command, shell=True, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_random_seed_is_printed(fake):
    seeds = {json.loads(fake("run", "demo", "hi", "--json").out)["seed"] for _ in range(3)}
    assert len(seeds) == 3


STEPS_BEFORE_THE_GATE = len(fake_cli.WORDS) // 6 + 1  # of half the characters of a long answer, three at a time


def start(*arguments, gate="/nonexistent", **pipes):
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "FAKE_GATE": str(gate)}
    command = [sys.executable, "-m", "support.fake_cli", "run", "demo", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    return subprocess.Popen(command, env=environment, **pipes)


def start_and_wait_for_the_gate():
    process = start("gated long", "--json", "-v")
    while f"step {STEPS_BEFORE_THE_GATE}:".encode() not in process.stderr.readline():
        assert process.poll() is None
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(number):
    process = start("gated long", "-q")
    begun = process.stdout.read(5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, b"")
    assert (begun + out).startswith(b"word0")
    assert b"word59" not in out


def test_an_interrupted_json_run_prints_its_object():
    process = start_and_wait_for_the_gate()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    result = json.loads(out)
    assert (process.returncode, result["finish_reason"]) == (130, "interrupt")
    assert len(result["token_ids"]) == STEPS_BEFORE_THE_GATE * 3


def test_a_closed_pipe_is_silent(tmp_path):
    gate = tmp_path / "gate"
    process = start("gated long", "-q", gate=gate)
    process.stdout.read(5)
    process.stdout.close()
    gate.touch()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_two_interrupts_leave_at_once():
    process = start_and_wait_for_the_gate()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


# --- sampling ----------------------------------------------------------------------------------------------------


def defaults(**values):
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return SimpleNamespace(**dict.fromkeys(names) | values)


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ({}, {}, Sampling()),
        ({}, {"temperature": 0.7, "top_p": 0.9}, Sampling()),
        ({}, {"do_sample": True}, Sampling(temperature=1.0)),
        ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7, top_p=0.9)),
        ({"top_p": 1.0}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, Sampling(temperature=0.7)),
        ({"temperature": 0.0}, {"do_sample": True, "top_k": 20}, Sampling(top_k=20)),
        ({"temperature": 0.5}, {"top_p": 0.9, "top_k": 20}, Sampling(temperature=0.5)),
        ({}, {"do_sample": True, "top_k": 20, "min_p": 0.1}, Sampling(temperature=1.0, top_k=20, min_p=0.1)),
        ({}, {"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 1.1}, Sampling()),
    ],
)
def test_precedence_is_flag_model_greedy(flags, config, expected):
    assert resolve_sampling(SamplingChoices(**flags), defaults(**config), 0) == expected
