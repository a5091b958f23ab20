"""`--devices` on the command line: what it takes and refuses, and the plan that it prints."""

from __future__ import annotations

import json

import pytest
from support.pretended_gpu import PretendedGpu

import specchat as package
from specchat.cli.options import on_devices
from specchat.errors import InvalidSizeError, UsageError
from specchat.loading.devices import on_named_devices, parse_devices
from specchat.records.plan import DeviceChoice, PlanChoices
from specchat.units import GIB, MIB

# The reserve for libraries is 96 MiB on each GPU. The first one has room for three layers of the demo beside its head.
BUDGETS = "cuda:0=77MiB,cuda:1=98MiB"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", "auto"),
        ("cuda:0", (DeviceChoice("cuda:0"),)),
        ("cuda, cuda:1=6GiB,cpu", (DeviceChoice("cuda"), DeviceChoice("cuda:1", 6 * GIB), DeviceChoice("cpu"))),
    ],
)
def test_lists_of_devices(text: str, expected: object):
    assert parse_devices("--devices", text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cuda:N"),
        ("cuda:0,", "cuda:N"),
        ("cuda:0,gpu", "'gpu'"),
        ("cuda:0,auto", "'auto'"),
        ("cuda,cuda:0", "cuda:0 twice"),
        ("cpu,cuda:0", "cpu last"),
        ("cuda:0=", "cuda:0"),
        ("cuda:0=12", "'12'"),
    ],
)
def test_lists_that_are_refused(text: str, words: str):
    with pytest.raises((UsageError, InvalidSizeError), match=words):
        parse_devices("--devices", text)


def test_the_first_device_is_that_of_embeddings_head_and_draft():
    asked = PlanChoices(devices=(DeviceChoice("cuda:1", 6 * GIB), DeviceChoice("cpu")), vram_bytes=8 * GIB)
    assert (on_named_devices(asked).device, on_named_devices(asked).vram_bytes) == ("cuda:1", 6 * GIB)
    one = on_named_devices(PlanChoices(devices=(DeviceChoice("cpu"),), vram_bytes=8 * GIB))
    assert one == PlanChoices(device="cpu", vram_bytes=8 * GIB)
    assert on_named_devices(PlanChoices(devices="auto")) == PlanChoices(devices="auto")


@pytest.mark.parametrize("command", [["run", "demo", "hi"], ["bench", "demo"], ["serve", "demo"], ["probe", "demo"]])
def test_one_device_or_several(specchat, command: list[str]):
    result = specchat(*command, "--device", "cpu", "--devices", "cuda:0,cuda:1")
    assert result.code == 2 and result.out == ""
    assert "--device and --devices cannot be combined" in result.err and "hint: " in result.err


def test_a_flag_comes_before_the_file():
    asked = PlanChoices(device="cpu", devices=(DeviceChoice("cuda:0"), DeviceChoice("cuda:1")))
    sources = {"device": "--device", "devices": "SPECCHAT_DEVICES"}
    assert on_devices(asked, sources) == PlanChoices(device="cpu")
    assert on_devices(asked, {"device": "config.toml", "devices": "--devices"}).device == "cuda:0"


def test_devices_that_are_not_there(specchat):
    with PretendedGpu(num_devices=2):
        result = specchat("run", "demo", "hi", "--devices", "cuda:0,cuda:2")
        small = specchat("run", "demo", "hi", "--devices", "cuda:0=120MiB,cuda:1=20MiB")
    assert result.code == 5 and "cuda:2 does not exist" in result.err
    assert small.code == 4 and "on cuda:1 with --ctx" in small.err and "--devices" in small.err


def test_the_plan_of_two_devices(specchat):
    with PretendedGpu(num_devices=2):
        plan = json.loads(specchat("run", "demo", "--plan", "--json", "--ctx", "256", "--devices", BUDGETS).out)
        wide = specchat("run", "demo", "--plan", "--ctx", "256", "--devices", BUDGETS)
    first, second = plan["devices"]
    assert [first["device"], second["device"]] == ["cuda:0", "cuda:1"]
    assert first["device_bytes"] <= first["device_budget_bytes"] == 77 * MIB
    assert second["device_bytes"] == sum(item["bytes"] for item in second["ledger"]) <= 98 * MIB
    layers = [each["resident_layers"] + each["streamed_layers"] for each in plan["devices"]]
    assert sum(layers) == 8 and all(layers)
    assert plan["choices"][0] == {"option": "devices", "value": "cuda:0, cuda:1", "why": "asked for", "pinned": True}
    assert wide.code == 0
    for words in ("device", "stays", "streams", "link busy", "computes", "memory of cuda:0:", "memory of cuda:1:"):
        assert words in wide.out
    assert all(len(line) <= 110 for line in wide.out.splitlines())


def test_auto_stays_on_one_device_without_gpus(specchat):
    plan = json.loads(specchat("run", "demo", "--plan", "--json", "--devices", "auto").out)
    assert plan["device"] == "cpu" and plan["devices"] == []


@pytest.mark.slow
def test_the_text_of_two_devices_is_that_of_one():
    texts, options = [], {"ctx": 256, "learn": False, "dtype": "fp32"}
    with package.load("demo", device="cpu", **options) as model:
        texts.append("".join(delta.text for delta in model.generate("Once upon a time", max_tokens=12)))
    with PretendedGpu(num_devices=2), package.load("demo", devices=BUDGETS, **options) as model:
        texts.append("".join(delta.text for delta in model.generate("Once upon a time", max_tokens=12)))
    assert texts[0] == texts[1] != ""
    with pytest.raises(UsageError, match="cannot be combined"):
        package.load("demo", device="cpu", devices=BUDGETS)
