"""Random damage to the JSON files of a model's folder, and a program that uses the folder as a user would."""

from __future__ import annotations

import builtins
import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from hypothesis import strategies as st

import specchat
from specchat.errors import SpecchatError
from support.tiny_models import make_config, random_model, save

MODELS = ("deepseek_v3", "gemma3", "gpt_oss", "llama", "llama_tied", "qwen3_moe")
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
_TOKENS = {"bos_token": "w1", "eos_token": {"content": "w2", "lstrip": False}, "pad_token": "w0", "unk_token": None}
_VALUES: dict[str, Any] = {
    "null": None,
    "text": "w7",
    "no text": "",
    "number": 7,
    "fraction": 0.5,
    "true": True,
    "list": [1, "a"],
    "empty list": [],
    "object": {"a": {"b": 1}},
    "empty object": {},
    "zero": 0,
    "minus one": -1,
    "negative": -(10**6),
    "large": 10**6,
    "huge": 10**12,
    "absurd": 10**200,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "surrogate": "\ud800",
}
_NESTED = ("nested", "nested very deeply")
_WHOLE = ("cut", "bytes", "nothing", "a list")
KINDS = ("drop", *_VALUES, *_NESTED)
_RAW_NAMES = {
    name for home in (builtins, torch) for name in dir(home) if name.endswith(("Error", "Exception", "Iteration"))
}


@dataclass(frozen=True)
class Mutation:
    """One change to one file.

    Attributes:
        model: name of the tiny model.
        file: name of the file.
        kind: kind of the change.
        place: numbers that choose the value to change, one for each level.
    """

    model: str
    file: str
    kind: str
    place: tuple[int, ...]


def mutations(files: tuple[str, ...] = FILES) -> st.SearchStrategy[Mutation]:
    """Changes of single values, more of them in config.json, and now and then of a whole file."""
    kinds = st.one_of(*[st.sampled_from(KINDS)] * 9, st.sampled_from(_WHOLE))
    place = st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
    return st.builds(Mutation, st.sampled_from(MODELS), st.sampled_from(files), kinds, place)


def write_models(folder: Path) -> None:
    """Write each tiny model with all files that are changed."""
    for name in MODELS:
        path = folder / name
        save(random_model(make_config(name)), path, max_shard_size="200KB")
        (path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "chat_template": TEMPLATE,
                    "additional_special_tokens": ["w3"],
                    "model_max_length": 512,
                    "clean_up_tokenization_spaces": False,
                    **_TOKENS,
                }
            )
        )
        (path / "special_tokens_map.json").write_text(
            json.dumps({**_TOKENS, "additional_special_tokens": ["w3", "w4"]})
        )
        defaults = hf.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=20, eos_token_id=[2, 3])
        defaults.save_pretrained(path)
        assert all((path / file).is_file() for file in FILES)


def damage(file: Path, mutation: Mutation) -> None:
    """Change the file."""
    data = file.read_bytes()
    match mutation.kind:
        case "cut":
            file.write_bytes(data[: len(data) * mutation.place[0] // 100])
        case "bytes":
            file.write_bytes(bytes(range(256)))
        case "nothing":
            file.unlink()
        case "a list":
            file.write_bytes(b"[" + data + b"]")
        case "nested very deeply":
            file.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
        case _:
            file.write_text(json.dumps(_changed(json.loads(data), mutation)))


def _changed(values: Any, mutation: Mutation) -> Any:
    changed = copy.deepcopy(values)
    home, key = _chosen(changed, mutation.place)
    if mutation.kind == "drop":
        del home[key]
    elif mutation.kind == "nested":
        for _ in range(50):
            home[key] = [home[key]]
    else:
        home[key] = _VALUES[mutation.kind]
    return changed


def _chosen(values: Any, place: tuple[int, ...]) -> tuple[Any, Any]:
    """The object or list, and the key or index, that `place` chooses; a third of the time below the first level."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    key = keys[place[0] % len(keys)]
    below = values[key]
    if len(place) > 1 and isinstance(below, dict | list) and below and place[1] % 3 == 0:
        return _chosen(below, place[1:])
    return values, key


def use(folder: Path) -> str:
    """Plan, load and ask the model in a folder.

    Returns:
        The first word of the outcome: "answered", or the name of the error.

    Raises:
        AssertionError: an error that tells the user nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with specchat.load(str(folder), draft="none", device="cpu", vram="256MiB", ctx=64, offline=True) as model:
                model.chat([{"role": "user", "content": "w5 w6"}], max_tokens=3).read()
    except SpecchatError as error:
        words = f"{error.message} {error.hint}"
        assert not [name for name in _RAW_NAMES if name in words], words
        assert "\n" not in words and len(error.message) < 600, words
        return type(error).__name__
    return "answered"
