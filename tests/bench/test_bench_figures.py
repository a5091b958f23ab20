"""Figures of fake systems with known times, which are known exactly."""

import json
from dataclasses import astuple, replace
from importlib.resources import files
from threading import Event

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_bench import QUESTIONS, SETTINGS, STEP_S, TEXT, Clock, SlowSystem, outcome, own_system, runner

from specchat.bench import export, report, summary, tables
from specchat.bench.identity import compare
from specchat.bench.prompts import Question
from specchat.bench.records import OWN, BenchSettings
from specchat.records.model import ModelSource

SCHEMA = json.loads(files("specchat.bench").joinpath("schema.json").read_text())
TOKENS = len(TEXT) + 1  # the stop token included


def measured(systems=None, settings=SETTINGS, questions=QUESTIONS, cancel=None, **kwargs):
    clock = Clock()
    systems = systems(clock) if systems else [own_system(clock), SlowSystem(clock)]
    return runner(clock, systems, cancel or Event(), settings, **kwargs).run(questions)


def reported(measurement, **kwargs):
    target = ModelSource("demo", None, label="a toy")
    made = outcome(measurement, **kwargs)
    head = {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "specchat bench demo",
        "partial": measurement.partial,
        "missing": ["answers"] * measurement.partial,
        "model": "demo",
        "revision": None,
        "label": "a toy",
        "machine": {
            "device": "cpu",
            "gpus": [],
            "cpu": {"name": "a cpu", "cores": 2, "isa": ["avx2"]},
            "ram": {
                "total_bytes": 1 << 34,
                "available_bytes": 1 << 33,
                "cgroup_limit_bytes": None,
                "swap_bytes": 0,
                "pin_limit_bytes": None,
            },
            "platform": {"system": "Linux", "release": "6", "python": "3.11", "wsl": False},
        },
        "versions": {"specchat": "0"},
        "settings": report.settings_object(SETTINGS, prompts="built-in", limit=None),
        "questions": report.counts_object(measurement),
    }
    return report.report_object(head, {**report.outcome_object(made, target), "disk_passes": None, "sweep": None})


def test_every_system_answers_every_question():
    measurement = measured()
    # 3 turns, 2 temperatures, 2 repeats
    assert len(measurement.of("specchat")) == len(measurement.of("accelerate")) == 12
    assert measurement.num_questions == 2
    assert not measurement.partial


def test_systems_take_turns_question_by_question():
    order = [(run.question.question_id, run.temperature, run.repeat, run.system) for run in measured().runs]
    blocks = list(dict.fromkeys(order))
    assert len(blocks) == 2 * 2 * 2 * 2
    assert [block[3] for block in blocks] == ["specchat", "accelerate"] * 8


def test_all_systems_get_the_same_prompts():
    measurement = measured()
    ours = {(run.prompt, run.repeat): run.prompt_ids for run in measurement.of("specchat")}
    theirs = {(run.prompt, run.repeat): run.prompt_ids for run in measurement.of("accelerate")}
    assert ours == theirs


def test_figures_are_exact():
    figures = summary.figures(measured(questions=QUESTIONS[1:]).of("specchat"))
    assert figures.answers == figures.counted == 4
    assert figures.tok_per_s.mean == pytest.approx(TOKENS / (3 * STEP_S))
    assert figures.tok_per_s.sd == pytest.approx(0)
    assert figures.ttft_s.mean == pytest.approx(STEP_S)
    assert figures.decode_tok_per_s.mean == pytest.approx((TOKENS - 3) / (2 * STEP_S))
    num_prompt = len("[user]1 + 1?\n[assistant]")
    assert figures.prompt_tok_per_s.mean == pytest.approx(num_prompt / STEP_S)
    assert figures.tokens_per_step.mean == 3
    assert figures.pass_s == pytest.approx(0.5)
    assert figures.draft_share == pytest.approx(0.1 / 0.5)
    assert figures.split == summary.PassSplit(*map(pytest.approx, (0.05, 0.25, 0.1, 0.1, 0.0)))
    assert figures.achieved_bytes_per_s == pytest.approx((60 << 20) / 0.5)
    assert figures.accept_by_depth == (1.0, 1.0, 0.0, 0.0, 0.0)
    assert figures.accept_by_source == (
        summary.SourceShare("model", 60, 2, pytest.approx(2 / 60)),
        summary.SourceShare("other", 4, 0, 0),
    )
    assert figures.distinct_4gram.mean == 1


def test_hidden_drafting_is_waiting_for_layers():
    """The link needs the same time with and without a draft, so the parts of a pass still add up to it."""
    runs = []
    for run in measured(questions=QUESTIONS[1:]).of("specchat"):
        steps = tuple(replace(step, draft_hidden_s=0.08) for step in run.answer.steps)
        runs.append(replace(run, answer=replace(run.answer, steps=steps)))
    figures = summary.figures(runs)
    assert figures.draft_share == pytest.approx(0.02 / 0.5)
    assert figures.split == summary.PassSplit(*map(pytest.approx, (0.13, 0.25, 0.02, 0.1, 0.0)))
    assert sum(astuple(figures.split)) == pytest.approx(figures.pass_s)


def test_later_turns_compute_only_new_tokens():
    runs = measured(questions=QUESTIONS[:1]).of("specchat")
    first, second = runs[0], runs[1]
    assert first.answer.cached_tokens == 0
    # the answer's stop token is no part of the history
    assert second.answer.cached_tokens == len(first.prompt_ids) + TOKENS - 1


def test_each_conversation_starts_with_empty_caches():
    runs = measured(questions=QUESTIONS[1:]).of("specchat")
    assert [run.answer.cached_tokens for run in runs] == [0] * 4


def test_work_between_passes_is_not_timed():
    def systems(clock):
        return [own_system(clock, between_passes=lambda: clock.take(100))]

    for run in measured(systems).runs:
        assert run.answer.total_s == pytest.approx(3 * STEP_S)


def test_speedup_is_exact():
    measurement = measured()
    ratio = summary.speedup(measurement.of("specchat"), measurement.of("accelerate"))
    # 9 tokens in 1.5 s against 9 tokens in 9 s
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((6, 6, 6))
    assert ratio.pairs == 12


def test_speedup_per_pass_is_exact():
    measurement = measured()
    ratio = summary.pass_speedup(measurement.of("specchat"), measurement.of("accelerate"))
    # a pass of 0.5 s against one of 1 s, whatever they bring
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize(
    ("streamed_bytes", "link", "pass_s"),
    [
        (10, 1000.0, 0.25 + 0.1 + 0.1),  # computing takes longer than 10 ms of streaming
        (600, 1000.0, 0.6 + 0.1 + 0.1),
        (0, 1000.0, None),
        (600, None, None),
    ],
)
def test_prediction_is_exact(streamed_bytes, link, pass_s):
    found = summary.predict(measured().of("specchat"), streamed_bytes, link)
    if pass_s is None:
        assert found is None
    else:
        assert found.pass_s == pytest.approx(pass_s)
        assert found.tok_per_s == pytest.approx(3 / pass_s)  # three tokens a pass
    assert summary.predict((), streamed_bytes, link) is None


def test_one_question_gives_no_interval():
    measurement = measured(questions=QUESTIONS[:1])
    ratio = summary.speedup(measurement.of("specchat"), measurement.of("accelerate"))
    assert ratio.ratio == pytest.approx(6)
    assert ratio.low is ratio.high is ratio.p_value is None


@given(st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=4), min_size=2, max_size=9))
def test_intervals_contain_the_ratio_and_p_values_are_probabilities(logs):
    ratio = summary.ratio_of({str(i): values for i, values in enumerate(logs)})
    assert ratio.low <= ratio.high
    assert 0 < ratio.p_value <= 1


def test_run_spread():
    clock = Clock()
    own = own_system(clock)
    runs = runner(clock, [own], Event()).run(QUESTIONS).runs
    assert summary.run_spread(runs) == pytest.approx(0)
    assert summary.run_spread(run for run in runs if run.repeat == 1) is None


def test_repetitive_answers_are_listed_and_not_counted():
    def systems(clock):
        return [own_system(clock, text="ab" * 12), SlowSystem(clock)]

    measurement = measured(systems)
    made = reported(measurement)
    assert [run["counted"] for run in made["runs"]] == [False] * 12
    assert made["summary"]["tok_per_s"] == {"mean": None, "sd": None}
    assert made["summary"]["distinct_4gram"]["mean"] < 0.5
    assert made["speedup"] == {"accelerate": None}
    jsonschema.validate(made, SCHEMA)
    assert any(table.title.startswith("answers that repeat") for table in tables.report_tables(made))


def test_prompts_too_long_for_the_context_are_counted():
    long = Question("long", "stem", ("x" * 500, "y"))
    measurement = measured(questions=(long, *QUESTIONS))
    assert measurement.too_long == 2
    assert measurement.num_questions == 2


def test_the_time_box_stops_before_a_question_and_repeats_the_same_ones():
    settings = BenchSettings(max_tokens=32, repeats=2, time_box_s=2.0)
    measurement = measured(settings=settings)
    assert measurement.not_begun == 1
    assert {run.question.question_id for run in measurement.runs} == {"one"}
    assert {run.repeat for run in measurement.runs} == {1, 2}


def test_interrupt_keeps_complete_answers():
    cancel = Event()
    seen = []

    def stop_later(progress):
        seen.append(progress)
        if progress.done == 5:
            cancel.set()

    measurement = measured(cancel=cancel, report=stop_later)
    assert measurement.partial
    assert len(measurement.runs) == 5
    made = reported(measurement)
    jsonschema.validate(made, SCHEMA)
    assert made["partial"]
    assert "PARTIAL" in export.markdown(made)
    assert seen[4].left_s > 0


def test_interrupted_answer_is_dropped():
    cancel = Event()

    def systems(clock):
        return [own_system(clock, cancel_after=1)]

    measurement = measured(systems, cancel=cancel)
    assert cancel.is_set()
    assert measurement.partial
    assert not measurement.runs


def test_progress_estimates_remaining_time():
    seen = []
    measured(report=seen.append)
    assert seen[0].left_s is None
    assert [each.total for each in seen] == [24] * 24
    assert [each.done for each in seen] == list(range(24))


def test_remaining_time_is_estimated_per_system_from_the_warm_up_on():
    clock, seen = Clock(), []
    systems = [own_system(clock), SlowSystem(clock, text=TEXT * 3)]
    settings = BenchSettings(max_tokens=9, repeats=2)
    made = runner(
        clock, systems, Event(), settings, report=lambda each: seen.append((clock.now, each)), passes_after={OWN: 4}
    )
    made.warm_up(QUESTIONS[0])
    made.run(QUESTIONS)
    end = clock.now + 4 * STEP_S  # with the passes that would follow
    asked = [(now, each.left_s) for now, each in seen if each.total]
    assert [now + left_s for now, left_s in asked] == pytest.approx([end] * len(asked), rel=0.2)
    assert sum(asked[-1]) == pytest.approx(end, rel=0.01)


def test_notes_name_what_an_interrupt_left_out():
    made = reported(measured()) | {"missing": ["passes from the page cache"]}
    assert tables.notes(made)[0] == "interrupted after all answers; not measured: passes from the page cache"
    assert "PARTIAL" in tables.notes(made | {"partial": True})[0]
    del made["missing"]  # as older reports
    assert not any("interrupted" in note for note in tables.notes(made))


def test_report_fits_the_schema():
    made = reported(measured(), link=1e9)
    jsonschema.validate(made, SCHEMA)
    found = made["summary"]
    assert found["stream"]["utilisation"] == pytest.approx((60 << 20) / 0.5 / 1e9)
    assert found["load_s"] == 1.5
    assert found["predicted_pass_s"] == pytest.approx(0.25 + 0.1 + 0.1)
    assert found["predicted_tok_per_s"] == pytest.approx(3 / 0.45)
    assert (found["device_peak_bytes"], found["host_peak_bytes"]) == (140 << 20, 140 << 20)
    assert found["predicted_device_bytes"] == 150 << 20
    assert found["predicted_host_bytes"] == (150 << 20) + 7
    assert [each["tok_per_s"]["mean"] for each in found["by_temperature"]] == pytest.approx([6, 6])
    own, other = made["runs"][0], made["baselines"][0]["runs"][0]
    assert (own["timings"]["ttft_s"], own["timings"]["decode_s"]) == pytest.approx((0.5, 1))
    assert (own["timings"]["draft_s"], own["timings"]["verify_s"]) == pytest.approx((0.3, 0.9))
    assert (other["ttft_s"], other["decode_s"], other["tok_per_s"]) == pytest.approx((1, 8, 1))
    assert made["speedup"]["accelerate"]["per_pass"]["ratio"] == pytest.approx(2)
    assert made["baselines"][0]["identical_output"] is True
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("name", ["settings", "summary", "plan"])
def test_schema_rejects_missing_keys(name):
    made = reported(measured())
    del made[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, SCHEMA)


def test_sampled_texts_are_compared_only_if_keyed():
    def systems(clock):
        other = own_system(clock, text="abcdefgX", name="plain")
        return [own_system(clock), other]

    measurement = measured(systems, questions=QUESTIONS[1:])
    asked = []

    def margin(context, sampling):
        asked.append((context, sampling))
        return 1e-6, 20.0

    pair = measurement.of("specchat"), measurement.of("plain")
    keyed = compare(*pair, keyed=True, dtype="fp32", margin=margin)
    assert (keyed.answers, keyed.identical, len(keyed.differences)) == (4, False, 4)
    first = keyed.differences[0]
    assert (first.index, first.near_tie) == (7, True)
    assert (first.own, first.other) == (pair[0][0].answer.token_ids[7], pair[1][0].answer.token_ids[7])
    assert len(asked[0][0]) == len(measurement.runs[0].prompt_ids) + 7
    greedy_only = compare(*pair, keyed=False, dtype="fp32", margin=lambda *_: (0.5, 20.0))
    assert (greedy_only.answers, len(greedy_only.differences)) == (2, 2)
    assert not greedy_only.differences[0].near_tie


def test_a_longer_answer_differs_where_the_other_ends():
    def systems(clock):
        return [own_system(clock), own_system(clock, text=TEXT[:-1], name="plain")]

    measurement = measured(systems, questions=QUESTIONS[1:])
    found = compare(
        measurement.of("specchat"), measurement.of("plain"), keyed=True, dtype="bf16", margin=lambda *_: (0.1, 20.0)
    )
    assert found.differences[0].index == len(TEXT) - 1
    assert found.differences[0].near_tie  # 16-bit scores near 20 are coarser than that


def test_all_output_formats_agree():
    made = reported(measured(), link=1e9)
    lines = [json.loads(line) for line in export.json_lines(made).splitlines()]
    assert [line["type"] for line in lines] == ["run"] * 24 + ["report"]
    rows = export.comma_separated(made).splitlines()
    assert len(rows) == 25
    assert rows[1].startswith("specchat,one,writing,1,1,0.0,9,stop,3,3.0,0.5,1.0,6.0,")
    page = export.markdown(made)
    for words in ("6.00x", "identical", "a toy", "specchat bench demo", "6 of 6"):
        assert words in page
