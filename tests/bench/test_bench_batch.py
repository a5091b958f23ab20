"""`bench --batch`: figures against the answers that they are made of, and the command with the demo pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event

import pytest

from specchat.bench.batch import PLAIN, Asked, ask, batches_object, batches_table, measure_batches
from specchat.bench.prompts import BUILT_IN
from specchat.bench.records import OWN, BenchSettings
from specchat.records.generation import Request, Step

SETTINGS = BenchSettings(temperatures=(0.0, 0.7), max_tokens=12, repeats=2, seed=3)


class Clocked:
    """An engine whose passes take a second, or two with a draft, which brings three tokens instead of one."""

    def __init__(self) -> None:
        self.now, self.drafts, self.forgotten = 0.0, True, 0

    def clock(self) -> float:
        return self.now

    def forget(self) -> None:
        self.forgotten += 1

    @contextmanager
    def without_draft(self) -> Iterator[None]:
        self.drafts = False
        yield
        self.drafts = True

    def generate_many(
        self, requests: Iterable[Request], *, seats: int | None = None, cancel: Event | None = None
    ) -> Iterator[tuple[int, Step]]:
        assert seats is not None
        waiting, live = enumerate(requests), dict[int, list[int]]()
        while True:
            new = []
            while len(live) < seats and (taken := next(waiting, None)) is not None:
                live[taken[0]] = list(range(100 * taken[0], 100 * taken[0] + taken[1].max_tokens))
                new.append(taken[0])
            if not live:
                return
            self.now += 2.0 if self.drafts else 1.0
            sharing = len(live)
            for index, left in list(live.items()):
                tokens, rest = tuple(left[: 3 if self.drafts else 1]), left[3 if self.drafts else 1 :]
                live[index] = rest
                reason = "interrupt" if cancel is not None and cancel.is_set() else None if rest else "length"
                if reason is not None:
                    del live[index]
                rows, nodes = 5 if index in new else 1, 8 if self.drafts else 0
                times = 2.0, 0.0, 2.0, 0.0, 0.0, 0
                yield index, Step(tokens, reason, rows, 0, nodes, len(tokens) - 1, 2, *times, num_sharing=sharing)
            if cancel is not None and cancel.is_set():
                return


def asked() -> list[Asked]:
    return ask(BUILT_IN[:3], lambda text: tuple(range(5)), SETTINGS, frozenset())


def test_every_question_is_asked_at_every_temperature_with_its_own_seed():
    requests = [each.request for each in asked()]
    assert [each.sampling.temperature for each in requests] == [0.0] * 3 + [0.7] * 3
    assert [each.sampling.seed for each in requests] == [3, 4, 5, 6, 7, 8]
    assert {each.max_tokens for each in requests} == {12}


def test_figures_are_those_of_the_answers():
    engine, said = Clocked(), list[str]()
    runs = measure_batches(
        engine,
        asked(),
        (2, 6),
        SETTINGS,
        without_draft=engine.without_draft,
        cancel=Event(),
        report=said.append,
        clock=engine.clock,
    )
    assert [(run.batch, run.system, run.repeat) for run in runs] == [
        (batch, system, repeat) for repeat in (1, 2) for batch in (2, 6) for system in (OWN, PLAIN)
    ]
    assert engine.forgotten == len(runs) == len(said) == 8
    figures = {(each["batch"], each["system"]): each for each in batches_object(runs, "fp32", lambda *_: (1.0, 1.0))}
    six, plain = figures[6, OWN], figures[6, PLAIN]
    assert (six["tokens"], six["passes"], six["answers"], six["repeats"]) == (2 * 72, 2 * 4, 12, 2)
    assert six["tok_per_s"] == 72 / 8 and plain["tok_per_s"] == 72 / 12
    assert six["over_plain"] == pytest.approx(1.5) and plain["over_plain"] == 1.0
    assert six["tokens_per_pass"] == 18 and six["tokens_per_step"] == 3
    assert six["rows_per_pass"] == pytest.approx((6 * 5 + 18 * 1 + 24 * 8) / 4)
    assert six["ttft_s"] == 2.0 and six["tok_per_s_each"] == pytest.approx(12 / 8)
    assert figures[2, OWN]["ttft_s"] == 2.0, "the time in the queue is not the answer's"
    assert six["different"] == 0 and six["compared"] == 12
    table = batches_table(list(figures.values()), 6)
    assert len(table.rows) == 4 and all(len(row) == len(table.header) for row in table.rows)


def test_other_texts_are_counted():
    engine = Clocked()
    runs = measure_batches(
        engine,
        asked(),
        (3,),
        replace_repeats(1),
        without_draft=engine.without_draft,
        cancel=Event(),
        report=lambda _: None,
        clock=engine.clock,
    )
    answer = runs[0].runs[2].answer
    object.__setattr__(answer, "token_ids", (*answer.token_ids[:-1], 7))
    own, _ = batches_object(runs, "fp32", lambda *_: (1.0, 1.0))
    assert (own["compared"], own["different"], own["near_ties"]) == (6, 1, 0)


def replace_repeats(repeats: int) -> BenchSettings:
    return BenchSettings(SETTINGS.temperatures, SETTINGS.max_tokens, repeats, SETTINGS.seed)


def test_an_interrupt_keeps_complete_runs():
    engine, cancel = Clocked(), Event()
    said = list[str]()

    def report(what: str) -> None:
        said.append(what)
        if len(said) == 3:
            cancel.set()

    runs = measure_batches(
        engine,
        asked(),
        (2, 6),
        SETTINGS,
        without_draft=engine.without_draft,
        cancel=cancel,
        report=report,
        clock=engine.clock,
    )
    assert len(runs) == 2


@pytest.fixture
def specchat(capfd):
    from specchat.cli.app import run_command_line

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command_line(arguments)
        return code, *capfd.readouterr()

    return call


def test_the_demo_writes_the_same_texts_at_every_number(specchat):
    flags = ("--limit", "2", "-r", "1", "--max-tokens", "8", "--device", "cpu", "--json")
    code, out, err = specchat("bench", "demo", "--batch", "1,3", *flags)
    assert code == 0, err
    report = json.loads(out)
    assert [(each["batch"], each["system"]) for each in report["batches"]] == [
        (1, OWN),
        (1, PLAIN),
        (3, OWN),
        (3, PLAIN),
    ]
    assert all(each["compared"] == 4 and each["different"] == 0 for each in report["batches"])
    assert report["seats"] == 3 and report["batches"][1]["tokens_per_step"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch"),
        (["--batch", "a"], "--batch"),
        (["--batch", "2", "--cold"], "--cold"),
        (["--batch", "2", "--sweep", "tree-budget=4"], "--sweep"),
        (["--batch", "2", "-o", "csv"], "csv"),
        (["--batch", "2", "--baseline", "accelerate"], "--baseline"),
    ],
)
def test_mistakes_are_told(specchat, arguments: list[str], words: str):
    code, out, err = specchat("bench", "demo", *arguments)
    assert code == 2 and out == "" and words in err
