"""Pre-tokenizers by their names in GGUF files (`tokenizer.ggml.pre`): how text is split before merges apply.

Expressions are those of the models' own tokenizers. A name that is missing here is refused: with another split, the
same text would get other tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """A way to split text.

    Attributes:
        splits: expressions that split the text one after another.
        is_gpt2: whether GPT-2's own expression splits the text last.
        composes: whether text is normalized first, so that accents are parts of letters (NFC).
        ignores_merges: whether a piece of text that is a token is never split.
        adds_bos: whether texts begin with the first token where the file does not say.
    """

    splits: tuple[str, ...] = ()
    is_gpt2: bool = False
    composes: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False

    @property
    def normalizer(self) -> dict[str, Any] | None:
        """The normalizer in tokenizer.json."""
        return {"type": "NFC"} if self.composes else None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps in tokenizer.json; the last one turns bytes into characters."""
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in self.splits
        ]
        return [
            *steps,
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": self.is_gpt2},
        ]


_GPT2 = PreTokenizer(is_gpt2=True)
_DIGITS = PreTokenizer((r"\p{N}",), is_gpt2=True)
_LLAMA_3 = PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)
_LIKE_LLAMA = PreTokenizer((_LLAMA3,))
_QWEN_2 = PreTokenizer((_QWEN2,), composes=True)
_LIKE_QWEN = PreTokenizer((_QWEN2,))
_O200K = PreTokenizer((_GPT4O,))
_DEEPSEEK = PreTokenizer(_DEEPSEEK3)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA_3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LIKE_LLAMA),
    "qwen2": _QWEN_2,
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), _LIKE_QWEN),
    "qwen35": PreTokenizer((_QWEN35,), composes=True),
    "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _O200K),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK),
}
