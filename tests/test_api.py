"""specchat from Python: the public entry, without the command line."""

import json
import subprocess
import sys

import pytest

import specchat
from specchat.errors import EmptyPromptError, InvalidSizeError, ModelNotFoundError, PromptTooLongError, UsageError

STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


@pytest.fixture(scope="module")
def model():
    with specchat.load("demo", device="cpu", vram="1GiB", ctx=256, tree_budget=16) as loaded:
        yield loaded


def test_importing_is_light():
    code = "import specchat, sys; print({'torch', 'transformers', 'typer', 'rich'} & set(sys.modules), specchat.load)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("set() <function load")


def test_chat_streams_what_the_command_line_writes(model):
    answering = model.chat(STORY, max_tokens=24, temperature=0.0)
    pieces = list(answering)
    assert len(pieces) > 1 and "".join(piece.text for piece in pieces if piece.part == "answer") == answering.text
    assert answering.finish_reason == "length" and len(answering.token_ids) == 24
    limits = ("--device", "cpu", "--vram", "1GiB", "--ctx", "256", "--max-tokens", "24")
    greedy = ("--temperature", "0", "--draft", "none", "--json")
    command = [sys.executable, "-m", "specchat", "run", "demo", STORY[0]["content"], *limits, *greedy]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    plain = json.loads(found.stdout)
    assert tuple(plain["token_ids"]) == answering.token_ids
    assert plain["message"]["content"] == answering.text


def test_a_chat_goes_on(model):
    first = model.chat(STORY, max_tokens=8).read()
    longer = [*STORY, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert model.chat(longer, max_tokens=8).read() == model.chat(longer, max_tokens=8).read()


def test_draws_are_repeated_by_their_seed(model):
    texts = [model.chat(STORY, max_tokens=16, temperature=1.0, seed=seed).read() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_continues_text_and_token_ids(model):
    from_text = model.generate("Once upon a time", max_tokens=8)
    from_text.read()
    ids = model._tokenizer.encode("Once upon a time", add_special_tokens=True)
    from_ids = model.generate(ids, max_tokens=8)
    assert from_ids.read() == from_text.text and from_ids.token_ids == from_text.token_ids


def test_stop_strings_end_an_answer(model):
    whole = model.chat(STORY, max_tokens=24).read()
    word = whole.split()[3]
    stopped = model.chat(STORY, max_tokens=24, stop=[word])
    assert stopped.read() == whole[: whole.index(word)] and stopped.finish_reason == "stop"


def test_an_answer_can_be_left(model):
    answering = model.chat(STORY, max_tokens=24)
    next(answering)
    answering.close()
    assert model.chat(STORY, max_tokens=8).read()


def test_answers_teach_the_next_plan(model, monkeypatch, tmp_path):
    monkeypatch.setattr(model._learning, "_folder", tmp_path)
    model.chat(STORY, max_tokens=8).read()
    left = model.chat(STORY, max_tokens=24)
    next(left)
    left.close()
    saved = json.loads((tmp_path / "statistics.json").read_text())
    assert saved["pairs"] and "fox" not in (tmp_path / "statistics.json").read_text()


@pytest.mark.slow
def test_uses_of_experts_are_kept_unless_nothing_is_learned(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path))
    shape = "shape:hidden=512,layers=8,experts=16,experts_per_token=2,dtype=fp32"

    def load(**choices):
        return specchat.load(shape, device="cpu", vram="140MiB", ctx=128, draft="none", **choices)

    with load(learn=False) as model:
        model.generate("Once upon", max_tokens=4).read()
    assert not list(tmp_path.iterdir())
    with load() as model:
        assert not model.plan.placement.experts.uses
        model.generate("Once upon", max_tokens=4).read()
    with load() as model:
        assert len(model.plan.placement.experts.uses) == model.plan.experts.num_layers == 8


def test_the_plan_is_shown(model):
    assert model.plan.target == "demo" and model.plan.vram_bytes == 1 << 30
    assert model.plan.work.tree_budget == 16


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], EmptyPromptError),
        ([{"role": "nobody", "content": "hi"}], UsageError),
        ([{"role": "user"}], UsageError),
        ([{"role": "user", "content": "word " * 400}], PromptTooLongError),
    ],
    ids=["no message", "no role", "no content", "too long"],
)
def test_mistakes_raise_named_errors(model, messages, error):
    with pytest.raises(error) as caught:
        model.chat(messages).read()
    assert caught.value.message


def test_loading_refuses_what_the_command_line_refuses():
    with pytest.raises(ModelNotFoundError):
        specchat.load("./nosuch")
    with pytest.raises(InvalidSizeError):
        specchat.load("demo", vram="many")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nosuch"):
        specchat.nosuch  # noqa: B018
