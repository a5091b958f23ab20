"""Tokenizers from the metadata of GGUF files, against the tokenizers that the metadata was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.catalog.ref import demo_source
from specchat.models.checkpoint.gguf import GgufFile, open_gguf
from specchat.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from specchat.models.gguf.tokenizer import tokenizer_files
from specchat.models.hf.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\n\tand tabs  ",
    "你好、世界 naïve café cafe\u0301 Ünïcode",
    "def f(x):\n    return x ** 2  # 🎉🎉",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


def write(file: Path, arch: str = "llama", **values: Any) -> GgufFile:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(128)
    for name, value in values.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(file)


def tokenizer_of(file: GgufFile, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(file).items():
        (folder / name).write_text(content, encoding="utf-8")
    return load_tokenizer(folder)


def demo_values() -> dict[str, Any]:
    """The demo's byte-level tokenizer as llama.cpp's converter writes it."""
    whole = json.loads((demo_source("target").path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, added = whole["model"]["vocab"], {each["content"]: each for each in whole["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token in added else 1 for token in tokens],
        "merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in whole["model"]["merges"]],
        "bos_token_id": vocabulary["<|bos|>"],
        "eos_token_id": vocabulary["<|im_end|>"],
        "padding_token_id": vocabulary["<|pad|>"],
    }


def test_byte_level_ids_are_those_of_the_original(tmp_path):
    ours = tokenizer_of(write(tmp_path / "x.gguf", **demo_values(), chat_template="{{ bos_token }}"), tmp_path / "t")
    theirs = load_tokenizer(demo_source("target").path)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.has_chat_template
    assert ours.vocabulary() == theirs.vocabulary()


def sentencepiece(*, gemma: bool) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer trained on the texts, and its values as the converter writes them."""
    special = ["<unk>", "<s>", "</s>", "<turn>"]
    base = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps if gemma else [normalizers.Prepend("▁"), *steps])
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=base, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS[:4] for _ in range(3)], trainer)
    whole = json.loads(tokenizer.to_str())
    vocabulary, merges = whole["model"]["vocab"], [tuple(merge) for merge in whole["model"]["merges"]]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    rank = {left + right: index for index, (left, right) in enumerate(merges)}
    whole["added_tokens"] = [each for each in whole["added_tokens"] if each["content"] in special]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(whole))
    strip = [] if gemma else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = {**dict.fromkeys(special, 3), "<unk>": 2}
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(-rank.get(token, 0)) for token in tokens],
        "token_type": [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return tokenizer, values


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sentencepiece_ids_are_those_of_the_original(arch, tmp_path):
    theirs, values = sentencepiece(gemma=arch == "gemma3")
    ours = tokenizer_of(write(tmp_path / "x.gguf", arch, **values), tmp_path / "t")
    for text in [*TEXTS, "a<turn>b", "<s>x</s>"]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        ids = ours.encode(text)
        assert ids == expected, text
        assert ours.decode(ids) == theirs.decode(expected)
        assert ours.encode(text, add_special_tokens=True) == [1, *expected]


def test_gemma_4_merges_as_its_file_says_and_adds_no_token(tmp_path):
    theirs, values = sentencepiece(gemma=True)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    values |= {"model": "gemma4", "merges": [" ".join(merge) for merge in merges], "add_bos_token": True}
    del values["scores"]
    ours = tokenizer_of(write(tmp_path / "x.gguf", "gemma4", **values), tmp_path / "t")
    for text in [*TEXTS, "a<turn>b"]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ours.encode(text, add_special_tokens=True) == expected, text
    del values["merges"]
    with pytest.raises(CorruptCheckpointError, match="no merges"):
        tokenizer_files(write(tmp_path / "y.gguf", "gemma4", **values))


def test_splits_are_those_of_transformers():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if not hasattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS"):
        pytest.skip("this version of transformers keeps its splits elsewhere")
    shared = PRE_TOKENIZERS.keys() & mapping.GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert len(shared) > 12
    for name in shared:
        assert PRE_TOKENIZERS[name].splits == (mapping.GGUF_PRE_TOKENIZER_SPLITS[name],), name


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"pre": "unheard-of"}, UnsupportedModelError, "pre-tokenizer 'unheard-of'"),
        ({"pre": 3}, UnsupportedModelError, "pre-tokenizer"),
        ({"model": "rwkv"}, UnsupportedModelError, "kind of tokenizer 'rwkv'"),
        ({"merges": "none"}, CorruptCheckpointError, "merges"),
        ({"merges": ["abc"]}, CorruptCheckpointError, "not a pair"),
        ({"token_type": [1]}, CorruptCheckpointError, "token types"),
    ],
)
def test_unknown_and_damaged_tokenizers_are_refused(values, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        tokenizer_files(write(tmp_path / "x.gguf", **{**demo_values(), **values}))
    assert caught.value.hint


def test_a_file_without_a_split_is_refused(tmp_path):
    values = demo_values()
    del values["pre"]
    with pytest.raises(UnsupportedModelError, match="does not say how it splits") as caught:
        tokenizer_files(write(tmp_path / "x.gguf", **values))
    assert "--tokenizer" in str(caught.value.hint)
