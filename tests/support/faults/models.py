"""Faults of a model's folder: configs, tokenizers, templates, safetensors and GGUF files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from support.faults.fault import ANY, ASK, DEMO, KINDS, NESTED, REFUSED, Fault, all_of, change, put, put_json, special

_HUGE = 1 << 80
_ODD: dict[str, Any] = {
    **{"null": None, "minus": -1, "zero": 0, "huge": _HUGE, "infinite": float("inf"), "text": "x\x1b[31m\u202e"},
    **{"list": [], "object": {}, "true": True, "half": 0.5},
}
_CONFIG = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act", "model_type"),
    *("tie_word_embeddings", "torch_dtype", "architectures", "eos_token_id", "rope_scaling", "quantization_config"),
)
_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id", "do_sample")


def faults() -> Iterator[Fault]:
    yield from _configs()
    yield from _generation_configs()
    yield from _tokenizers()
    yield from _weights()
    yield from _indices()
    yield from _gguf()


def _configs() -> Iterator[Fault]:
    for key in _CONFIG:
        for name, value in _ODD.items():
            yield Fault(f"config: {key} {name}", make=change("config.json", **{key: value}), codes=ANY)
    for name, content in _broken_json().items():
        yield Fault(f"config: {name}", make=put("model/config.json", content), codes=(3,))
    for kind in (*KINDS, "missing"):
        yield Fault(f"config: {kind}", make=special("model/config.json", kind), codes=(3,))


def _broken_json() -> dict[str, bytes | str]:
    return {
        **{"empty": "", "cut": '{"a": ', "nested": f'{{"a": {NESTED}}}', "list": "[]", "number": "3"},
        **{"not UTF-8": b'{"a": "\xff\xfe"}', "NUL": b"\0" * 100, "twice": '{"a": 1, "a": 2}'},
        **{"large number": '{"a": ' + "9" * 10_000 + "}", "LFS": "version https://git-lfs.github.com/spec/v1\n"},
    }


def _generation_configs() -> Iterator[Fault]:
    for key in _GENERATION:
        for name in ("minus", "huge", "infinite", "text", "list"):
            make = change("generation_config.json", **{key: _ODD[name]})
            yield Fault(f"generation: {key} {name}", make=make, codes=(0,))
    for kind in KINDS:
        yield Fault(f"generation: {kind}", make=special("model/generation_config.json", kind), codes=ANY)


def _tokenizer(**values: Any) -> Any:
    def make(folder: Path) -> None:
        before = json.loads((DEMO / "tokenizer.json").read_text())
        put_json("model/tokenizer.json", before | values)(folder)

    return make


def _tokenizers() -> Iterator[Fault]:
    for name, content in _broken_json().items():
        yield Fault(f"tokenizer: {name}", make=put("model/tokenizer.json", content))
    parts: dict[str, Any] = {
        "model null": {"model": None},
        "model unknown": {"model": {"type": "Quantum"}},
        "vocabulary of texts": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
        "ids minus": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        "ids huge": {"model": {"type": "BPE", "vocab": {"a": _HUGE}, "merges": []}},
        "ids beyond the embeddings": {"model": {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}},
        "merges unknown": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
        "no unknown token": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
        "empty vocabulary": {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        "expression": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        "normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "decoder": {"decoder": {"type": "Strip", "content": "aa", "start": -1, "stop": 0}},
        "post-processor": {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": []}},
        "added": {"added_tokens": [{"id": -5, "content": "x"}]},
        "added text": {"added_tokens": "x"},
        "truncation": {"truncation": {"max_length": _HUGE}},
    }
    for name, values in parts.items():
        yield Fault(f"tokenizer: {name}", make=_tokenizer(**values), codes=ANY)
    for kind in KINDS:
        yield Fault(f"tokenizer: {kind}", make=special("model/tokenizer.json", kind))
        yield Fault(f"tokenizer config: {kind}", make=special("model/tokenizer_config.json", kind), codes=ANY)
    for name, value in _ODD.items():
        yield Fault(f"template: {name}", make=change("tokenizer_config.json", chat_template=value), codes=ANY)
        yield Fault(f"special token: {name}", make=change("special_tokens_map.json", bos_token=value), codes=ANY)
    templates = {
        "spaces": "{{ ' ' * 10 ** 12 }}",
        "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "range": "{% for i in range(10 ** 9) %}{% endfor %}",
        "attributes": "{{ ''.__class__.__mro__ }}",
        "import": "{% import '/etc/passwd' as x %}",
        "include": "{% include '/etc/passwd' %}",
        "error text": "{{ raise_exception('\x1b[31m\u202e\n\n\n\n\nx') }}",
        "syntax": "{% for %}",
        "nested": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "blocks": "{% if x %}" * 200 + "{% endif %}" * 200,
    }
    for name, text in templates.items():
        make = all_of(special("model/chat_template.jinja", "missing"), put("model/chat_template.jinja", text))
        yield Fault(f"template: {name}", make=make, codes=(2,))
    for kind in KINDS:
        yield Fault(f"template: {kind}", make=special("model/chat_template.jinja", kind), codes=ANY)


# --- weights -----------------------------------------------------------------------------------------------------


def _header(text: bytes | str, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    head = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def _entry(**values: Any) -> str:
    return json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | values})


def _headers() -> dict[str, bytes]:
    entries: dict[str, Any] = {
        "dtype": {"dtype": "F99"},
        "dtype number": {"dtype": 3},
        "shape text": {"shape": "16"},
        "shape minus": {"shape": [-16]},
        "shape huge": {"shape": [_HUGE]},
        "shape product": {"shape": [1 << 40, 1 << 40]},
        "shape boolean": {"shape": [True, 16]},
        "offsets reversed": {"data_offsets": [64, 0]},
        "offsets minus": {"data_offsets": [-64, 0]},
        "offsets beyond": {"data_offsets": [0, 1 << 50]},
        "offsets huge": {"data_offsets": [0, _HUGE]},
        "offsets of one": {"data_offsets": [0]},
        "offsets half": {"data_offsets": [0.5, 64.5]},
    }
    return {
        **{name: _header(_entry(**values)) for name, values in entries.items()},
        "empty file": b"",
        "four bytes": b"abcd",
        "length zero": _header("{}", 0),
        "length beyond": _header("{}", 1 << 30),
        "length huge": _header("{}", (1 << 64) - 1),
        "not JSON": _header("{'a'"),
        "list": _header("[]"),
        "nested": _header(f'{{"a": {NESTED}}}'),
        "twice": _header('{"a": 1, "a": 2}'),
        "not UTF-8": _header(b'{"\xff": 1}'),
        "no tensors": _header("{}"),
        "name": _header(json.dumps({"\x1b[31m\u202e": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}})),
        "cut": (DEMO / "model.safetensors").read_bytes()[:-100_000],
        "longer": (DEMO / "model.safetensors").read_bytes() + b"x",
        "pickle": b"\x80\x02}q\x00.",
        "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    }


def _weights() -> Iterator[Fault]:
    for name, content in _headers().items():
        codes = (0, 3) if name == "longer" else (3,)  # a byte after the tensors harms nobody
        yield Fault(f"weights: {name}", make=put("model/model.safetensors", content), codes=codes)
    for kind in (*KINDS, "missing"):
        yield Fault(f"weights: {kind}", make=special("model/model.safetensors", kind), codes=(3,))
    only_pickle = all_of(special("model/model.safetensors", "missing"), put("model/pytorch_model.bin", b"\x80\x02."))
    yield Fault("weights: only a pickle", make=only_pickle, codes=(3,))


def _indices() -> Iterator[Fault]:
    maps: dict[str, Any] = {
        "parent": {"a": "../model.safetensors"},
        "absolute": {"a": "/etc/passwd"},
        "NUL": {"a": "a\0b.safetensors"},
        "surrogate": {"a": "\ud800.safetensors"},
        "escape": {"a": "\x1b[31m.safetensors"},
        "long": {"a": "x" * 5000},
        "missing": {"a": "model-00001-of-00002.safetensors"},
        "number": {"a": 3},
        "empty name": {"a": ""},
        "empty": {},
        "list": [],
        "null": None,
    }
    for name, value in maps.items():
        make = all_of(
            special("model/model.safetensors", "missing"),
            put_json("model/model.safetensors.index.json", {"weight_map": value}),
        )
        yield Fault(f"index: map {name}", make=make, codes=(3,))
    for name, content in _broken_json().items():
        make = all_of(special("model/model.safetensors", "missing"), put("model/model.safetensors.index.json", content))
        yield Fault(f"index: {name}", make=make, codes=(3,))
    for kind in KINDS:
        make = all_of(
            special("model/model.safetensors", "missing"), special("model/model.safetensors.index.json", kind)
        )
        yield Fault(f"index: {kind}", make=make, codes=(3,))


# --- GGUF --------------------------------------------------------------------------------------------------------


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _pair(key: bytes, kind: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + value


_ARCH = _pair(b"general.architecture", 8, _text(b"llama"))


def _gguf_files() -> dict[str, bytes]:
    def head(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)

    tensor = partial(struct.pack, "<IQIQ", 1)
    return {
        "empty": b"",
        "magic": b"GGML" + bytes(64),
        "version": head(99) + bytes(64),
        "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "cut": head()[:9],
        "nothing in it": head(),
        "many tensors": head(tensors=1 << 60),
        "many pairs": head(pairs=1 << 60),
        "long key": head(pairs=1) + struct.pack("<Q", 1 << 60),
        "long text": head(pairs=1) + _text(b"general.architecture") + struct.pack("<IQ", 8, 1 << 60),
        "kind": head(pairs=1) + _pair(b"a", 77, bytes(8)),
        "nested arrays": head(pairs=1) + _pair(b"a", 9, struct.pack("<IQ", 9, 1) * 5000 + bytes(64)),
        "long array": head(pairs=1) + _pair(b"a", 9, struct.pack("<IQ", 0, 1 << 62)),
        "architecture number": head(pairs=1) + _pair(b"general.architecture", 4, struct.pack("<I", 3)),
        "architecture": head(pairs=1) + _pair(b"general.architecture", 8, _text(b"\x1b[31m\xff")),
        "no sizes": head(pairs=1) + _ARCH,
        "alignment": head(pairs=2) + _ARCH + _pair(b"general.alignment", 4, struct.pack("<I", 0)),
        "dimensions": head(tensors=1, pairs=1) + _ARCH + _text(b"x") + struct.pack("<I", 1 << 30),
        "tensor kind": head(tensors=1, pairs=1) + _ARCH + _text(b"x") + tensor(32, 999, 0) + bytes(256),
        "tensor size": head(tensors=1, pairs=1) + _ARCH + _text(b"x") + tensor(1 << 62, 0, 0) + bytes(256),
        "tensor offset": head(tensors=1, pairs=1) + _ARCH + _text(b"x") + tensor(32, 0, 1 << 62) + bytes(256),
        "huge sizes": head(pairs=2) + _ARCH + _pair(b"llama.block_count", 10, struct.pack("<Q", (1 << 64) - 1)),
    }


def _gguf() -> Iterator[Fault]:
    ask = tuple(each.replace("{model}", "./x.gguf") for each in ASK)
    for name, content in _gguf_files().items():
        yield Fault(f"gguf: {name}", ask, put("x.gguf", content), codes=REFUSED)
    for kind in (*KINDS, "missing"):
        yield Fault(f"gguf: {kind}", ask, special("x.gguf", kind), codes=(3,))
