"""Plots of sweeps, and plots that are refused before anything is measured."""

from importlib.util import find_spec

import pytest

from specchat.bench import plot
from specchat.errors import NotAvailableError, SpecchatError, UsageError


def point(value, speed, budget=1 << 30):
    entries = [
        {
            "temperature": temperature,
            "tok_per_s": {"mean": speed, "sd": 0.5},
            "tokens_per_step": {"mean": 3.0, "sd": None},
            "pass_s": 0.5,
        }
        for temperature in (0.0, 0.7)
    ]
    plan = {"tree_budget": 64 if value == "auto" else 16, "device_budget_bytes": budget, "dtype": "fp32"}
    plan["generation_bytes"] = budget // 4 if value == "64" else budget
    return {"value": value, "plan": plan, "summary": {"by_temperature": entries}}


def report(option, points):
    return {
        "model": "demo",
        "plan": points[0]["plan"],
        "machine": {"gpus": [], "cpu": {"name": "a cpu"}},
        "sweep": {"option": option, "points": points},
    }


@pytest.mark.parametrize(
    ("option", "values", "label"),
    [
        ("tree-budget", ("16", "auto"), "tree budget (nodes)"),
        ("vram", ("1GiB", "2GiB"), "device memory budget"),
        ("ctx", ("512", "1024"), "context (tokens)"),
        ("slots", ("1", "2"), "slots (layers)"),
        ("memory", ("1,024 (256+head)", "512 (64)"), "memory without weights (MiB)"),
        ("draft", ("none", "demo"), "draft"),
    ],
)
def test_plots_label_axes_and_lines(tmp_path, option, values, label):
    pytest.importorskip("matplotlib")
    typed = [value.partition("(")[2].rstrip(")") if option == "memory" else value for value in values]
    points = [point(value, 2.0 + i, (1 + i) << 30) for i, value in enumerate(typed)]
    plot.plot_sweep(report(option, points), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for words in (label, *values, "tok/s", "tokens per pass", "seconds per pass", "greedy", "t=0.7", "a cpu", "demo"):
        assert f">{words}" in text or f"{words}<" in text, words


def test_points_without_a_figure_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    plot.plot_sweep(report("ctx", [point("512", 2.0), point("1024", None)]), tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_unwritable_plot_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(SpecchatError, match="cannot write"):
        plot.plot_sweep(report("ctx", [point("512", 2.0)]), tmp_path / "a.svg")


def test_check_plot_refuses_bad_files_and_missing_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        plot.check_plot(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="does not exist"):
        plot.check_plot(tmp_path / "none" / "a.svg")
    monkeypatch.setattr(plot, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(NotAvailableError, match="matplotlib") as caught:
        plot.check_plot(tmp_path / "a.svg")
    assert "specchat[plot]" in caught.value.hint
