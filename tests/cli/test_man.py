"""The man page names every option, exit code, command and JSON key that exists."""

import json
import re
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from support.fake_engine import PLAN

from specchat.chat.answer import Delta, Turn
from specchat.chat.result import chosen_object, delta_object, done_object, recommendations_object
from specchat.cli.app import app
from specchat.cli.exit_status import EXIT_CODES
from specchat.models.catalog.known_models import known_models
from specchat.planner.cost import Prediction
from specchat.planner.explain import Alternative, Choice, ExplainedPlan
from specchat.planner.recommendations import Recommendation, Recommendations
from specchat.records.plan import LedgerItem
from specchat.ui.commands import COMMANDS

PAGE = (Path(__file__).parents[2] / "man" / "specchat.1").read_text()
# The page without roff markup: fonts, escapes, requests.
TEXT = re.sub(r"\\f.|^\.[A-Za-z]+ ?", "", PAGE, flags=re.MULTILINE).replace("\\-", "-").replace('"', " ")

# Keys of `bench --compare --json`, which has no schema of its own.
COMPARISON_KEYS = {"a", "b", "common_answers", "same_output", "figures", "significant"}


def options():
    group = typer.main.get_command(app)
    parameters = [p for command in (group, *group.commands.values()) for p in command.params]
    return sorted({name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")})


def keys_of(record):
    """Return the names of a record's fields, and of the records inside it."""
    names = set()
    for field in fields(record):
        names.add(field.name)
        kind = get_type_hints(record)[field.name]
        if is_dataclass(kind):
            names |= keys_of(kind)
    return names


def json_keys():
    plan = PLAN
    choices = (Choice("", "", "", False, Alternative("", None)),)
    made = chosen_object(ExplainedPlan(plan, Prediction(**{field.name: 0 for field in fields(Prediction)}), choices))
    nested = set(made["choices"][0]) | set(made["alternatives"][0])
    keys = keys_of(Turn) - {"unsaved"} | set(made) | nested | keys_of(LedgerItem) | set(done_object({}))
    return sorted(keys | set(delta_object(Delta("", ()))) | {"schema_version", "model", "revision", "seed"})


def offer_keys():
    model = known_models()["Qwen/Qwen3-8B"]
    plan = PLAN
    prediction = Prediction(**{field.name: 0 for field in fields(Prediction)})
    made = recommendations_object(
        Recommendations((Recommendation(model, None, plan, prediction, False, 0, 0, 0),), (), ()), ""
    )
    return sorted({"models", *made, *made["runs"][0]})


@pytest.mark.parametrize("key", offer_keys())
def test_page_has_every_key_of_recommendations(key):
    assert re.search(rf"\b{key}\b", TEXT), f"the man page lacks {key}"


def bench_keys(schema):
    """Return the names of all properties in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(bench_keys, schema))
    if not isinstance(schema, dict):
        return set()
    names = set(schema["properties"]) if isinstance(schema.get("properties"), dict) else set()
    return names.union(*map(bench_keys, schema.values()))


@pytest.mark.parametrize("option", [*options(), "--help"])
def test_page_has_every_option(option):
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", TEXT)


@pytest.mark.parametrize("code", EXIT_CODES)
def test_page_has_every_exit_code(code):
    section = TEXT[TEXT.index("EXIT STATUS") : TEXT.index("ENVIRONMENT")]
    assert re.search(rf"^{code}$", section, re.MULTILINE)


@pytest.mark.parametrize("key", json_keys())
def test_page_has_every_json_key(key):
    section = TEXT[TEXT.index("JSON OUTPUT\n") : TEXT.index("EXIT STATUS")]
    assert re.search(rf"\b{key}\b", section)


SCHEMA = json.loads(files("specchat.bench").joinpath("schema.json").read_text())


@pytest.mark.parametrize("key", sorted(bench_keys(SCHEMA) | COMPARISON_KEYS))
def test_page_has_every_key_of_bench(key):
    section = TEXT[TEXT.index("JSON OUTPUT\n") : TEXT.index("EXIT STATUS")]
    assert re.search(rf"\b{key}\b", section)


@pytest.mark.parametrize("name", [name for command in COMMANDS for name in command.names])
def test_page_has_every_chat_command(name):
    assert f"/{name}" in TEXT


def test_page_has_no_unknown_option():
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= {*options(), "--help"}
