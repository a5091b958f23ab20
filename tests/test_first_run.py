"""The script for the first minutes with a GPU runs on a pretended one, and its results reach the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import carry, facts, first_run
from gpu.first_run import Part
from support.pretended_gpu import PretendedGpu


@pytest.mark.slow
def test_facts_are_measured(tmp_path: Path):
    """Nothing fails on a pretended GPU, and every fact is written at once."""
    file = tmp_path / "facts.json"
    with PretendedGpu():
        found = facts.measure(facts.Scale(divisor=64, calls=2), file)
    assert not {name for name, fact in found.items() if isinstance(fact, str)}
    assert set(found) == {fact.__name__ for fact in facts.FACTS}
    assert json.loads(file.read_text()) == found
    few = found["few_rows"]
    assert isinstance(few, dict)
    assert {
        "2048x2048 int8 fused, 32 rows",
        "128256x8192 nf4 fused, 8 rows",
        "512x2048 bf16 dequantize, 8 rows",
    } <= set(few)
    drafts = found["draft"]
    assert isinstance(drafts, dict) and drafts["recorded passes"] == 3 and drafts["news"] == ""


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    parts = Part("fails", 9, "echo why; false"), Part("hangs", 1, "echo begun; sleep 60"), Part("works", 9, "echo yes")
    results = first_run.run_all(parts, tmp_path)
    assert [(each.status, each.output.strip()) for each in results] == [(1, "why"), (None, "begun"), (0, "yes")]
    assert first_run.read_results(tmp_path) == results
    assert capfd.readouterr().out.split("--- works")[1].splitlines()[1] == "yes"
    assert (tmp_path / "log.txt").read_text().splitlines()[:2] == ["--- fails", "why"]


def test_parts_end_within_the_given_time_and_earlier_results_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_run, "_LEAST_S", 0.5)
    first_run.run_all((Part("early", 9, "echo 1"), Part("again", 9, "echo 2")), tmp_path)
    hangs, late = Part("hangs", 60, "sleep 60"), Part("late", 60, "echo late")
    results = first_run.run_all((Part("again", 9, "echo 3"), hangs, late), tmp_path, within_s=1)
    assert [each.name for each in results] == ["again", "hangs"] and results[1].status is None
    assert [(each.name, each.output.strip()) for each in first_run.read_results(tmp_path)] == [
        ("early", "1"),
        ("again", "3"),
        ("hangs", ""),
    ]


def test_parts_are_named_once_and_begin_in_time():
    """What decides most is done in the first ten minutes, even where every part takes all of its time."""
    names = [part.name for part in first_run.PARTS]
    assert len(names) == len(set(names))
    before = {
        part.name: sum(each.limit_s for each in first_run.PARTS[:place]) for place, part in enumerate(first_run.PARTS)
    }
    assert before["streams"] <= 500 and before["profile"] <= 800
    for part in first_run.PARTS:
        files = [word for word in part.command.split() if word.startswith("tests/")]
        assert all((first_run.ROOT / file).exists() for file in files), part


def test_results_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page, out, second = tmp_path / "page.md", tmp_path / "out", tmp_path / "second"
    page.write_text(f"before\n\n{first_run.BEGIN}\n\nold\n\n{first_run.END}\n\nafter\n")
    monkeypatch.setattr(first_run, "PAGE", page)
    first_run.run_all((Part("works", 9, "echo yes"), Part("fails", 9, "echo 'a | b'; false")), out)
    first_run.run_all((Part("probe", 9, "echo the card"), Part("works", 9, "echo 'too | late'; false")), second)
    (out / "facts.json").write_text(json.dumps({"link": {"pinned 4 MiB": 25.1}, "graph": "failed: no"}))
    (second / "profile.txt").write_text("kernels\n")
    for name in ("demo_cpu", "demo_cuda"):
        (out / f"{name}.json").write_text(json.dumps({"token_ids": [1, 2]}))
    first_run.main([str(out), str(second), "--write"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| works | failed: too / late |" in text and "failed: a / b" in text
    assert "| link | pinned 4 MiB | 25.1 |" in text and "| graph |  | failed: no |" in text
    assert "is the same on CPU and GPU" in text and "the card" in text and "kernels" in text
    (second / "demo_cuda.json").write_text(json.dumps({"token_ids": [1, 3]}))
    assert any("**different**" in section for section in first_run.written([out, second]))


def test_what_a_bare_machine_lacks_is_carried(tmp_path: Path):
    """Nothing depends on the version of Python, and it is small."""
    assert carry.collect(tmp_path) == []
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40 << 20
    assert all("abi3" in file.name or file.name.startswith("libbitsandbytes") for file in files if file.suffix == ".so")
    code = "import sys, platformdirs, prompt_toolkit; print(sys.path[-1]); print(platformdirs.__file__)"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", f"import sitecustomize; {code}"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.startswith(str(tmp_path / "site")) for line in ran.stdout.splitlines()] == [True, True]


def test_the_page_has_a_place_for_the_results():
    text = first_run.PAGE.read_text()
    assert first_run.BEGIN in text and first_run.END in text
