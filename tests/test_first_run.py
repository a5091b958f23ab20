"""The script for the first minutes with a GPU runs on a pretended one, and its results reach the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu import facts, first_run
from gpu.first_run import Part
from support.pretended_gpu import PretendedGpu


@pytest.mark.slow
def test_facts_are_measured():
    """What needs a real GPU fails, is named, and stops nothing."""
    with PretendedGpu():
        found = facts.measure(facts.Scale(divisor=64, calls=2))
    failed = {name for name, fact in found.items() if isinstance(fact, str)}
    assert failed == {"graph"} and set(found) == {fact.__name__ for fact in facts.FACTS}


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path):
    parts = Part("fails", 9, "echo why; false"), Part("hangs", 1, "echo begun; sleep 60"), Part("works", 9, "echo yes")
    results = first_run.run_all(parts, tmp_path / "out")
    assert [(each.status, each.output.strip()) for each in results] == [(1, "why"), (None, "begun"), (0, "yes")]
    assert [each["name"] for each in json.loads((tmp_path / "out" / "results.json").read_text())] == [
        "fails",
        "hangs",
        "works",
    ]


def test_results_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"before\n\n{first_run.BEGIN}\n\nold\n\n{first_run.END}\n\nafter\n")
    monkeypatch.setattr(first_run, "PAGE", page)
    first_run.run_all((Part("works", 9, "echo yes"), Part("fails", 9, "echo 'a | b'; false")), out)
    (out / "facts.json").write_text(json.dumps({"link": {"pinned 4 MiB": 25.1}, "graph": "failed: no"}))
    for name in ("demo_cpu", "demo_cuda"):
        (out / f"{name}.json").write_text(json.dumps({"message": {"content": "the sea"}}))
    first_run.main([str(out), "--write"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| works | passed |" in text and "failed: a / b" in text
    assert "| link | pinned 4 MiB | 25.1 |" in text and "| graph |  | failed: no |" in text
    assert "is the same on CPU and GPU" in text


def test_the_page_has_a_place_for_the_results():
    text = first_run.PAGE.read_text()
    assert first_run.BEGIN in text and first_run.END in text
