"""The sampling defaults that a model's makers recommend in generation_config.json."""

from dataclasses import dataclass
from pathlib import Path

from specchat.models.checkpoint.json_file import read_json


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of a model; None where the file has no value (transformers' own defaults are not applied)."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_ids: frozenset[int] = frozenset()


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read sampling values and stop tokens from generation_config.json; config.json is the fallback for stop tokens."""
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    eos = values.get("eos_token_id")
    if eos is None:
        eos = read_json(folder / "config.json").get("eos_token_id")
    stop_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return GenerationDefaults(stop_ids=stop_ids, **{name: values.get(name) for name in names})
