"""The page docs/models.md: which types run, and why the others are refused."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import transformers as hf

from specchat.bench.readme import with_measured
from support.sweep.configs import causal_types, composite_types
from support.sweep.trial import Outcome

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN = "<!-- sweep: PYTHONPATH=.:tests python -m support.sweep --write writes the text below -->"
END = "<!-- sweep: end -->"
_LIBRARIES = ("transformers", "torch")
_ERROR = re.compile(r" \(error .*\)$")
_LAYERS = re.compile(r"has (.*) layers, on")

# Names that people know the models of a type by. Other types have the example of transformers' documentation.
FAMILIES = {
    "apertus": "Apertus 8B, 70B",
    "bloom": "BLOOM, BLOOMZ",
    "cohere": "Command R, Command R+, Aya 23",
    "cohere2": "Command R7B, Command A",
    "dbrx": "DBRX",
    "deepseek_v2": "DeepSeek-V2, DeepSeek-Coder-V2",
    "deepseek_v3": "DeepSeek-V3, V3.1, R1, Kimi-K2, Moonlight",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "exaone4": "EXAONE 4.0",
    "falcon": "Falcon 7B, 40B, 180B",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon-Mamba",
    "gemma": "Gemma 1, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n": "Gemma 3n E2B, E4B",
    "gemma4": "Gemma 4 E2B, E4B, 26B-A4B, 31B",
    "glm": "GLM-4 9B (2024)",
    "glm4": "GLM-4-0414, GLM-Z1",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2, DialoGPT",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX, Pythia, Dolly 2",
    "gpt_oss": "gpt-oss 20B, 120B",
    "gptj": "GPT-J",
    "granite": "Granite 3.x",
    "granitemoe": "Granite 3.x MoE",
    "granitemoehybrid": "Granite 4",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "idefics3": "Idefics3",
    "internlm3": "InternLM3",
    "internvl": "InternVL 3, 3.5",
    "jamba": "Jamba",
    "kimi_k25": "Kimi-K2.5, K2.6",
    "kimi_linear": "Kimi-Linear",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 1, 2, 3.x, Vicuna, Yi, TinyLlama, SmolLM2, DeepSeek-R1-Distill-Llama",
    "llama4": "Llama 4 Scout, Maverick",
    "llava": "LLaVA 1.5, Pixtral",
    "llava_next": "LLaVA 1.6",
    "llava_onevision": "LLaVA-OneVision",
    "mamba": "Mamba",
    "mamba2": "Mamba 2",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minicpm3": "MiniCPM3",
    "minimax": "MiniMax-Text-01, MiniMax-M1",
    "minimax_m2": "MiniMax-M2, M2.1",
    "ministral": "Ministral 8B",
    "mistral": "Mistral 7B, Mistral Nemo, Small (2501), Large 2, Zephyr, Codestral",
    "mistral3": "Mistral Small 3.1, 3.2, Ministral 3, Devstral",
    "mistral4": "Mistral Small 4",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "mllama": "Llama 3.2 Vision",
    "mpt": "MPT 7B, 30B",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron-H, Nemotron 3 Nano",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "paligemma": "PaliGemma 1, 2",
    "persimmon": "Persimmon 8B",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    "phi4_multimodal": "Phi-4-multimodal",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen2_vl": "Qwen2-VL, QVQ",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "qwen3_omni_moe": "Qwen3-Omni",
    "qwen3_vl": "Qwen3-VL 2B to 32B",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B, 235B-A22B",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv": "RWKV-4",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3",
    "smolvlm": "SmolVLM 1, 2",
    "stablelm": "StableLM, Stable LM 2",
    "starcoder2": "StarCoder2",
    "zamba2": "Zamba2 1.2B, 2.7B, 7B",
}


def write(outcomes: Sequence[Outcome], page: Path = PAGE) -> None:
    page.write_text(with_measured(page.read_text(), list(sections(outcomes)), BEGIN, END))


def sections(outcomes: Sequence[Outcome]) -> Iterable[str]:
    """The counts, tables of the types that run, and a table for each reason of a refusal."""
    yield _counts(outcomes)
    composites = set(composite_types())
    exact = [outcome for outcome in outcomes if outcome.result == "exact"]
    for title, is_composite in (
        ("Text models that run", False),
        ("Text halves of other models that run", True),
    ):
        if members := [outcome for outcome in exact if (outcome.kind in composites) == is_composite]:
            yield f"## {title} ({len(members)})"
            yield _table(members)
    refused = [outcome for outcome in outcomes if outcome.result == "refused"]
    yield f"## Models that are refused ({len(refused)})"
    groups: dict[str, list[Outcome]] = {}
    for outcome in refused:
        groups.setdefault(_group(outcome.detail), []).append(outcome)
    for reason, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        title = reason.partition(", ")[0]
        yield f"### {title[0].upper()}{title[1:]} ({len(members)})"
        yield f"`specchat run` says: such a model {reason}."
        yield _table(members, _layers if _LAYERS.match(members[0].detail) else None)
    if broken := [outcome for outcome in outcomes if outcome.result == "broken"]:
        yield f"## Models that fail ({len(broken)})"
        yield _table(broken, lambda detail: detail)


def _counts(outcomes: Sequence[Outcome]) -> str:
    libraries = " and ".join(f"{name} {version(name).partition('+')[0]}" for name in _LIBRARIES)
    rows = [["types", "run", "refused", "fail"], ["---", "---:", "---:", "---:"]]
    everything = [outcome.kind for outcome in outcomes]
    for name, kinds in (
        ("causal LMs of transformers", causal_types()),
        ("with a `text_config` beside images or sound", composite_types()),
        ("all types", everything),
    ):
        counts = Counter(outcome.result for outcome in outcomes if outcome.kind in set(kinds))
        rows.append([f"{len(kinds)} {name}", *(str(counts[result]) for result in ("exact", "refused", "broken"))])
    return f"Tried with {libraries}. Types may be in both of the first rows.\n\n{_markdown(rows)}"


def _group(reason: str) -> str:
    """The reason without what differs from type to type."""
    return _ERROR.sub("", _LAYERS.sub("has recurrent or sparse layers, on", reason))


def _layers(reason: str) -> str:
    return _LAYERS.match(reason)[1]


def _table(outcomes: Sequence[Outcome], column: Callable[[str], str] | None = None) -> str:
    rows = [["type", "models"] + ["kinds of layers" if column is _layers else "what fails"] * (column is not None)]
    rows.append(["---"] * len(rows[0]))
    for outcome in sorted(outcomes, key=lambda outcome: outcome.kind):
        detail = [] if column is None else [column(outcome.detail).replace("|", "\\|")]
        rows.append([f"`{outcome.kind}`", _models(outcome.kind), *detail])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _models(kind: str) -> str:
    """Well-known names, or the example that transformers documents the type with."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    config_class = hf.CONFIG_MAPPING[kind]
    source = inspect.getsource(inspect.getmodule(config_class))
    found = re.search(rf'checkpoint="([^"]+)"\)\n(?:@\w+.*\n)*class {config_class.__name__}\b', source)
    return f"such as `{found[1]}`" if found else ""
