"""`specchat serve` as a user runs it: the same text as `specchat run`, its address, its signals, and no traces."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from specchat.cli.serve import ServeOptions, _warn_if_open
from specchat.errors import NotAvailableError
from specchat.loading.request import ModelRequest
from specchat.serve import installed
from specchat.serve.http import bound_socket, is_loopback, start_listening, url_of
from specchat.ui.console import Talk

ROOT = Path(__file__).parents[2]
QUESTION = "Tell me about the sea."
PRECISE = ("--dtype", "fp32", "--draft", "demo", "--tree-budget", "8", "--ctx", "512")


def environment(state: Path) -> dict[str, str]:
    return os.environ | {"SPECCHAT_STATE_DIR": str(state), "PYTHONPATH": str(ROOT)}


@contextmanager
def server(state: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """Start a server on a free port; return its process, base URL and first lines."""
    command = [sys.executable, "-m", "specchat", "serve", "demo", "--port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(state)) as process:
        lines: list[str] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"serving demo at (http://\S+)", line):
                    yield process, found[1], lines
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            process.kill()


def answer_to(client: openai.OpenAI, question: str) -> str | None:
    asked = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": question}])
    return asked.choices[0].message.content


def readme_example(url: str) -> list[str]:
    """Run the example of the README with our server, and return what it prints, line by line."""
    page = (ROOT / "README.md").read_text()
    (code,) = [block.partition("```")[0] for block in page.split("```python\n")[1:] if "import OpenAI" in block]
    assert "http://127.0.0.1:8000/v1" in code and 'api_key="none"' in code
    code = code.replace("http://127.0.0.1:8000/v1", url).replace('api_key="none"', 'api_key="sesame"')
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split(
        " CompletionUsage("
    )


def test_the_text_is_that_of_run_and_none_is_kept(specchat: Callable[..., SimpleNamespace], tmp_path: Path):
    flags = ("--max-tokens", "32", "--temperature", "0", *PRECISE)
    expected = json.loads(specchat("run", "demo", QUESTION, "--json", "--no-save", *flags).out)
    state = tmp_path / "state"
    with server(state, "--api-key", "sesame", "--parallel", "2", *flags) as (process, url, lines):
        client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        for model in ("demo", "default", ""):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": QUESTION}], seed=expected["seed"]
            )
            assert answer.choices[0].message.content == expected["message"]["content"]
            assert answer.usage.completion_tokens == expected["usage"]["completion_tokens"]
            assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
        assert {answer.choices[0].finish_reason, answer.model} == {expected["finish_reason"], "demo"}
        assert readme_example(url)[0] == answer_to(client, "Who are you?")
        process.send_signal(signal.SIGINT)
        log = "".join(lines) + process.stderr.read()
        assert process.wait() == 130
    assert log.count("answer: ") == 5 and "Traceback" not in log
    assert "sea" not in log and answer.choices[0].message.content[:20] not in log and "sesame" not in log
    (kept,) = (each for each in state.rglob("*") if each.is_file())
    assert kept.name == "statistics.json" and answer.choices[0].message.content[:20] not in kept.read_text()
    (pair,) = json.loads(kept.read_text())["pairs"]
    assert pair.startswith("demo ") and pair.endswith(" greedy")


def test_sigterm_ends_an_answer_in_progress(tmp_path: Path):
    with server(tmp_path, "--ctx", "900") as (process, url, _):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        stream = client.completions.create(model="demo", prompt="Once", stream=True, temperature=0, logit_bias={})
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait() == 143


def test_a_port_in_use_is_refused_before_anything_is_loaded(specchat):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = specchat("serve", "demo", "--port", str(port))
    assert result.code == 2 and result.out == ""
    assert result.err.startswith(f"error: cannot listen on port {port} of 127.0.0.1: address already in use\n")
    assert result.err.endswith("hint: choose another --port; --port 0 takes a free one\n")


def test_a_port_taken_while_the_model_loads_is_refused():
    with bound_socket("127.0.0.1", 0) as bound, bound_socket("127.0.0.1", bound.getsockname()[1]) as other:
        start_listening(other)
        with pytest.raises(Exception, match="address already in use"):
            start_listening(bound)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "x"), "--port must be a whole number, from 0 to 65535, not 'x'"),
        (("--port", "70000"), "--port must be from 0 to 65535, not 70000"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid is no address of this machine"),
        (("--host", "192.0.2.1"), "cannot listen on port 8000 of 192.0.2.1: cannot assign requested address"),
        (("--parallel", "0"), "--parallel must be at least 1, not 0"),
        (("--api-key", ""), "--api-key must be printable ASCII characters, without spaces around them"),
        (("--api-key", "schlüssel"), "--api-key must be printable ASCII characters, without spaces around them"),
        (("--allow-origin", ""), "--allow-origin must not be empty"),
    ],
)
def test_wrong_flags(specchat, flags: tuple[str, ...], message: str):
    result = specchat("serve", "demo", *flags)
    assert result.code == 2 and result.err.splitlines()[0] == f"error: {message}"


def test_a_server_without_a_model_lists_some(specchat):
    result = specchat("serve")
    assert result.code == 2 and "demo" in result.err


def test_more_seats_than_memory_are_refused(specchat):
    result = specchat("serve", "demo", "--port", "0", "--parallel", "64", "--vram", "200MiB", "--ctx", "1024")
    assert result.code == 4 and "or lower the number of answers at once" in result.err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed, "_PACKAGES", ("starlette", "specchat_nosuch"))
    with pytest.raises(NotAvailableError, match="specchat_nosuch") as caught:
        installed.check_installed()
    assert caught.value.hint == "run pip install 'specchat[serve]'"


def test_words_of_other_servers(specchat):
    assert "specchat serve MODEL" in specchat("server").err


def test_addresses():
    with bound_socket("127.0.0.1", 0) as bound:
        assert is_loopback(bound) and url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    with bound_socket("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)


def test_settings_of_the_server(specchat, tmp_path: Path):
    """The key may be in the configuration, where other users of the machine do not see it."""
    config = tmp_path / "config.toml"
    config.write_text(
        'host = "192.0.2.1"\napi_key = "sesame"\nport = 8001\nparallel = 2\nallow_origin = ["https://x"]\n'
    )
    result = specchat("serve", "demo", "--config", str(config))
    assert "cannot listen on port 8001 of 192.0.2.1" in result.err
    config.write_text("prt = 8001\n")
    assert "did you mean port?" in specchat("serve", "demo", "--config", str(config)).err


@pytest.mark.parametrize(
    ("host", "api_key", "warns"),
    [("0.0.0.0", None, True), ("0.0.0.0", "sesame", False), ("127.0.0.1", None, False), ("localhost", None, False)],
)
def test_an_open_server_is_warned_about(host: str, api_key: str | None, warns: bool):
    out = io.StringIO()
    with bound_socket(host, 0) as bound:
        _warn_if_open(ServeOptions(ModelRequest("demo"), host=host, api_key=api_key), bound, Talk(out))
    assert ("warning: everyone who reaches 0.0.0.0 can use this server" in out.getvalue()) == warns
