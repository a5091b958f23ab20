"""The tokenizer's files, made from the metadata of a GGUF file without any library."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.gguf import GgufFile
from specchat.models.checkpoint.json_file import REDOWNLOAD
from specchat.models.gguf.metadata import Metadata
from specchat.models.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

HINT = "name a folder or a hub id with the model's own tokenizer: --tokenizer org/name"
_SPACE = "▁"
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of `tokenizer.ggml.token_type`
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(file: GgufFile) -> dict[str, str]:
    """Return the contents of the tokenizer's files, by name.

    Raises:
        UnsupportedModelError: a kind of tokenizer that specchat does not know.
        CorruptCheckpointError: missing or invalid values.
    """
    values = _Values(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(values)
    elif kind == "llama":
        parts = _sentencepiece(values, is_gemma=file.architecture.startswith("gemma"))
    elif kind == "gemma4":
        parts = _gemma4(values)
    else:
        _refuse(values, f"the kind of tokenizer '{kind}'")
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added_tokens(values), **parts}
    files = {
        "tokenizer.json": json.dumps(whole, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_settings(values), ensure_ascii=False),
    }
    template = file.metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if isinstance(template, str) else {})


class _Values:
    """The tokenizer's values in a file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.metadata = Metadata(file)
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int) if self._has("token_type") else [1] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            self.fail("the number of token types differs from the number of tokens")

    def scores(self) -> list[float]:
        """Return the rank of each token; higher is earlier."""
        scores: list[float] = self._list("scores", int, float)
        if len(scores) != len(self.tokens):
            self.fail("the number of scores differs from the number of tokens")
        return scores

    def merges(self) -> list[list[str]] | None:
        """Return pairs of tokens in the order of their merging; None if the file has none."""
        if not self._has("merges"):
            return None
        pairs = [merge.split(" ") for merge in self._list("merges", str)]
        if any(len(pair) != 2 for pair in pairs):
            self.fail("a merge is not a pair of tokens")
        return pairs

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.file.metadata.get(f"tokenizer.ggml.{name}", default)
        return value if isinstance(value, bool) else default

    def token(self, name: str) -> str | None:
        """Return a special token, such as "bos"; None if the file names none."""
        index = self.metadata.token_id(name)
        return self.tokens[index] if index is not None and 0 <= index < len(self.tokens) else None

    def fail(self, why: str) -> NoReturn:
        raise CorruptCheckpointError(f"{self.file.files[0]} has an invalid tokenizer: {why}", hint=REDOWNLOAD)

    def _has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.file.metadata

    def _list(self, name: str, *kinds: type) -> list[Any]:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value or not isinstance(value[0], kinds):
            self.fail(f"tokenizer.ggml.{name} is missing or is no list")
        return value


def _refuse(values: _Values, what: str) -> NoReturn:
    raise UnsupportedModelError(f"{values.file.files[0]} has {what}, which specchat does not know", hint=HINT)


def _added_tokens(values: _Values) -> list[dict[str, Any]]:
    """Return the tokens that are recognised as wholes in a text; control tokens are special."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(values.tokens, values.types, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _settings(values: _Values) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": values.metadata.integer("context_length"),
        **{name: values.token(kind) for name, kind in _SPECIAL.items()},
    }


def _ends(values: _Values, *, adds_bos: bool) -> dict[str, Any]:
    """Return the step that adds the first and the last token of a text."""
    bos = values.token("bos") if values.flag("add_bos_token", adds_bos) else None
    eos = values.token("eos") if values.flag("add_eos_token", False) else None
    ids = {"bos": values.metadata.token_id("bos"), "eos": values.metadata.token_id("eos")}
    special = {
        token: {"id": token, "ids": [ids[name]], "tokens": [token]}
        for name, token in (("bos", bos), ("eos", eos))
        if token
    }

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": sequence, "type_id": type_id}}
        before = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        after = [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else []
        return [*before, inner, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
        **more,
    }


def _byte_level(values: _Values) -> dict[str, Any]:
    """Return a tokenizer that merges bytes."""
    name = values.file.metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        _refuse(
            values,
            "a tokenizer that does not say how it splits text" if name is None else f"the pre-tokenizer '{name}'",
        )
    split: PreTokenizer = PRE_TOKENIZERS[str(name)]
    merges = values.merges()
    if merges is None:
        values.fail("it has no merges")
    return {
        "normalizer": split.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split.steps},
        "post_processor": _ends(values, adds_bos=split.adds_bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(values.tokens, merges, ignore_merges=split.ignores_merges),
    }


def _sentencepiece(values: _Values, *, is_gemma: bool) -> dict[str, Any]:
    """Return a tokenizer that merges characters, and falls back on bytes."""
    tokens = values.tokens
    if is_gemma:
        # Tokens of several spaces are stored as spaces. Scores do not follow the order of merging, but indices do.
        tokens = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        ranks = [-float(index) for index in range(len(tokens))]
    else:
        ranks = values.scores()
    merges = values.merges() or _merges_of({token: index for index, token in enumerate(tokens)}, ranks)
    has_prefix = values.flag("add_space_prefix", not is_gemma)
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": split if is_gemma else None,
        "post_processor": _ends(values, adds_bos=True),
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(tokens, merges, unk_token=values.token("unknown"), fuse_unk=True, byte_fallback=True),
    }


def _gemma4(values: _Values) -> dict[str, Any]:
    """Return the tokenizer of Gemma 4, whose merges are in the file.

    The file says that texts begin with a special token, but the model's own tokenizer leaves that to the chat template.
    """
    if values.merges() is None:
        values.fail("it has no merges")
    return _sentencepiece(values, is_gemma=True) | {"post_processor": None}


def _merges_of(vocabulary: Mapping[str, int], ranks: Sequence[float]) -> list[list[str]]:
    """Return the merges that a vocabulary implies: all splits of its tokens into tokens, the best token first."""
    found = []
    for token, index in vocabulary.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(ranks[index], left, right) for left, right in known]
    found.sort(key=lambda each: (each[0], len(each[1]), len(each[2])), reverse=True)
    return [[left, right] for _, left, right in found]
