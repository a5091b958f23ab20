"""`specchat run --prompts` with the demo pair: texts of single runs, exit codes and messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specchat.models.catalog.ref import demo_source
from specchat.paths import state_folder
from specchat.planner.statistics import load as load_statistics

LINES = [
    {"id": "fox", "prompt": "Tell me about a fox.", "max_tokens": 12},
    {"id": "sea", "prompt": "What is the sea?", "temperature": 0.8, "seed": 31},
    {"id": "bad", "prompt": "x", "max_tokens": 0},
    {"id": "red", "messages": [{"role": "user", "content": "Why is red a colour?"}]},
    {"id": "far", "prompt": "How far is the moon?"},
]


def write(folder: Path, lines=LINES) -> tuple[Path, Path]:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return source, folder / "out.jsonl"


def results(path: Path) -> dict:
    return {each["id"]: each for each in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


@pytest.mark.parametrize("batch", ["3", "auto"])
def test_each_line_is_what_a_single_run_says(specchat, tmp_path: Path, batch: str):
    source, out = write(tmp_path)
    flags = ("--device", "cpu", "--max-tokens", "16", "--no-save")
    job = ("run", "demo", "--prompts", str(source), "-o", str(out), "--batch", batch, "--seed", "5", *flags)
    ran = specchat(*job)
    assert ran.code == 1 and ran.out == ""
    assert "1 prompt could not be answered" in ran.err and "5 of 5 done" in ran.err
    found = results(out)
    assert set(found) == {"fox", "sea", "bad", "red", "far"}
    assert "max_tokens" in found["bad"]["error"]
    for number, line in enumerate(LINES, 1):
        if line["id"] == "bad":
            continue
        result = found[line["id"]]
        own = [f"--{name.replace('_', '-')}={line[name]}" for name in ("max_tokens", "temperature") if name in line]
        prompt = line["prompt"] if "prompt" in line else line["messages"][0]["content"]
        assert result["seed"] == line.get("seed", 5 + number - 1)
        single = specchat("run", "demo", prompt, *flags, "--json", "--seed", str(result["seed"]), *own)
        assert single.code == 0, single.err
        expected = json.loads(single.out)
        assert result["text"] == expected["message"]["content"]
        assert result["token_ids"] == expected["token_ids"]
        assert result["finish_reason"] == expected["finish_reason"]
    assert not load_statistics(state_folder()).plans, "--no-save"
    before = out.read_bytes()
    again = specchat(*job)
    assert again.code == 1 and "all 5 prompts are done" in again.err and out.read_bytes() == before
    other = specchat(*job[:-2], "17", "--no-save")
    assert other.code == 2 and "other settings" in other.err and out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "IN"], ["-o OUT.jsonl"]),
        (["-o", "OUT"], ["--prompts"]),
        (["--batch", "3"], ["--prompts"]),
        (["--prompts", "IN", "-o", "OUT", "--batch", "0"], ["--batch"]),
        (["--prompts", "IN", "-o", "OUT", "--json"], ["--json"]),
        (["--prompts", "IN", "-o", "OUT", "--session", "x"], ["--session"]),
        (["a question", "--prompts", "IN", "-o", "OUT"], ["PROMPT"]),
        (["--prompts", "MISSING", "-o", "OUT"], ["--prompts cannot read"]),
        (["--prompts", "IN", "-o", "NO/SUCH/OUT"], ["-o cannot write"]),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(specchat, tmp_path: Path, arguments: list[str], words: list[str]):
    source, out = write(tmp_path)
    places = {"IN": str(source), "OUT": str(out), "MISSING": str(tmp_path / "missing"), "NO/SUCH/OUT": "/no/such/out"}
    ran = specchat("run", "demo", *(places.get(each, each) for each in arguments))
    assert ran.code in (1, 2) and ran.err.startswith(("error: ", "specchat ")), ran.err
    assert all(word in ran.err for word in words) and not out.exists()


def test_the_plan_of_a_job_names_the_seats(specchat, tmp_path: Path):
    source, _ = write(tmp_path)
    ran = specchat("run", "demo", "--prompts", str(source), "--batch", "4", "--plan", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "batch" in ran.out


@pytest.mark.parametrize("model", ["demo", "shape:hidden=512,layers=9"])
def test_the_plan_of_a_job_is_the_one_that_it_runs_under(specchat, tmp_path: Path, model: str):
    """With the context that the prompts need, also for a model whose weights are not there yet."""
    source, out = write(tmp_path, LINES[:1])
    job = ("run", model, "--prompts", str(source), "--max-tokens", "16", "--device", "cpu")
    plan = specchat(*job, "--plan", "--json")
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["ctx"] == 64
    (ctx,) = (choice for choice in json.loads(plan.out)["choices"] if choice["option"] == "ctx")
    assert ctx["why"] == "the longest prompt and its answer", "nobody asked for it"
    if model == "demo":
        assert "context 64 ·" in specchat(*job, "-o", str(out)).err
        assert load_statistics(state_folder()).pairs, "a job teaches the planner"


def test_a_plan_without_a_tokenizer_says_so(specchat, tmp_path: Path):
    source, _ = write(tmp_path)
    (tmp_path / "model").mkdir()
    config = demo_source("target").path / "config.json"
    (tmp_path / "model" / "config.json").write_bytes(config.read_bytes())
    job = ("run", str(tmp_path / "model"), "--prompts", str(source), "--plan", "--device", "cpu", "--draft", "none")
    ran = specchat(*job)
    assert ran.code == 0 and "no tokenizer" in ran.err
    assert "no tokenizer" not in specchat(*job, "--ctx", "512").err


def test_a_job_goes_on_only_with_what_its_answers_depend_on(specchat, tmp_path: Path):
    """Draft, seats and memory do not change the text; model, precision and sampling do."""
    source, out = write(tmp_path, [{"prompt": "A fox", "max_tokens": 4}])
    job = ("run", "demo", "--prompts", str(source), "-o", str(out), "--device", "cpu")
    assert specchat(*job, "--dtype", "bf16").code == 0
    before = out.read_bytes()
    for flags in (["--batch", "7"], ["--draft", "none"], ["--ctx", "256"], ["--tree-budget", "3"], ["--dtype", "bf16"]):
        again = specchat(*job, *flags)
        assert again.code == 0 and "all 1 prompts are done" in again.err, (flags, again.err)
    for flags in (["--temperature", "0.5"], ["--seed", "1"], ["--max-tokens", "9"], ["--dtype", "fp32"], ["--base"]):
        other = specchat(*job, *flags)
        assert other.code == 2 and "other settings" in other.err, (flags, other.err)
    (tmp_path / "model").symlink_to(demo_source("target").path)
    other = specchat("run", str(tmp_path / "model"), *job[2:])
    assert other.code == 2 and "other settings" in other.err
    assert out.read_bytes() == before
