"""Every entry of known_heads.toml matches its examples."""

import pytest

from specchat.models.catalog.known_heads import heads_for, kind_of, known_heads
from specchat.models.catalog.ref import parse_model

EAGLE, LAB = "RedHatAI/{}-speculator.eagle3", "z-lab/{}-DFlash"
# names of a target and of its base models -> its heads
EXAMPLES = {
    ("meta-llama/Llama-3.1-8B-Instruct",): [EAGLE.format("Llama-3.1-8B-Instruct")],
    ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",): [EAGLE.format("Llama-3.1-8B-Instruct")],
    ("meta-llama/Llama-3.1-8B",): [],
    ("meta-llama/Llama-3.3-70B-Instruct",): [EAGLE.format("Llama-3.3-70B-Instruct")],
    ("Qwen/Qwen3-4B-FP8",): [LAB.format("Qwen3-4B") + "-b16"],
    ("Qwen/Qwen3-4B-Instruct-2507",): [],
    ("Qwen/Qwen3-8B",): [EAGLE.format("Qwen3-8B"), LAB.format("Qwen3-8B") + "-b16"],
    ("Qwen/Qwen3-8B-Base",): [],
    ("someone/tuned", "Qwen/Qwen3-14B"): [EAGLE.format("Qwen3-14B")],
    ("/models/Qwen3-32B-AWQ/",): [EAGLE.format("Qwen3-32B")],
    ("openai/gpt-oss-20b",): [EAGLE.format("gpt-oss-20b"), LAB.format("gpt-oss-20b")],
    ("openai/gpt-oss-120b",): [LAB.format("gpt-oss-120b")],
    ("Qwen/Qwen3-30B-A3B-Instruct-2507",): [EAGLE.format("Qwen3-30B-A3B-Instruct-2507")],
    ("Qwen/Qwen3-235B-A22B-Instruct-2507",): [EAGLE.format("Qwen3-235B-A22B-Instruct-2507")],
    ("Qwen/Qwen3-235B-A22B-FP8",): [EAGLE.format("Qwen3-235B-A22B")],
    ("Qwen/Qwen3-Coder-30B-A3B-Instruct",): [LAB.format("Qwen3-Coder-30B-A3B")],
    ("Qwen/Qwen3-Coder-Next",): [LAB.format("Qwen3-Coder-Next")],
    ("Qwen/Qwen3.5-4B",): [LAB.format("Qwen3.5-4B")],
    ("Qwen/Qwen3.5-9B",): [LAB.format("Qwen3.5-9B")],
    ("Qwen/Qwen3.5-27B",): [LAB.format("Qwen3.5-27B")],
    ("Qwen/Qwen3.5-35B-A3B",): [LAB.format("Qwen3.5-35B-A3B")],
    ("Qwen/Qwen3.5-122B-A10B",): [LAB.format("Qwen3.5-122B-A10B")],
    ("Qwen/Qwen3.6-27B",): [LAB.format("Qwen3.6-27B")],
    ("Qwen/Qwen3.6-35B-A3B",): [LAB.format("Qwen3.6-35B-A3B")],
    ("Qwen/Qwen3.8-27B",): ["z-lab/Qwen3.8-27B-DFlash2"],
    ("google/gemma-4-E2B-it",): ["google/gemma-4-E2B-it-assistant"],
    ("unsloth/gemma-4-E4B-it-bnb-4bit",): ["google/gemma-4-E4B-it-assistant"],
    ("google/gemma-4-12B-it",): ["google/gemma-4-12B-it-assistant"],
    ("google/gemma-4-26B-A4B-it",): ["google/gemma-4-26B-A4B-it-assistant"],
    ("someone/tuned", "google/gemma-4-31B-it"): ["google/gemma-4-31B-it-assistant"],
    ("google/gemma-4-31B",): [],
    ("google/gemma-4-31B-it-assistant",): [],
    ("someone/a-model-of-their-own",): [],
}


@pytest.mark.parametrize(("names", "heads"), EXAMPLES.items())
def test_a_target_has_its_heads(names: tuple[str, ...], heads: list[str]):
    assert [head.id for head in heads_for(names)] == heads


def test_every_entry_has_an_example_and_is_a_hub_id():
    assert {head.id for head in known_heads()} == {head for heads in EXAMPLES.values() for head in heads}
    assert all(parse_model(head.id).kind == "hub" for head in known_heads())
    assert kind_of("z-lab/Qwen3.5-4B-DFlash") == "a DFlash head" and kind_of("Qwen/Qwen3-8B") == ""
