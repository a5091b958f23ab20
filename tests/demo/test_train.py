"""The training code, from a folder of texts to a measured pair, with models of a few thousand weights."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specchat.demo.train.batches import Batches, Mixture, TokenFile
from specchat.demo.train.checkpoint import load
from specchat.demo.train.evaluate import EvaluateOptions, evaluate
from specchat.demo.train.generate import GenerateOptions, generate, sample
from specchat.demo.train.model import KeyValueCache, Llama, Shape
from specchat.demo.train.optimizers import schedule
from specchat.demo.train.options import parse
from specchat.demo.train.prepare import PrepareOptions, prepare, read_chats, write_tokens
from specchat.demo.train.tokenizer import BOS_ID, END_ID, ChatTokenizer
from specchat.demo.train.train import Trainer, TrainOptions, train
from specchat.errors import UsageError

CPU = torch.device("cpu")
WORDS = (
    "the",
    "fox",
    "saw",
    "a",
    "red",
    "hen",
    "near",
    "old",
    "barn",
    "and",
    "ran",
    "home",
    "to",
    "sleep",
    "under",
    "trees",
)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=8)).capitalize() + "."


def _chat(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    turns = [("user", _sentence(rng)), ("assistant", _sentence(rng))] * 2
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread: models this small gain nothing from more, and waiting threads slow other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Return a folder with texts/*.txt and chats.jsonl, some KB of made-up sentences."""
    folder, rng = tmp_path_factory.mktemp("sources"), random.Random(1)
    (folder / "texts").mkdir()
    for number in range(8):
        text = " ".join(_sentence(rng) for _ in range(12))
        (folder / "texts" / f"{number}.txt").write_text(text)
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(_chat(rng)) for _ in range(30)))
    return folder


@pytest.fixture(scope="module")
def data(sources, tmp_path_factory) -> Path:
    """Return the folder that prepare writes, with its own tokenizer."""
    out = tmp_path_factory.mktemp("data")
    prepare(PrepareOptions(out, sources / "texts", sources / "chats.jsonl", vocabulary=320))
    return out


def _options(data: Path, out: Path, **changes) -> TrainOptions:
    tiny = {"batch_tokens": 256, "length": 32, "hidden": 64, "layers": 2, "draft_hidden": 64, "draft_layers": 1}
    return TrainOptions(data, out, **{"steps": 12, "bf16": False, **tiny, **changes})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> tuple[Path, list[list[float]]]:
    """Return a folder with a trained pair, and the losses of its training."""
    out = tmp_path_factory.mktemp("run")
    return out, train(_options(data, out))


def test_prepare_stores_whole_documents_as_uint16(sources, data):
    ids = np.load(data / "texts.npy")
    assert ids.dtype == np.uint16
    assert (ids == BOS_ID).sum() == (ids == END_ID).sum() == 8
    assert ids[0] == BOS_ID and ids[-1] == END_ID
    chats = np.load(data / "chats.npy")
    first = read_chats(sources / "chats.jsonl")[0]
    expected = ChatTokenizer(data / "tokenizer").encode_chat(first).ids
    assert chats[: len(expected)].tolist() == expected


def test_prepare_can_keep_a_tokenizer(sources, data, tmp_path):
    counts = prepare(PrepareOptions(tmp_path, chats=sources / "chats.jsonl", tokenizer=data / "tokenizer"))
    assert counts == {"chats": len(np.load(data / "chats.npy"))}
    assert not (tmp_path / "texts.npy").exists()
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


@pytest.mark.parametrize(
    "line", ["{}", "no json", '{"messages": [{"role": "user"}]}', '{"messages": [{"role": 1, "content": ""}]}']
)
def test_invalid_chat_is_reported_with_its_line(tmp_path, line):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": []}\n' + line)
    with pytest.raises(UsageError, match=r"chats\.jsonl:2 is not a chat"):
        read_chats(path)


def test_prepare_without_texts_and_chats_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no text"):
        prepare(PrepareOptions(tmp_path / "out", texts=tmp_path))


def test_windows_prefer_the_beginning_of_a_document(tmp_path):
    write_tokens(tmp_path / "texts.npy", [[BOS_ID, *range(10, 29)] for _ in range(50)])
    windows = TokenFile(tmp_path / "texts.npy").windows(100, 30, np.random.default_rng(0))
    assert windows.shape == (100, 30)
    assert (windows[:, 0] == BOS_ID).mean() > 0.6


def test_batches_depend_on_the_step_alone(data):
    mixture = Mixture(length=32, text_share=0.5)
    one, other = (Batches(data, None, 256, seed=3) for _ in range(2))
    one.draw(0, mixture)
    assert torch.equal(one.draw(1, mixture), other.draw(1, mixture))
    assert not torch.equal(one.draw(1, mixture), other.draw(2, mixture))


def test_a_file_too_short_for_a_window_is_refused(data):
    with pytest.raises(UsageError, match="tokens"):
        Batches(data, None, 256, seed=3).draw(0, Mixture(length=10**6, text_share=0.5))


def test_losses_fall(run):
    _, history = run
    first, last = np.mean(history[:2], axis=0), np.mean(history[-2:], axis=0)
    assert (last[:2] < first[:2] - 0.5).all()


def test_transformers_loads_the_export_with_the_same_logits(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("target", "draft"):
        folder = run[0] / name
        chat = [{"role": "user", "content": "The fox saw a hen."}, {"role": "assistant", "content": "It ran home."}]
        ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=True, return_dict=True)
        assert ids["input_ids"] == ChatTokenizer(folder).encode_chat(chat).ids
        rows = torch.tensor([ids["input_ids"]])
        with torch.inference_mode():
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(rows).logits
            torch.testing.assert_close(load(folder, CPU)(rows), expected, atol=1e-4, rtol=1e-4)


def test_decoding_with_a_cache_gives_the_same_logits(run):
    model = load(run[0] / "target", CPU)
    ids = torch.randint(4, model.shape.vocab_size, (2, 12))
    with torch.inference_mode():
        cache = KeyValueCache(model, batch=2, capacity=12)
        parts = [model(ids[:, :5], cache)] + [model(ids[:, at : at + 1], cache) for at in range(5, 12)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=1e-5, rtol=1e-4)


def test_resumed_run_gives_the_same_weights(data, tmp_path):
    unbroken, broken = (_options(data, tmp_path / name, steps=6) for name in ("unbroken", "broken"))
    whole = train(unbroken)
    first = Trainer(broken)
    assert [first.advance() for _ in range(3)] == whole[:3]
    first.save()
    second = Trainer(dataclasses.replace(broken, resume=True))
    assert second.step == 3
    rest = [second.advance() for _ in range(3)]
    second.save()
    np.testing.assert_allclose(rest, whole[3:], rtol=1e-5)
    states = [load_file(options.out / "state.safetensors") for options in (unbroken, broken)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-3)


def test_resume_without_a_saved_state_is_refused(data, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Trainer(_options(data, tmp_path, resume=True))


def test_draft_alone_learns_from_chats_that_the_target_wrote(data, run, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "run")
    written = tmp_path / "written.npy"
    count = generate(GenerateOptions(out / "target", data, written, tokens=500, batch=4, length=64, prompt=8))
    ids = np.load(written)
    assert len(ids) == count >= 500
    assert ids.max() < ChatTokenizer(data / "tokenizer").vocab_size
    before = (out / "draft" / "model.safetensors").read_bytes()
    history = train(_options(data, out, steps=4, draft_only=True, written=written))
    assert len(history) == 4
    assert (out / "draft" / "model.safetensors").read_bytes() != before
    assert (out / "draft_state.safetensors").is_file()


def test_sampling_keeps_the_prompt_and_follows_the_seed(run):
    model = load(run[0] / "draft", CPU)
    prompts = torch.tensor([[BOS_ID, 5, 6], [BOS_ID, 7, 8]])
    rows = [sample(model, prompts, 10, 1.0, torch.Generator().manual_seed(4)) for _ in range(2)]
    assert rows[0].shape == (2, 10)
    assert torch.equal(rows[0][:, :3], prompts)
    assert torch.equal(rows[0], rows[1])


def test_evaluate_measures_perplexity_and_agreement(sources, run):
    options = EvaluateOptions(run[0] / "target", run[0] / "draft", sources / "chats.jsonl")
    numbers = evaluate(options)
    assert 1 < numbers["target_perplexity"] < 320
    assert 1 < numbers["draft_reply_perplexity"] < 320
    assert 0 <= numbers["agreement"] == numbers["choice_in_top_1"] <= numbers["choice_in_top_16"] <= 1
    assert numbers["mass_in_top_1"] < numbers["mass_in_top_16"] <= 1.0001
    assert 0 < numbers["reply_tokens"] < numbers["tokens"]
    same = evaluate(dataclasses.replace(options, draft=options.target))
    assert same["agreement"] == 1
    assert same["draft_perplexity"] == same["target_perplexity"]


def test_the_shapes_are_those_of_the_shipped_pair():
    with torch.device("meta"):
        counts = [
            sum(weight.numel() for weight in Llama(Shape.of_width(width, layers, 4096)).parameters())
            for width, layers in ((256, 8), (128, 2))
        ]
    assert counts == [6_951_168, 893_568]


def test_the_schedule_warms_up_holds_and_decays():
    scales = [schedule(done, warm_up=0.1, decay=0.5) for done in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert scales == pytest.approx([0.02, 0.5, 1.0, 1.0, 0.51, 0.02])


def test_options_become_flags():
    words = ["--data", "d", "--out", "o", "--steps", "3", "--draft-only", "--no-bf16", "--written", "w.npy"]
    options = parse(TrainOptions, words)
    assert options == TrainOptions(Path("d"), Path("o"), 3, draft_only=True, bf16=False, written=Path("w.npy"))
    with pytest.raises(SystemExit):
        parse(TrainOptions, words[:4])


def test_nothing_is_pickled():
    package = Path(__file__).parents[2] / "specchat" / "demo" / "train"
    code = "".join(path.read_text() for path in package.glob("*.py"))
    assert "torch.save" not in code
    assert "torch.load" not in code
