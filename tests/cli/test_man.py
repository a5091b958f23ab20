"""The man pages name every option, exit code, command and JSON key that exists, and no others."""

import inspect
import json
import re
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from support.fake_engine import PLAN
from support.machines import read_machine

from specchat.bench import batch
from specchat.chat.answer import Delta, Turn
from specchat.chat.result import chosen_object, delta_object, done_object, recommendations_object
from specchat.chat.saved_chats import SavedChat
from specchat.cli import bench_batch, models_command, sessions_command
from specchat.cli.app import app
from specchat.cli.exit_status import EXIT_CODES
from specchat.hardware.machine import MatmulRate
from specchat.hardware.probe import Report
from specchat.hardware.report import report_object
from specchat.hardware.verdicts import Verdict
from specchat.models.catalog.known_models import known_models
from specchat.models.packs.installed import Installed
from specchat.planner.cost import Prediction
from specchat.planner.explain import Alternative, Choice, ExplainedPlan
from specchat.planner.recommendations import Recommendation, Recommendations
from specchat.records.chat import Message
from specchat.records.microbatches import Microbatches
from specchat.records.plan import DevicePlan, ExpertForecast, ExpertSlots, LedgerItem, StateMemory
from specchat.records.usage import DeviceUse
from specchat.ui.commands import COMMANDS

MAN = Path(__file__).parents[2] / "man"


def plain(page):
    """Return a page without roff markup: fonts, escapes, requests."""
    return re.sub(r"\\f.|^\.[A-Za-z]+ ?", "", page, flags=re.MULTILINE).replace("\\-", "-").replace('"', " ")


TEXT = plain((MAN / "specchat.1").read_text())
JSON_PAGE = (MAN / "specchat-json.5").read_text()
JSON_TEXT = plain(JSON_PAGE)
# Words in bold on the page about JSON that are values or options, not keys.
VALUES = {"stop", "length", "context", "interrupt", "resident", "specchat", "run", "bench", "probe"}

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
    placement = replace(PLAN.placement, experts=ExpertSlots(1, 1), microbatches=Microbatches(((2, 2),)))
    forecast = ExpertForecast(1, 1, 1, 1, 1, 1.0, 1.0, 1)
    device = DevicePlan("cuda:1", 1, 1, (), 0, 0, 1.0, 0.0, 0.0)
    states = StateMemory(1, 1, 0, 0, (), 1, 0, 0)
    plan = replace(PLAN, placement=placement, experts=forecast, states=states, devices=(device,))
    choices = (Choice("", "", "", False, Alternative("", None)),)
    made = chosen_object(ExplainedPlan(plan, Prediction(**{field.name: 0 for field in fields(Prediction)}), choices))
    nested = set(made["choices"][0]) | set(made["alternatives"][0]) | set(made["recurrent"])
    nested |= set(made["experts"]) | set(made["devices"][0]) | set(made["microbatches"][0]) | keys_of(DeviceUse)
    keys = keys_of(Turn) - {"unsaved"} | set(made) | nested | keys_of(LedgerItem) | set(done_object({}))
    return sorted(keys | set(delta_object(Delta("", ()))) | {"schema_version", "model", "revision", "seed"})


def all_keys(value):
    """Return the keys of an object and of all objects in it."""
    if isinstance(value, dict):
        return set(value).union(*map(all_keys, value.values()))
    return set().union(*map(all_keys, value)) if isinstance(value, list | tuple) else set()


def probe_keys():
    file = read_machine("desktop-12gb-pcie4x16-32gb")
    measured = replace(file.measured, matmul=(MatmulRate(1, 1.0),))
    verdicts = [Verdict("ok", "", "")]
    return sorted(all_keys(report_object(Report(file.hardware, measured, ()), verdicts, None)))


def list_keys():
    installed = models_command._object(Installed("", "model", Path(), 0))
    chat = sessions_command._object(SavedChat("", Path(), "", "", 0, datetime.now(UTC), 0))
    shown = {"question", *(field.name for field in fields(Message)), "system"}
    return sorted({"models", "sessions"} | all_keys(installed) | all_keys(chat) | shown)


def offer_keys():
    model = known_models()["Qwen/Qwen3-8B"]
    plan = PLAN
    prediction = Prediction(**{field.name: 0 for field in fields(Prediction)})
    made = recommendations_object(
        Recommendations((Recommendation(model, None, plan, prediction, False, 0, 0, 0),), (), ()), ""
    )
    return sorted({"models", *made, *made["runs"][0]})


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


def batch_keys():
    """Return the keys that the source of `bench --batch --json` writes."""
    sources = [inspect.getsource(batch._figures), inspect.getsource(bench_batch._print)]
    return sorted(set(re.findall(r'^\s+"(\w+)":', "".join(sources), re.MULTILINE)) | {"batches"})


SCHEMA = json.loads(files("specchat.bench").joinpath("schema.json").read_text())
KEYS = sorted(
    {*json_keys(), *offer_keys(), *probe_keys(), *list_keys(), *bench_keys(SCHEMA), *batch_keys(), *COMPARISON_KEYS}
)


@pytest.mark.parametrize("key", KEYS)
def test_page_has_every_json_key(key):
    assert re.search(rf"\b{key}\b", JSON_TEXT)


def documented():
    """Return the words in bold on the page about JSON, without options and names of commands."""
    lines = [line for line in JSON_PAGE.splitlines() if re.match(r"\.BR? ", line)]
    parts = []
    for line in lines:
        request, rest = line.split(maxsplit=1)
        words = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', rest)]
        parts += words[::2] if request == ".BR" else [rest]
    return {word for part in parts for word in re.findall(r"(?<![\w-])[a-z_][a-z_0-9]*(?![\w-])", part)}


def test_page_has_no_unknown_json_key():
    assert documented() - VALUES <= set(KEYS)


def test_pages_refer_to_each_other():
    assert "specchat-json(5)" in TEXT.replace(" (5)", "(5)") and "specchat(1)" in JSON_TEXT.replace(" (1)", "(1)")
    assert "JSON OUTPUT" not in TEXT


@pytest.mark.parametrize("name", [name for command in COMMANDS for name in command.names])
def test_page_has_every_chat_command(name):
    assert f"/{name}" in TEXT


@pytest.mark.parametrize("text", [TEXT, JSON_TEXT], ids=["specchat", "specchat-json"])
def test_page_has_no_unknown_option(text):
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= {*options(), "--help"}
