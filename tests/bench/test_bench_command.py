"""`specchat bench` itself: a real run on the demo, comparisons, sweeps, interrupts, and invalid usage."""

import json
import os
import re
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from support.fake_engine import PLAN
from support.plans import changed
from support.terminal import Terminal

from specchat.bench import measure
from specchat.bench.readme import BEGIN, END, SWEEPS_BEGIN, SWEEPS_END, main, with_measured
from specchat.bench.setup import left_out
from specchat.bench.tables import report_tables, share, share_lines
from specchat.cli import bench
from specchat.cli.app import run_command_line
from specchat.cli.bench_options import BASELINES, BenchOptions
from specchat.errors import UsageError
from specchat.hardware.probe import libraries_bytes
from specchat.loading.request import ModelRequest
from specchat.records.plan import ExpertForecast, PlanChoices
from specchat.ui.console import talk
from specchat.units import format_bytes

SCHEMA = json.loads(files("specchat.bench").joinpath("schema.json").read_text())
ROOT = Path(__file__).parents[2]
SMALL = ("--limit", "1", "--max-tokens", "8", "-r", "1", "--vram", "34MiB", "--ctx", "512", "--tree-budget", "16")


@pytest.fixture
def specchat(capfd):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def call(*arguments):
        capfd.readouterr()
        code = run_command_line(arguments)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return two report files of the same measurement, made by the command."""
    folder = tmp_path_factory.mktemp("reports")
    made = []
    for name, extra in (("a", ("--baseline", "plain,accelerate,assisted")), ("b", ("--baseline", "none"))):
        path = folder / f"{name}.json"
        with path.open("w") as out, redirect_stdout(out):
            assert run_command_line(["bench", "demo", *SMALL, *extra, "--json", "-q"]) == 0
        made.append(path)
    return made


def test_the_automatic_draft_may_be_a_head_in_the_targets_files(tmp_path):
    for file in files("specchat.demo").joinpath("target").iterdir():  # a folder that is no toy
        (tmp_path / file.name).symlink_to(file)
    options = BenchOptions(ModelRequest(str(tmp_path), choices=PlanChoices(ctx=512)), quiet=True)
    say = talk(quiet=True)
    (point,) = bench._points(options, say)
    job = bench._job(options, point, (), 1, say)
    assert job.draft is not None and (job.draft.part, job.plan.draft) == ("mtp", "mtp")


def test_the_schema_names_every_baseline():
    assert tuple(SCHEMA["$defs"]["baseline"]["properties"]["name"]["enum"]) == BASELINES


def test_demo_against_every_baseline(reports):
    report = json.loads(reports[0].read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["plan"]["dtype"] == "fp32"
    assert report["plan"]["streamed_layers"] > 0
    assert [each["name"] for each in report["baselines"]] == ["plain", "accelerate", "assisted"]
    for baseline in report["baselines"]:
        near_ties_only = baseline["near_ties"] == baseline["differing_answers"]
        assert baseline["identical_output"] or near_ties_only, baseline["first_difference"]
        assert baseline["compared_answers"] == (4 if baseline["name"] == "plain" else 2)
        assert report["speedup"][baseline["name"]]["ratio"] > 0
    plain, accelerate, assisted = report["baselines"]
    assert plain["tokens_per_step"]["mean"] == accelerate["tokens_per_step"]["mean"] == 1
    assert assisted["tokens_per_step"]["mean"] > 1
    assert report["summary"]["stream"]["achieved_bytes_per_s"] > 0
    split = report["summary"]["pass_split"]
    assert sum(split.values()) == pytest.approx(report["summary"]["pass_s"])
    assert {run["temperature"] for run in report["runs"]} == {0.0, 0.7}


def test_tables_have_no_empty_headers_columns_or_dashes(reports):
    for path in reports:
        report = json.loads(path.read_text())
        for table in report_tables(report):
            assert all(table.header), table
            assert all(any(column) for column in zip(*table.rows, strict=True)), table
            assert "-" not in {cell for row in table.rows for cell in row}
        assert dict(share_lines(report))["asked"].startswith("1 question (built-in), 1 repeat, ")


def test_same_seed_gives_same_tokens(reports):
    a, b = (json.loads(path.read_text()) for path in reports)
    assert [run["token_ids"] for run in a["runs"]] == [run["token_ids"] for run in b["runs"]]
    assert b["baselines"] == []
    assert b["speedup"] == {}


def test_compare(specchat, reports):
    result = specchat("bench", "--compare", *map(str, reports), "--json")
    assert result.code == 0, result.err
    comparison = json.loads(result.out)
    assert comparison["common_answers"] == comparison["same_output"] == 4
    figure = comparison["figures"]["tokens_per_step"]
    assert figure["ratio"] == pytest.approx(1)
    assert figure["significant"] is None  # one question is not enough
    shown = specchat("bench", "--compare", *map(str, reports))
    assert "tok_per_s" in shown.out
    assert "fewer than 6 questions" in shown.out
    assert specchat("bench", "--compare", *map(str, reports), "-o", "md").out.startswith("**B against A**")


def test_compare_finds_a_real_difference(specchat, tmp_path, reports):
    report = json.loads(reports[0].read_text())
    run = report["runs"][0] | {"counted": True, "distinct_4gram": 1.0}
    runs = [run | {"question_id": f"q{i}"} for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(report | {"runs": runs}))
    faster = [each | {"timings": each["timings"] | {"tok_per_s": 2 * run["timings"]["tok_per_s"]}} for each in runs]
    (tmp_path / "b.json").write_text(json.dumps(report | {"runs": faster}))
    result = specchat("bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json")
    figures = json.loads(result.out)["figures"]
    assert figures["tok_per_s"]["ratio"] == pytest.approx(2)
    assert figures["tok_per_s"]["significant"] is True
    assert figures["ttft_s"]["significant"] is False


def test_sweep(specchat, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.svg"
    result = specchat("bench", "demo", *SMALL, "--sweep", "tree-budget=4,16", "--plot", str(picture))
    assert result.code == 0, result.err
    assert f"wrote {picture}" in result.err
    assert "tree budget (nodes)" in picture.read_text()
    assert "tok/s by tree-budget" in result.out
    assert "█" in result.out
    assert "\x1b" not in result.out


@pytest.mark.slow
def test_sweep_over_slots(specchat):
    result = specchat("bench", "demo", *SMALL, "--vram", "36MiB", "--sweep", "slots=1,3", "--json", "-q")
    assert result.code == 0, result.err
    points = json.loads(result.out)["sweep"]["points"]
    assert [point["plan"]["slots"] for point in points] == [1, 3]
    texts = [[run["token_ids"] for run in point["runs"]] for point in points]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_sweep_over_generation_memory(specchat):
    options = (*SMALL, "--vram", "60MiB", "--sweep", "memory=64+head,64,8")
    result = specchat("bench", "demo", *options, "--json", "-q")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    points = report["sweep"]["points"]
    assert [point["plan"]["tree_budget"] for point in points] == [64, 64, 8]
    assert len({point["plan"]["resident_layers"] for point in points}) == 1
    planned = [point["plan"]["generation_bytes"] for point in points]
    counted = [point["generation"]["peak_bytes"] for point in points]
    assert planned[0] >= planned[1] > planned[2] > 0
    assert counted[0] >= counted[1] > counted[2] > 0
    assert all(c <= p for c, p in zip(counted, planned, strict=True))
    assert points[0]["generation"]["share_of_first"] == points[0]["generation"]["speed_over_first"]["ratio"] == 1
    assert points[2]["generation"]["share_of_first"] == planned[2] / planned[0]
    texts = [[run["token_ids"] for run in point["runs"]] for point in points]
    assert texts[0] == texts[1] == texts[2]
    table = report_tables(report)[1]
    assert table.title == "memory against speed"
    assert [row[3] for row in table.rows] == ["100%", share(planned[1] / planned[0]), share(planned[2] / planned[0])]


@pytest.mark.slow
def test_sweep_as_json(specchat):
    result = specchat("bench", "demo", *SMALL, "--vram", "200MiB", "--sweep", "draft=demo,none", "--json", "-q")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    own, none = report["sweep"]["points"]
    assert (own["value"], none["value"]) == ("demo", "none")
    # drafts of the target itself are always accepted
    assert own["summary"]["tokens_per_step"]["mean"] > none["summary"]["tokens_per_step"]["mean"] == 1


@pytest.mark.slow
def test_cold_passes(specchat):
    result = specchat("bench", "demo", *SMALL, "--max-tokens", "4", "--cold", "--baseline", "accelerate", "--json")
    if "page cache" in result.err and result.code == 1:
        pytest.skip("the package is installed on a file system that cannot be evicted")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    passes = report["disk_passes"]
    assert (passes["rows"], passes["cold"]) == (16, True)
    assert passes["rounds"] >= 5
    assert passes["resident_share"] < 0.01
    assert [system["name"] for system in passes["systems"]] == ["specchat", "accelerate"]
    assert passes["own_over_resident"] is None and passes["page_cache"] is None  # the demo is too small for a pack
    assert report["plan"]["streamed_layers"] > 0
    assert report["summary"]["stream"]["link_bytes_per_s"] == passes["raw"]["bytes_per_s"]


def test_passes_from_the_page_cache(specchat):
    result = specchat("bench", "demo", *SMALL, "--passes", "--baseline", "none")
    assert result.code == 0, result.err
    assert "passes of 16 rows" in result.out
    assert "through the page cache" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--baseline", "vllm"], "'vllm' is not a baseline"),
        (["demo", "--baseline", "assisted", "--draft", "none"], "needs a draft"),
        (["demo", "--baseline", "llama.cpp", "--limit", "1"], "runs GGUF files"),
        (["demo", "--plot", "a.svg"], "--plot draws a sweep"),
        (["demo", "--sweep", "ctx=256", "--plot", "a.pdf"], "--plot draws .svg or .png"),
        (["demo", "--sweep", "slots=0"], "--sweep slots must be at least 1"),
        (["demo", "--sweep", "memory=auto"], "takes tree sizes"),
        (["demo", "--sweep", "memory=8,0"], "at least 1"),
        (["demo", "--sweep", "memory=8", "--draft", "none"], "there is no draft"),
        (["demo", "-o", "yaml"], "--output must be"),
        (["demo", "-o", "md", "--json"], "cannot be combined"),
        (["demo", "--sweep", "quant=int8,int2"], "--sweep quant must be"),
        (["demo", "--sweep", "ctx="], "--sweep cannot vary"),
        (["demo", "--sweep", "vram=12"], "'12' is not a size"),
        (["demo", "--sweep", "ctx=256", "--cold"], "cannot be combined"),
        (["demo", "--cold"], "every layer stays in memory"),
        (["demo", "--sweep", "ctx=256", "--passes"], "cannot be combined"),
        (["demo", "--limit", "0"], "--limit"),
        (["demo", "-r", "0"], "--repeats"),
        (["demo", "--prompts", "/nowhere"], "--prompts cannot read"),
        (["--compare", "/nowhere", "/nowhere"], "cannot read"),
        (["demo", "--compare", "a", "b"], "takes no MODEL"),
        (["--compare", "a", "b", "-o", "csv"], "cannot be printed as csv"),
        ([], "no MODEL is given"),
        (["demo", "--nope"], "specchat bench --help"),
    ],
)
def test_invalid_usage_exits_with_2(specchat, arguments, words):
    result = specchat("bench", *arguments)
    assert result.code == 2, result.err
    assert words in result.err
    assert result.out == ""


def test_questions_too_long_for_the_context_exit_with_4(specchat):
    result = specchat("bench", "demo", *SMALL[:-2], "--max-tokens", "508", "--draft", "none", "--baseline", "none")
    assert result.code == 4, result.err
    assert "none of the 1 questions fits" in result.err


def test_a_limit_below_the_libraries_is_refused(specchat):
    """The system would end the process without a word."""
    result = specchat("bench", "demo", *SMALL, "--limit-memory", "300MiB")
    assert result.code == 4 and result.out == ""
    assert f"300 MiB is less than Python and its libraries take ({format_bytes(libraries_bytes())})" in result.err
    assert "hint: use --limit-memory " in result.err


def test_compare_refuses_files_that_are_not_reports(specchat, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    result = specchat("bench", "--compare", str(other), str(other))
    assert result.code == 2
    assert "not a report" in result.err


def test_interrupt_prints_a_partial_report():
    with Terminal("specchat", "bench", "demo", "--baseline", "none", "-r", "9", columns=120, rows=50) as terminal:
        terminal.wait_for(lambda t: re.search(r"bench: [1-9]\d*/288 · specchat, .* · about \d+:\d\d left", t.screen))
        assert terminal.screen.count("bench: ") == 1  # in place
        terminal.send("\x03")
        terminal.wait_for("share this")
        assert terminal.exit_code() == 130
        text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", terminal.raw)
        assert b"PARTIAL: the measurement was interrupted" in text
        assert b"tok/pass" in text
        assert b"Traceback" not in text


def test_interrupted_sweep_reports_measured_points(specchat, monkeypatch):
    real = measure.measure

    def then_interrupted(job, cancel, report):
        outcome = real(job, cancel, report)
        cancel.set()
        return outcome

    monkeypatch.setattr(measure, "measure", then_interrupted)
    result = specchat("bench", "demo", *SMALL, "--sweep", "ctx=256,512", "--json", "-q")
    assert result.code == 130
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    assert report["partial"]
    assert report["missing"] == ["ctx=512"]
    assert [point["value"] for point in report["sweep"]["points"]] == ["256"]


def test_interrupt_after_the_answers_lists_missing_passes(specchat, monkeypatch):
    def interrupted(*_, cancel, **__):
        cancel.set()

    monkeypatch.setattr(measure, "measure_rounds", interrupted)
    result = specchat("bench", "demo", *SMALL, "--passes", "--baseline", "none", "--json")
    assert result.code == 130
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    assert (report["partial"], report["missing"]) == (False, ["single passes"])
    assert len(report["runs"]) == 4


def test_baselines_that_would_run_other_weights_are_left_out(specchat):
    result = specchat("bench", "demo", *SMALL, "--quant", "int8", "--baseline", "plain,accelerate", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert [each["name"] for each in report["baselines"]] == ["plain"]
    assert "the baseline 'accelerate' is left out" in result.err
    assert "full-precision weights, not int8; use --baseline plain or --quant none" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("quants", "expected"),
    [
        ({}, {}),
        ({"quant": "int4"}, {"accelerate": "full-precision", "assisted": "full-precision"}),
        ({"quant": "gptq int4"}, {"accelerate": "is pre-quantized (gptq int4)", "assisted": "target is pre-quantized"}),
        ({"draft_quant": "int8"}, {"assisted": "--draft-quant none"}),
        ({"draft_quant": "awq int4"}, {"assisted": "the draft is pre-quantized"}),
    ],
)
def test_only_baselines_with_the_same_weights_are_run(quants, expected):
    found = left_out(("plain", "accelerate", "assisted"), changed(PLAN, **quants))
    assert set(found) == set(expected)
    assert all(words in found[name] for name, words in expected.items())


def test_whole_layers_are_compared_with_single_experts_only():
    assert set(left_out(("plain", "layers"), PLAN)) == {"layers"}
    with_experts = replace(PLAN, experts=ExpertForecast(1, 1, 1, 1, 1, 1.0, 1.0, 1))
    assert not left_out(("plain", "layers"), with_experts)


@pytest.mark.slow
def test_whole_layers_answer_in_turn_with_single_experts(specchat):
    """In the same memory, with the same text."""
    shape = "shape:hidden=256,layers=9,mlp=704,experts=8,experts_per_token=2,dtype=fp32"
    limits = ("--device", "cpu", "--vram", "100MiB", "--ram", "1MiB", "--ctx", "256", "--max-tokens", "8")
    result = specchat("bench", shape, *limits, "--baseline", "layers", "--limit", "1", "--repeats", "1", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    jsonschema.validate(report, SCHEMA)
    (layers,) = report["baselines"]
    assert layers["name"] == "layers" and layers["identical_output"] is True
    assert report["plan"]["experts"]["kept_per_layer"] < 8


def test_interrupted_before_anything_is_measured(specchat, monkeypatch):
    real = bench.make_packs

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(bench, "make_packs", interrupted)
    result = specchat("bench", "demo", *SMALL)
    assert (result.code, result.out) == (130, "")
    assert "interrupted before anything was measured" in result.err


def test_readme_command_writes_reports_into_a_page(tmp_path, reports):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    main([str(page), str(reports[0])])
    text = page.read_text()
    assert "old" not in text
    assert text.startswith(f"before\n\n{BEGIN}\n\ndemo writes about ")
    assert text.endswith(f"{END}\n\nafter\n")
    main([str(page), str(reports[0])])
    assert page.read_text() == text
    with pytest.raises(UsageError):
        with_measured("no marks", ["x"])


def test_sweeps_have_their_own_section(tmp_path, reports):
    page, sweep = tmp_path / "page.md", tmp_path / "sweep.json"
    measured = json.loads(reports[0].read_text())
    points = [{**measured, "value": "8"}]
    sweep.write_text(json.dumps(measured | {"sweep": {"option": "ctx", "best": "8", "points": points}}))
    page.write_text(f"{BEGIN}\n\nkept\n\n{END}\n\n{SWEEPS_BEGIN}\n\nold\n\n{SWEEPS_END}\n")
    main([str(page), str(sweep)])
    kept, _, swept = page.read_text().partition(SWEEPS_BEGIN)
    assert "kept" in kept and "by ctx" in swept and "old" not in swept


def test_measured_page_has_the_marks():
    page = (ROOT / "docs" / "measured.md").read_text()
    assert with_measured(page, ["x"]) != page
    assert with_measured(page, ["x"], SWEEPS_BEGIN, SWEEPS_END) != page
