"""tokenizer.json decides, whatever class tokenizer_config.json or the model type names."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from specchat.models.hf.tokenizer import load_tokenizer

TEXTS = ["Hello world", " Hello  world ", "héllo\n\n\tWORLD 123", "<s>a</s> b<x>c", "ﬁ ½ e\u0301", "", " "]
CLASSES = [
    "BertTokenizer",
    "CodeLlamaTokenizerFast",
    "CohereTokenizerFast",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "NoSuchTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2TokenizerFast",
    "T5Tokenizer",
    "TokenizersBackend",
    None,
]


@pytest.fixture(params=["bytes", "spaces"])
def folder(request, tmp_path: Path) -> Path:
    """A model with a tokenizer of no family: lower case, one merge, special tokens with flags."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁"})
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet, "lo"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("l", "o")], unk_token="<s>"))
    backend.normalizer = normalizers.Lowercase()
    if request.param == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def declare(folder: Path, name: str | None, kind: str, **more: object) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_prefix_space": True, "legacy": True}
    config = tokens | more | ({} if name is None else {"tokenizer_class": name})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


def check_equal(folder: Path) -> None:
    ours, plain = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours.vocabulary() == plain.get_vocab()
    assert json.loads(ours.backend.to_str()) == json.loads(plain.to_str())
    for text in TEXTS:
        for special in (False, True):
            ids = plain.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids) == plain.decode(ids)
            assert ours.decode(ids, skip_special_tokens=False) == plain.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("name", CLASSES)
def test_classes_overrule_nothing(folder: Path, name: str | None, kind: str):
    declare(folder, name, kind)
    check_equal(folder)
    assert load_tokenizer(folder).eos_token_id == 1


def test_transformers_own_class_would_differ(folder: Path):
    """Otherwise the tests above show nothing."""
    from transformers import AutoTokenizer

    declare(folder, "GemmaTokenizer", "gemma3_text")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert any(theirs(text, add_special_tokens=False)["input_ids"] != plain.encode(text).ids[1:-1] for text in TEXTS)


def test_lists_of_tokens_keep_the_flags_of_the_file(folder: Path):
    listed = {"0": {"content": "<s>", "special": False}, "300": {"content": "<x>", "lstrip": False, "special": True}}
    declare(folder, "LlamaTokenizer", "llama", added_tokens_decoder=listed)
    check_equal(folder)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["<x>", {"content": "</s>"}]})
    )
    declare(folder, "LlamaTokenizer", "llama")
    check_equal(folder)


def test_tokens_that_only_the_configuration_names_are_added(folder: Path):
    declare(folder, None, "llama", additional_special_tokens=["<|im_end|>"], eos_token={"content": "<|im_end|>"})
    tokenizer = load_tokenizer(folder)
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.eos_token_id == size
    assert tokenizer.decode([size]) == ""


def test_limits_of_the_file_do_not_cut_prompts(folder: Path):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    declare(folder, None, "llama", model_max_length=4)
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("a much longer text")) == "a much longer text"
