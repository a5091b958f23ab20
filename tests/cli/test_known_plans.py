"""`run --plan` of models that are neither here nor can be asked for: only the sizes of known uploads are left."""

import json
from itertools import pairwise

import pytest

from specchat.errors import HubUnreachableError
from specchat.models.sizes.known_specs import known_spec

KNOWN = "Qwen/Qwen3-8B"


@pytest.fixture
def plan(specchat, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))

    def call(model, *flags):
        return specchat("run", model, "--plan", "--device", "cpu", "--vram", "30GiB", "-q", *flags)

    return call


def test_known_upload_is_planned_offline_from_its_known_sizes(plan):
    done = plan(KNOWN, "--offline", "--draft", "none", "--json", "--quant", "none")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    spec = known_spec(KNOWN)
    layers = found["resident_layers"] + found["streamed_layers"]
    assert (found["target"], layers, found["draft"]) == (KNOWN, spec.num_layers, None)


def test_plan_says_that_no_file_was_read(plan):
    out = " ".join(plan(KNOWN, "--offline").out.split())
    assert f"the sizes that specchat ships of {KNOWN}, because {KNOWN} is missing" in out


def test_known_upload_is_planned_without_a_connection(plan, monkeypatch):
    def fail(*_args, **_kwargs):
        raise HubUnreachableError("cannot reach the hub")

    monkeypatch.setattr("specchat.models.locate.look_up", fail)
    done = plan(KNOWN)
    assert done.code == 0 and f"{KNOWN}, because cannot reach the hub" in " ".join(done.out.split()), done.err


def test_other_models_and_drafts_are_refused_as_ever(plan):
    refused = [plan("nobody/nothing", "--offline"), plan(KNOWN, "--offline", "--draft", "nobody/nothing")]
    assert [each.code for each in refused] == [3, 3]
    assert all("missing or incomplete" in each.err for each in refused)
    assert all(one.out == other.out == "" for one, other in pairwise(refused))
