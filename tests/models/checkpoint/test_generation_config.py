"""Values of generation_config.json that mean something are used, and all others are named."""

import json
from pathlib import Path

import pytest

from specchat.models.checkpoint.generation_config import GenerationDefaults, load_generation_defaults


def read(folder: Path, config: object = None, **values: object) -> GenerationDefaults:
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "generation_config.json").write_text(json.dumps(values))
    return load_generation_defaults(folder)


def test_valid_values(tmp_path: Path):
    found = read(
        tmp_path,
        do_sample=True,
        temperature=1,
        top_k=50.0,
        top_p=1,
        min_p=0,
        repetition_penalty=2,
        eos_token_id=[3, 4.0],
    )
    assert found == GenerationDefaults(True, 1.0, 50, 1.0, 0.0, 2.0, frozenset({3, 4}))
    assert [type(value) for value in (found.temperature, found.top_k, found.repetition_penalty)] == [float, int, float]


@pytest.mark.parametrize("value", [None, [], "x", {}, True, float("nan"), -1, 10**400, [[1]]])
@pytest.mark.parametrize(
    "name", ["do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id"]
)
def test_other_values_are_named(tmp_path: Path, name: str, value: object):
    found = read(tmp_path, {"eos_token_id": 7}, **{name: value})
    if value is None or (name, value) in (("do_sample", True), ("eos_token_id", [])):
        assert found.ignored == ()
    else:
        (line,) = found.ignored
        assert line.startswith(f"generation_config.json: {name} is ") and line.endswith(": ignored")
        assert len(line) < 200
        assert getattr(found, name, None) is None
    assert found.stop_ids == {7}


def test_good_stop_tokens_stay_beside_bad_ones(tmp_path: Path):
    found = read(tmp_path, {"eos_token_id": 7}, eos_token_id=[3, "x", -1])
    assert found.stop_ids == {3}
    assert len(found.ignored) == 1


def test_stop_tokens_of_the_configuration_are_checked_too(tmp_path: Path):
    found = read(tmp_path, {"eos_token_id": "</s>"})
    assert found.stop_ids == frozenset()
    assert found.ignored == ('config.json: eos_token_id is "</s>", not a token id or a list of token ids: ignored',)


def test_no_file(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert load_generation_defaults(tmp_path) == GenerationDefaults()


def test_the_text_half_names_stop_tokens_that_the_whole_does_not(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [7, 9]}}')
    assert load_generation_defaults(tmp_path).stop_ids == {7, 9}
    (tmp_path / "config.json").write_text('{"eos_token_id": 5, "text_config": {"eos_token_id": [7, 9]}}')
    assert load_generation_defaults(tmp_path).stop_ids == {5}
