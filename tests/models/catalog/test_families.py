"""Every entry of families.toml matches its examples and no other family's."""

import pytest

from specchat.models.catalog.families import known_families
from specchat.models.catalog.ref import draft_candidates, parse_model

# target -> its preferred draft, None where no draft is known
EXAMPLES = {
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Meta-Llama-3-70B-Instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "unsloth/Llama-3.3-70B-Instruct-bnb-4bit": "unsloth/Llama-3.2-1B-Instruct",
    "NousResearch/Hermes-3-Llama-3.1-70B": "meta-llama/Llama-3.2-1B-Instruct",
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF": "meta-llama/Llama-3.2-1B-Instruct",
    "allenai/Llama-3.1-Tulu-3-70B": "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct": None,
    "meta-llama/Llama-3.1-70B": None,
    "meta-llama/Llama-2-70b-chat-hf": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "meta-llama/Llama-3.2-1B-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": None,
    "Qwen/Qwen2.5-72B-Instruct-AWQ": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-32B-Instruct@main": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-Coder-32B-Instruct": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "Qwen/Qwen2.5-Math-72B-Instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct": None,
    "Qwen/QwQ-32B": "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen3-32B": "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-14B-Base": None,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-0.6B": None,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3.5-35B-A3B": "Qwen/Qwen3.5-0.8B",
    "Qwen/Qwen3.8-27B": "Qwen/Qwen3.5-0.8B",
    "Qwen/Qwen3.5-0.8B": None,
    "google/gemma-2-27b-it": "google/gemma-2-2b-it",
    "google/gemma-3-27b-it": "google/gemma-3-270m-it",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mistralai/Mistral-7B-Instruct-v0.2",
    "mistralai/Mistral-Large-Instruct-2407": "mistralai/Mistral-7B-Instruct-v0.3",
    "microsoft/Phi-3-medium-128k-instruct": "microsoft/Phi-3-mini-4k-instruct",
    "allenai/OLMo-2-0325-32B-Instruct": "allenai/OLMo-2-0425-1B-Instruct",
    "unsloth/gpt-oss-120b-BF16": "unsloth/gpt-oss-20b-BF16",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "ibm-granite/granite-3.3-8b-instruct": "ibm-granite/granite-3.3-2b-instruct",
    "ibm-granite/granite-4.0-h-small": "ibm-granite/granite-4.0-h-350m",
    "LiquidAI/LFM2-8B-A1B": "LiquidAI/LFM2-350M",
    "/models/Llama-3.3-70B-Instruct/": "meta-llama/Llama-3.2-1B-Instruct",
    "~/qwen3-32b": "Qwen/Qwen3-0.6B",
    "someone/a-model-of-their-own": None,
}
UNSUPPORTED = {
    "tiiuae/falcon-mamba-7b-instruct": "recurrent",
    "Zyphra/Zamba-7B-v1": "recurrent",
    "MiniMaxAI/MiniMax-M1-80k": "copies whose names end in -hf",
}
SUPPORTED = [*EXAMPLES, "MiniMaxAI/MiniMax-M1-80k-hf", "MiniMaxAI/MiniMax-Text-01-hf", "Zyphra/Zamba2-2.7B"]


@pytest.mark.parametrize(("target", "draft"), EXAMPLES.items())
def test_the_draft_of_a_target(target: str, draft: str | None):
    candidates = draft_candidates(parse_model(target))
    assert [ref.text for ref in candidates[:1]] == ([] if draft is None else [draft])


def test_every_family_has_an_example_and_its_drafts_are_hub_ids():
    families = known_families()
    found = {families.family_of(target) for target in EXAMPLES} - {None}
    assert found == set(families.families)
    for family in families.families:
        assert family.drafts
        assert all(parse_model(draft).kind == "hub" for draft in family.drafts)


def test_no_draft_needs_a_draft_of_its_own():
    families = known_families()
    drafts = [draft for family in families.families for draft in family.drafts]
    assert [draft for draft in drafts if families.family_of(draft)] == []


@pytest.mark.parametrize(("model", "reason"), UNSUPPORTED.items())
def test_unsupported_models_have_a_reason(model: str, reason: str):
    assert reason in (known_families().why_unsupported(model) or "")


def test_supported_models_are_not_unsupported():
    assert [model for model in SUPPORTED if known_families().why_unsupported(model)] == []
