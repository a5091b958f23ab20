"""Jobs: every line gets one result, whatever happens, and a job that was stopped goes on where it was."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.echoes import Echoes
from support.fake_engine import EOS, TOKENIZER

from specchat.batch.job import Job, Progress
from specchat.batch.prompts import read_prompts
from specchat.batch.results import JobSettings, Results, first_settings, line_digest
from specchat.chat.settings import MAX_SEED
from specchat.errors import SpecchatError, UsageError
from specchat.loading.sampling import SamplingChoices
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.planner.statistics import SharedPass
from specchat.records.generation import Sampling, Step

DEEP = b"[" * 200_000
SETTINGS = JobSettings("demo", None, "none", "fp32", max_tokens=40)


def write_prompts(folder: Path, *lines: object) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines), encoding="utf-8")
    return path


@dataclass
class World:
    """A file of prompts, a file of results, and an engine."""

    folder: Path
    engine: Echoes = field(default_factory=Echoes)
    settings: JobSettings = SETTINGS

    @property
    def out(self) -> Path:
        return self.folder / "out.jsonl"

    passes: list[SharedPass] = field(default_factory=list)

    def run(self, cancel: Event | None = None, most: int | None = None) -> list[Progress]:
        """Run the job, or only some of its steps."""
        lines = read_prompts(self.folder / "in.jsonl")
        digests = {line.number: line_digest(line) for line in lines}
        found = []
        with Results(self.out, self.settings.digest, digests) as results:
            defaults = GenerationDefaults(stop_ids=frozenset({EOS}))
            ends, observe = defaults.stop_ids, self.passes.append
            job = Job(self.engine, TOKENIZER, defaults, ends, self.settings, lines, results, observe)
            for progress in job.run(cancel):
                found.append(progress)
                if len(found) == most:
                    break
        return found

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]


def world(folder: Path, *lines: object, **settings: Any) -> World:
    write_prompts(folder, *lines)
    return World(folder, settings=replace(SETTINGS, **settings))


def test_every_line_gets_its_answer(tmp_path: Path):
    there = world(tmp_path, *({"id": f"p{i}", "prompt": f"hello {i}" + "!" * (i % 4)} for i in range(10)))
    progress = there.run()
    results = {each["id"]: each for each in there.results()}
    assert len(results) == len(there.results()) == 10
    for i in range(10):
        result = results[f"p{i}"]
        text = f"You said: hello {i}" + "!" * (i % 4)
        assert (result["text"], result["finish_reason"], result["line"]) == (text, "stop", i + 1)
        assert result["token_ids"] == [*TOKENIZER.encode(text), EOS]
        prompt = TOKENIZER.encode(TOKENIZER.render(read_prompts(tmp_path / "in.jsonl")[i].messages))
        assert result["usage"]["prompt_tokens"] == len(prompt)
        assert result["usage"]["completion_tokens"] == len(result["token_ids"])
        assert result["tokens_per_step"] == pytest.approx(2, rel=0.1)
        assert result["seed"] == i
    last = progress[-1]
    assert (last.num_done, last.num_lines, last.num_failed, last.num_alive) == (10, 10, 0, 0)
    assert last.num_tokens == sum(len(each["token_ids"]) for each in results.values())
    assert max(each.num_alive for each in progress) == 3


def test_every_pass_is_observed_once_with_the_steps_of_all_answers(tmp_path: Path):
    lines = ({"prompt": "x" * (9 * i + 1), "temperature": i % 2} for i in range(7))
    there = world(tmp_path, *lines, stops=("xxxxxxx",))
    there.run()
    assert len(there.passes) == there.engine.num_passes
    assert {len(shared) for shared in there.passes} >= {1, 3}
    assert all(each.step.num_sharing == len(shared) for shared in there.passes for each in shared)
    assert {each.samples for shared in there.passes for each in shared} == {False, True}
    num_tokens = sum(len(each.step.token_ids) for shared in there.passes for each in shared)
    assert 0 <= num_tokens - sum(len(each["token_ids"]) for each in there.results()) <= 7, "but those after a stop text"


def test_results_come_in_order_of_completion(tmp_path: Path):
    there = world(tmp_path, {"prompt": "a" * 25}, {"prompt": "b"}, {"prompt": "c" * 10})
    there.run()
    assert [each["line"] for each in there.results()] == [2, 3, 1]


def test_values_of_lines_override_those_of_all(tmp_path: Path):
    chosen = SamplingChoices(temperature=0.7, top_p=0.9)
    there = world(
        tmp_path,
        {"prompt": "x", "temperature": 0.2, "max_tokens": 4},
        {"prompt": "y", "seed": 99},
        {"prompt": "z"},
        sampling=chosen,
        seed=5,
    )
    there.run()
    assert [each.sampling for each in there.engine.requests] == [
        Sampling(temperature=0.2, top_p=0.9, seed=5),
        Sampling(temperature=0.7, top_p=0.9, seed=99),
        Sampling(temperature=0.7, top_p=0.9, seed=7),
    ]
    assert [each.max_tokens for each in there.engine.requests] == [4, 40, 40]
    assert sorted((each["line"], each["seed"], each["finish_reason"]) for each in there.results()) == [
        (1, 5, "length"),
        (2, 99, "stop"),
        (3, 7, "stop"),
    ]


def test_seeds_stay_within_their_limit(tmp_path: Path):
    there = world(tmp_path, {"prompt": "x"}, {"prompt": "y"}, seed=MAX_SEED)
    there.run()
    assert sorted(each["seed"] for each in there.results()) == [0, MAX_SEED]


def test_system_prompt_and_base(tmp_path: Path):
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    lines = {"prompt": "a"}, {"messages": chat}
    there = world(tmp_path, *lines, system="Be brief.")
    there.run()
    prompts = [TOKENIZER.decode(each.prompt_ids) for each in there.engine.requests]
    assert prompts == ["[system]Be brief.\n[user]a\n[assistant]", "[system]own\n[user]b\n[assistant]"]
    there.out.unlink()
    there = World(tmp_path, settings=replace(SETTINGS, base=True))
    there.run()
    assert [TOKENIZER.decode(each.prompt_ids) for each in there.engine.requests] == ["a", "own\nb"]


def test_base_joins_messages_as_a_chat_does(tmp_path: Path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}, {"role": "user", "content": "c"}]
    there = world(tmp_path, {"messages": chat}, base=True)
    there.run()
    (request,) = there.engine.requests
    assert TOKENIZER.decode(request.prompt_ids) == "a b\nc"


def test_a_stop_text_ends_an_answer_and_frees_its_seat(tmp_path: Path):
    lines = [{"prompt": "one STOP two three four five"}, *({"prompt": f"{i}"} for i in range(4))]
    there = world(tmp_path, *lines, stops=("STOP",))
    progress = there.run()
    first = next(each for each in there.results() if each["line"] == 1)
    assert first["text"] == "You said: one " and first["finish_reason"] == "stop"
    assert there.engine.requests[0].cancel is not None and there.engine.requests[0].cancel.is_set()
    assert progress[-1].num_done == 5


def test_thinking_is_a_part_of_its_own(tmp_path: Path):
    there = world(tmp_path, {"prompt": "x"}, thinking=True)
    there.engine.generate_many = lambda requests, cancel=None: (  # type: ignore[method-assign]
        (i, Step((*TOKENIZER.encode("so</think>yes"), EOS), "stop", 9, 0, 0, 0, 0, 0.1, 0.0, 0.1, 0.0, 0.0, 0))
        for i, _ in enumerate(requests)
    )
    there.run()
    (result,) = there.results()
    assert (result["text"], result["reasoning"]) == ("yes", "so")
    assert result["usage"]["reasoning_tokens"] > 0


def test_bad_lines_and_long_prompts_fail_alone(tmp_path: Path):
    there = world(tmp_path, {"prompt": "a"}, "{", {"id": "long", "prompt": "x" * 300}, {"prompt": "b", "top_p": 7})
    progress = there.run()
    results = {each["line"]: each for each in there.results()}
    assert results[1]["text"] == "You said: a"
    assert "not JSON" in results[2]["error"] and "too long" in results[3]["error"] and "top_p" in results[4]["error"]
    assert results[3]["id"] == "long" and "text" not in results[3]
    assert progress[-1].num_failed == 3 and progress[-1].num_done == 4


# --- going on --------------------------------------------------------------------------------------------------------


def many(folder: Path, num_lines: int = 30) -> World:
    return world(folder, *({"id": i, "prompt": f"prompt {i} " + "." * (i % 7)} for i in range(num_lines)))


@pytest.mark.parametrize("most", [1, 10, 40, 90])
def test_a_stopped_job_goes_on_with_what_is_missing(tmp_path: Path, most: int):
    there = many(tmp_path)
    there.run(most=most)
    first = there.out.read_bytes()
    before = len(there.results())
    there.engine.requests.clear()
    progress = there.run()
    assert there.out.read_bytes().startswith(first)
    assert sorted(each["line"] for each in there.results()) == list(range(1, 31))
    assert len(there.engine.requests) == 30 - before == progress[-1].num_answered
    assert there.run()[-1].num_answered == 0 and there.results() == there.results()


def test_a_full_disk_is_named_with_the_file(tmp_path: Path):
    """A limit on the size of files fails like a full disk, in the write and again when the file is closed."""
    there = many(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(SpecchatError, match=re.escape(f"cannot write {there.out}: ")) as caught:
            there.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.hint is not None and "goes on" in caught.value.hint
    there.run()
    assert sorted(each["line"] for each in there.results()) == list(range(1, 31))


def test_an_interrupted_job_keeps_what_is_done(tmp_path: Path):
    there, cancel = many(tmp_path), Event()
    lines = read_prompts(tmp_path / "in.jsonl")
    with Results(there.out, SETTINGS.digest, {line.number: line_digest(line) for line in lines}) as results:
        defaults = GenerationDefaults(stop_ids=frozenset({EOS}))
        for progress in Job(there.engine, TOKENIZER, defaults, defaults.stop_ids, SETTINGS, lines, results).run(cancel):
            if progress.num_done == 4:
                cancel.set()
    assert 4 <= len(there.results()) < 30 and progress.num_alive == 0
    assert all(each["text"].startswith("You said: prompt") for each in there.results())
    there.run()
    assert sorted(each["line"] for each in there.results()) == list(range(1, 31))


@pytest.mark.parametrize("cut", [1, 5, 60, 200])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, cut: int):
    there = many(tmp_path)
    there.run()
    whole = there.results()
    there.out.write_bytes(there.out.read_bytes()[:-cut])
    there.run()
    assert sorted(there.results(), key=lambda each: each["line"]) == sorted(whole, key=lambda each: each["line"])


def test_results_of_something_else_are_refused(tmp_path: Path):
    there = many(tmp_path)
    there.run()
    content = there.out.read_bytes()
    for other in (replace(SETTINGS, seed=1), replace(SETTINGS, quant="int4"), replace(SETTINGS, stops=("x",))):
        with pytest.raises(UsageError, match="other settings"):
            World(tmp_path, settings=other).run()
    prompts = (tmp_path / "in.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(prompts.replace("prompt 3", "prompt three"))
    with pytest.raises(UsageError, match="other prompts"):
        there.run()
    (tmp_path / "in.jsonl").write_text(prompts.partition("\n")[0])
    with pytest.raises(UsageError, match="other prompts"):
        there.run()
    assert there.out.read_bytes() == content, "nothing was lost"
    (tmp_path / "in.jsonl").write_text(prompts + '\n{"prompt": "one more"}')
    assert there.run()[-1].num_answered == 1, "more prompts may follow"
    there.out.write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match="two results"):
        there.run()
    for other in (b"hello\n", b"[]\n", b'{"line": 1}\n'):
        there.out.write_bytes(other)
        with pytest.raises(UsageError, match="no result"):
            there.run()
        assert there.out.read_bytes() == other


def test_two_jobs_do_not_share_a_file(tmp_path: Path):
    there = many(tmp_path)
    with Results(there.out, SETTINGS.digest, {}), pytest.raises(UsageError, match="another specchat"):
        there.run()


TAILS = st.binary(max_size=40).map(lambda tail: tail.replace(b"\n", b""))


@settings(max_examples=40)
@given(data=st.data())
def test_a_torn_file_goes_on_where_it_was_whole(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Bad lines between good ones, stopped anywhere, the last line cut anywhere or followed by anything."""
    draw, folder = data.draw, tmp_path_factory.mktemp("torn")
    kinds = draw(st.lists(st.sampled_from(["good", "long", "not JSON", "no prompt"]), min_size=1, max_size=8))
    lines = {
        "good": {"prompt": "h\u00e9llo \U0001f98a"},
        "long": {"prompt": "x" * 300},
        "not JSON": "{",
        "no prompt": {},
    }
    there = world(folder, *(lines[kind] for kind in kinds))
    for _ in range(draw(st.integers(1, 3))):
        there.run(most=draw(st.integers(1, 12)))
        content = there.out.read_bytes()
        torn = content[: draw(st.integers(0, len(content)))] + draw(TAILS)
        there.out.write_bytes(torn)
        there.run(most=1)
        assert there.out.read_bytes().startswith(torn[: torn.rfind(b"\n") + 1])
        there.results()  # all of its lines are whole
    there.run()
    results = there.results()
    assert sorted(each["line"] for each in results) == list(range(1, len(kinds) + 1))
    assert all(("error" in each) == (kinds[each["line"] - 1] != "good") for each in results)


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[1]", b"\xff\xfe", b"\x00" * 9, b'{"id": 1}', b'{"line": [1], "settings": "", "request": ""}', DEEP],
    ids=lambda line: repr(line[:12]),
)
def test_a_bad_line_among_the_results_is_told(tmp_path: Path, line: bytes):
    there = many(tmp_path, 3)
    there.run()
    first, second, third = there.out.read_bytes().splitlines(keepends=True)
    for content in (first + line + b"\n" + second + third, first + second + third + line + b"\n"):
        there.out.write_bytes(content)
        with pytest.raises(UsageError, match=f"line {content.splitlines().index(line) + 1} of .* no result"):
            there.run()
        assert there.out.read_bytes() == content


def test_the_settings_of_a_file_that_is_no_result_are_not_known(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(DEEP + b"\n")
    assert first_settings(path) is None
