"""Damaged model folders end in an answer or in an error with words, never in an exception of Python."""

import shutil
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from support.mutations import Mutation, damage, mutations, use, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def outcome(models, tmp_path_factory, mutation: Mutation) -> str:
    copied = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(models / mutation.model, copied)
    try:
        damage(copied / mutation.file, mutation)
        return use(copied)
    finally:
        shutil.rmtree(copied)


def test_straight_models_answer(models):
    for folder in models.iterdir():
        assert use(folder) == "answered"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(mutations())
def test_damage_ends_in_words(models, tmp_path_factory, mutation):
    outcome(models, tmp_path_factory, mutation)


@pytest.mark.slow
def test_2500_damages_end_in_words(models, tmp_path_factory):
    counts = Counter()

    @settings(max_examples=2500, suppress_health_check=list(HealthCheck), database=None)
    @given(mutations())
    def damage_once(mutation):
        counts[outcome(models, tmp_path_factory, mutation)] += 1

    damage_once()
    print(counts)
    assert counts.total() >= 2000 and len(counts) > 3
