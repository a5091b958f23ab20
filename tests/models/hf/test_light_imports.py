"""What the import of transformers leaves out, and that it comes back where it is needed; in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch._dynamo", "torch.distributed.tensor", "sympy", "scipy.optimize")
ANSWER = """
import sys
from specchat.cli.app import run_command_line
assert run_command_line(["run", "demo", "Hi", "--max-tokens", "2", "-q", "--no-save"]) == 0
sys.stderr.write("\\n" + repr([name for name in {heavy} if name in sys.modules]))
"""
AFTERWARDS = """
import json, sys
import torch
from specchat.models.hf.light_imports import import_lightly
disable, available, modules = torch.compiler.disable, torch.distributed.is_available, set(sys.modules)
import_lightly()
found = {"stand-ins": [name for name in sys.modules if name.startswith("torch._dynamo")]}
found["restored"] = torch.compiler.disable is disable and torch.distributed.is_available is available
from transformers import LlamaConfig, LlamaForCausalLM, utils
found["scipy"] = utils.is_scipy_available()
config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
found["logits"] = model(torch.tensor([[1, 2, 3]])).logits.sum().item()
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex() as helper:
    found["helper"] = type(helper).__module__
print(json.dumps(found))
"""


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_answer_imports_no_compiler():
    command = [sys.executable, "-m", "specchat", "run", "demo", "--plan", "-q"]  # saves the description of the models
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.DEVNULL)
    assert python(ANSWER.replace("{heavy}", repr(HEAVY))).stderr.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_what_was_left_out_comes_back_when_needed():
    found = json.loads(python(AFTERWARDS).stdout)
    plain = json.loads(python(AFTERWARDS.replace("import_lightly()\nfound", "found")).stdout)
    assert found["stand-ins"] == []
    assert found["restored"]
    assert found["scipy"] == plain["scipy"]
    assert found["logits"] == plain["logits"]
    assert found["helper"] == "torch._dynamo._trace_wrapped_higher_order_op"
