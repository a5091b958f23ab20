"""Every command with `--workers`: real workers, the texts of one machine, and refusals with their exit codes."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli.test_serve_cli import server
from support.crews import TOKEN, Worker, be_another_version, crew, start_worker
from support.tiny_models import make_config, random_model, save

import specchat as library

Command = Callable[..., SimpleNamespace]
QUESTION = "Tell me about a fox."
FLAGS = ("--device", "cpu", "--dtype", "fp32", "--ctx", "512", "--max-tokens", "16")
SMALL = "28MiB"  # less than all layers take


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    with crew(2, tmp_path_factory.mktemp("workers")) as found:
        yield found


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECCHAT_TOKEN", TOKEN.decode())


def at(workers: list[Worker]) -> tuple[str, str]:
    return "--workers", ",".join(f"{host}:{port}" for host, port in (each.address for each in workers))


def answer(specchat: Command, *flags: str) -> dict[str, Any]:
    ran = specchat("run", "demo", QUESTION, "--json", "--no-save", "--seed", "3", *FLAGS, *flags)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


@pytest.mark.slow
def test_a_question_is_answered_as_on_one_machine(specchat: Command, workers: list[Worker]):
    expected = answer(specchat)
    found = answer(specchat, "--vram", SMALL, *at(workers))
    assert found["token_ids"] == expected["token_ids"] and len(found["token_ids"]) > 4
    used = found["memory"]["devices"]
    assert [each["device"] for each in used] == ["cpu", *(f"127.0.0.1:{each.address[1]} cpu" for each in workers)]
    assert sum(each["sent_bytes"] > 0 and each["compute_busy"] > 0 for each in used) > 1
    assert all(each.poll() is None for each in workers), "workers wait for the next machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--draft", "mtp"),
        ("--draft", "mtp+retrieval"),
        ("--draft", "none"),
        ("--quant", "int8"),
        ("--quant", "int4", "--temperature", "0.8"),
    ],
)
def test_drafts_and_packs_write_the_same_text(flags: tuple[str, ...], specchat: Command, workers: list[Worker]):
    expected = answer(specchat, *flags)
    assert answer(specchat, *flags, "--vram", SMALL, *at(workers))["token_ids"] == expected["token_ids"]


@pytest.mark.slow
def test_a_draft_that_reads_all_layers_is_refused(specchat: Command, workers: list[Worker]):
    ran = specchat("run", "demo", QUESTION, "--draft", "self", *FLAGS, *at(workers))
    assert ran.code == 2 and "cannot be used with workers" in ran.err


@pytest.mark.slow
def test_probe_shows_the_plan_of_all_machines(specchat: Command, workers: list[Worker]):
    ran = specchat("probe", "demo", "--device", "cpu", "--vram", SMALL, *at(workers))
    assert ran.code == 0, ran.err
    assert all(f"127.0.0.1:{each.address[1]} cpu" in ran.out for each in workers)


@pytest.mark.slow
def test_bench_measures_batches_with_workers(specchat: Command, workers: list[Worker]):
    small = ("--limit", "3", "--max-tokens", "8", "-r", "1", "--ctx", "512", "--tree-budget", "16", "--vram", SMALL)
    ran = specchat("bench", "demo", "--batch", "1,3", "--device", "cpu", *small, "--json", "-q", *at(workers[:1]))
    assert ran.code == 0, ran.err
    compared = [each for each in json.loads(ran.out)["batches"] if each["compared"]]
    assert compared and not any(each["different"] or each["near_ties"] for each in compared)


@pytest.mark.slow
def test_a_server_answers_as_run_does(specchat: Command, tmp_path: Path):
    expected = answer(specchat)["message"]["content"]
    small = (*FLAGS, "--vram", SMALL)
    with crew(1, tmp_path) as workers, server(tmp_path, *small, *at(workers)) as (_, url, _):
        body = {"messages": [{"role": "user", "content": QUESTION}], "seed": 3}
        asked = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as given:
            assert json.load(given)["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_the_library_answers_with_workers(specchat: Command, workers: list[Worker]):
    texts = []
    for more in ({}, {"vram": SMALL, "workers": at(workers)[1]}):
        with library.load("demo", device="cpu", dtype="fp32", ctx=512, learn=False, **more) as model:
            texts.append(model.chat([{"role": "user", "content": QUESTION}], max_tokens=16, seed=3).read())
    assert texts[0] == texts[1] and texts[0]


def test_what_does_not_fit_has_its_exit_code(
    specchat: Command, workers: list[Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ask = ("run", "demo", QUESTION, "--no-save", *FLAGS)
    with crew(1, tmp_path, [be_another_version]) as newer:
        ran = specchat(*ask, *at(newer))
        assert ran.code == 2 and "has specchat 0, torch 0, transformers 0" in ran.err
        newer[0].end()
        ran = specchat(*ask, *at(newer))
        assert ran.code == 5 and "cannot be reached" in ran.err
    other = save(random_model(make_config("llama")), tmp_path / "other")
    changed = start_worker(tmp_path / "changed.txt", model=str(other.path))
    ran = specchat(*ask, "--vram", SMALL, *at([changed]))
    changed.end()
    assert ran.code == 3 and "has other weights of demo" in ran.err
    monkeypatch.setenv("SPECCHAT_TOKEN", "another token that is long")
    ran = specchat(*ask, *at(workers))
    assert ran.code == 2 and "has another token" in ran.err
