"""The offer of the best model to a user who names none, and the messages that the demo suggests."""

import re

import pytest
from support.fake_hub import serving
from support.terminal import Terminal
from support.tiny_models import make_config, random_model, save

from specchat.models.catalog.ref import DEMO_PROMPTS

OFFER = re.compile(r"best\s+for\s+this\s+machine:\s+(?P<name>[\w./-]+),\s+about\s+[\d.]+\s+tok/s")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save(random_model(make_config("llama")), tmp_path_factory.mktemp("tiny") / "model").path
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(tmp_path):
    with serving() as served:
        served.environment = {
            "HF_ENDPOINT": served.url,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        yield served


def offered(terminal):
    """Wait for the offer and return the model's name."""
    terminal.wait_for(lambda t: "[y/N]" in t.screen.replace("\n", ""))
    found = OFFER.search(terminal.scrollback)
    assert found, terminal.scrollback
    return found["name"]


@pytest.mark.parametrize("command", ["run", pytest.param("probe", marks=pytest.mark.slow)])
def test_one_yes_downloads_the_best_model_and_starts_a_chat(hub, files, command):
    arguments = (command, "--draft", "none", "--device", "cpu", "--ctx", "64")
    with Terminal("specchat", *arguments, columns=110, rows=50, environment=hub.environment) as terminal:
        name = offered(terminal)
        assert re.search(r"download [\d.]+ [MG]iB to", terminal.screen) and not hub.requests
        hub.publish(name, files)
        terminal.send("y\r")
        terminal.wait_for_prompt()
        assert f"specchat 0.1.0 · {name}" in terminal.scrollback
        assert terminal.scrollback.replace("\n", "").count("[y/N]") == 1
        assert "%|" not in terminal.scrollback  # bars of the hub's library
        terminal.send("\x04")
        assert terminal.exit_code() == 0
    assert any("/resolve/" in request for request in hub.requests)


@pytest.mark.parametrize(("command", "code"), [("run", 2), pytest.param("probe", 0, marks=pytest.mark.slow)])
def test_no_downloads_nothing(hub, command, code):
    with Terminal("specchat", command, columns=80, environment=hub.environment) as terminal:
        offered(terminal)
        terminal.send("\r")
        assert terminal.exit_code() == code
        assert ("no MODEL was chosen" in terminal.scrollback) == (command == "run")
    assert not hub.requests


def test_offline_offers_no_download(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    with Terminal("specchat", "run", environment=environment) as terminal:
        assert terminal.exit_code() == 2
        assert "[y/N]" not in terminal.scrollback and "specchat probe" in terminal.scrollback


def test_without_a_terminal_nobody_is_asked(specchat):
    result = specchat("run")
    assert result.code == 2 and result.err.startswith("error: no MODEL is given") and result.out == ""


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_demo_suggests_messages(columns):
    with Terminal("support.fake_cli", "run", "demo", columns=columns) as terminal:
        terminal.wait_for_prompt()
        shown = " ".join(terminal.screen.split())
        assert all(prompt in shown for prompt in DEMO_PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "words"), [*zip(DEMO_PROMPTS, ("model", "movie|genre|theater", "time|table"), strict=True)]
)
def test_the_demo_answers_what_it_suggests(specchat, prompt, words):
    assert re.search(words, specchat("run", "demo", prompt, "-q", "--temperature", "0").out)
