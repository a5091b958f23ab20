"""Digests of what tiny models are described as: a description that has changed needs another `SPEC_VERSION`.

    PYTHONPATH=.:tests python -m support.spec_digests

writes tests/data/spec_digests.json anew, unless descriptions have changed and the version has not: caches of others
would then hold descriptions of before.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specchat.models.sizes import cache
from specchat.models.sizes.inspect import inspect_model
from specchat.records.model import QUANTS, ModelSource, Quant
from support.quantized import awq, block_fp8, save_quantized
from support.tiny_models import make_config, random_model

FILE = Path(__file__).parents[1] / "data" / "spec_digests.json"
COMMAND = "PYTHONPATH=.:tests python -m support.spec_digests"
RAISE_IT = f"raise SPEC_VERSION in specchat/models/sizes/cache.py, then: {COMMAND}"
ARCHITECTURES = ("llama", "llama_tied", "gemma2", "gemma3", "phi3", "qwen3_moe", "gpt_oss", "deepseek_v3")
QUANTIZED = ("gpt_oss",)  # also described in every precision: it has stacked experts
PREQUANTIZED = {"awq": awq(), "fp8": block_fp8((32, 32))}


def read_stored() -> dict[str, Any]:
    """What is written down: the version, the libraries, and a digest for each description."""
    return json.loads(FILE.read_text())


def found_now(folder: Path) -> dict[str, Any]:
    """The same of this code.

    Args:
        folder: an empty one, for the models.
    """
    digests = {}
    for architecture in ARCHITECTURES:
        make_config(architecture).save_pretrained(folder / architecture)
        for quant in QUANTS if architecture in QUANTIZED else ("none",):
            digests[f"{architecture} {quant}"] = _digest(ModelSource("", folder / architecture), quant)
    for name, kind in PREQUANTIZED.items():
        source = save_quantized(random_model(make_config("llama")), folder / name, kind).quantized
        digests[f"llama {name}"] = _digest(source, "none")
    return {"version": cache.SPEC_VERSION, "libraries": cache.library_versions(), "digests": digests}


def changed(stored: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The models that are described otherwise than is written down."""
    old, new = stored["digests"], found["digests"]
    return sorted(name for name in old.keys() & new.keys() if old[name] != new[name])


def have_same_key(stored: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether a cache takes descriptions of the one for those of the other."""
    return all(stored[name] == found[name] for name in ("version", "libraries"))


def _digest(source: ModelSource, quant: Quant) -> str:
    values = {**asdict(inspect_model(source, quant)), "name": ""}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    with TemporaryDirectory() as folder:
        found = found_now(Path(folder))
    if FILE.exists() and have_same_key(stored := read_stored(), found) and (names := changed(stored, found)):
        sys.exit(f"the descriptions of {', '.join(names)} changed: {RAISE_IT}")
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
