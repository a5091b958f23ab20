"""Models that compute NaN, on the command line and from Python: one line says so, and no nonsense is written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import specchat as public
from specchat.errors import BrokenScoresError

DEMO = Path(public.__file__).parent / "demo"
ASKED = ("Tell me a story about a fox.", "--device", "cpu", "--vram", "1GiB", "--ctx", "256", "--max-tokens", "24")
GREEDY = ("--temperature", "0", "--no-save")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, str]:
    """The demo pair with NaN in a layer's weights: their folders by role."""
    folders = {}
    for role in ("target", "draft"):
        folder = tmp_path_factory.mktemp("broken") / role
        shutil.copytree(DEMO / role, folder)
        tensors = load_file(folder / "model.safetensors")
        next(tensor for name, tensor in tensors.items() if "down_proj" in name).fill_(float("nan"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders[role] = str(folder)
    return folders


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_broken_target_exits_with_1_and_writes_nothing(specchat, broken, form):
    for dtype in ("fp32", "bf16"):
        result = specchat("run", broken["target"], *ASKED, *GREEDY, "--dtype", dtype, *form)
        assert (result.code, result.out) == (1, "")
        assert f"error: {broken['target']} computes NaN or infinity in {dtype}" in " ".join(result.err.split())
        assert "hint: use --dtype fp32" in result.err if dtype == "bf16" else "damaged" in result.err


def test_a_broken_draft_is_named_once_and_changes_nothing(specchat, broken):
    plain = specchat("run", "demo", *ASKED, *GREEDY, "--draft", "none", "--json")
    result = specchat("run", "demo", *ASKED, *GREEDY, "--draft", broken["draft"], "--tree-budget", "16", "--json")
    assert (plain.code, result.code) == (0, 0), result.err
    ours, theirs = json.loads(result.out), json.loads(plain.out)
    assert ours["token_ids"] == theirs["token_ids"] and ours["message"] == theirs["message"]
    assert ours["speculation"]["mean_tree_nodes"] == 0
    err = " ".join(result.err.split())
    assert err.count("going on without it") == 1
    assert f"warning: the draft {broken['draft']} computes NaN or infinity in fp32: going on without it" in err


def test_python_is_told_too(broken):
    options = {"device": "cpu", "vram": "1GiB", "ctx": 256}
    messages = [{"role": "user", "content": "Hello"}]
    with public.load("demo", draft=broken["draft"], tree_budget=16, **options) as model:
        with pytest.warns(UserWarning, match="going on without it"):
            first = model.chat(messages, max_tokens=8, temperature=0.0).read()
        assert model.chat(messages, max_tokens=8, temperature=0.0).read() == first
    with public.load(broken["target"], draft="none", **options) as model, pytest.raises(BrokenScoresError):
        model.chat(messages, max_tokens=8).read()
