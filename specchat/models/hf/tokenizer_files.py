"""The files of a tokenizer: tokenizer.json as it stands, the special tokens, and the chat template.

transformers builds many tokenizers anew, by a class that belongs to the model type or that tokenizer_config.json names.
Such a class may add a prefix space, another normalizer or other special tokens. So specchat reads tokenizer.json by
itself, and uses transformers' classes only for folders without that file.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotFoundError,
    NotAvailableError,
    SpecchatError,
    is_lack_of_memory,
)
from specchat.models.checkpoint.json_file import parse_object, read_data, read_json, shown

_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_TOKENS = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_PROCESSOR_TEMPLATE = "chat_template.json"  # beside the processor of a multimodal model

_HINT = "download or copy the model's folder again"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_PARTS = {
    *("version", "truncation", "padding", "added_tokens", "normalizer"),
    *("pre_tokenizer", "post_processor", "decoder", "model"),
}
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")

# The longest templates have 30,000 characters; compiling takes a second per million.
_LONGEST_TEMPLATE = 1_000_000

# Vocabularies without a tokenizer.json.
_PLAIN = ("vocab.json", "vocab.txt", "tekken.json")
_BINARY = (".model", ".tiktoken")


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model's folder as an object of transformers, without remote code and the network.

    Raises:
        ModelNotFoundError: there is no tokenizer.
        CorruptCheckpointError: a file is damaged, or has values that mean nothing.
        NotAvailableError: the tokenizer needs a package that is not installed, or a newer one.
    """
    if not (folder / _FILE).is_file():
        return _from_other_files(folder)
    from transformers import PreTrainedTokenizerFast

    class Loaded(PreTrainedTokenizerFast):
        """A tokenizer around a given backend; transformers would copy the backend."""

        def __init__(self, **settings: Any) -> None:
            object.__setattr__(self, "_tokenizer", settings.pop("loaded"))
            super().__init__(**settings)

    backend = _backend(folder / _FILE)
    settings = _settings(folder, set(backend.get_vocab(with_added_tokens=True)))
    try:
        return Loaded(loaded=backend, **settings)
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        raise CorruptCheckpointError(
            f"{folder / _CONFIG} names special tokens that cannot be used: {_first_line(error)}", hint=_HINT
        ) from error


def _backend(file: Path) -> Any:
    from tokenizers import Tokenizer, __version__

    data = read_data(file)
    try:
        return Tokenizer.from_buffer(data)
    except BaseException as error:
        if not is_failure(error) or is_lack_of_memory(error):
            raise
        unknown = sorted(parse_object(data, str(file)).keys() - _PARTS)  # raises if the file is damaged
        reason = f"it has '{unknown[0]}'" if unknown else _first_line(error)
        raise NotAvailableError(
            f"{file} is not a tokenizer that tokenizers {__version__} reads: {reason}",
            hint="update the package tokenizers, or download the file again",
        ) from error


def _settings(folder: Path, known: set[str]) -> dict[str, Any]:
    """Return the arguments for transformers' tokenizer.

    Args:
        folder: folder of the model.
        known: tokens of tokenizer.json, which keep the flags that they have there.
    """
    config, tokens = _optional(folder / _CONFIG), _optional(folder / _TOKENS)
    listed = _objects(config, "added_tokens_decoder")
    declared = config if listed else config | tokens  # the list replaces the older file, as in transformers
    settings: dict[str, Any] = {
        name: _token(name, value)
        for name, value in declared.items()
        if name in _NAMED or (name.endswith("_token") and isinstance(value, str))
    }
    settings["extra_special_tokens"] = next((found for name in _EXTRA if (found := _extra(declared, name))), None)
    added = {int(number): _token("added_tokens_decoder", token) for number, token in listed.items()}
    settings["added_tokens_decoder"] = {
        number: token for number, token in added.items() if token is not None and str(token) not in known
    }
    settings["chat_template"] = _chat_template(folder, config)
    settings["response_template"] = _objects(config, "response_template") or None
    if isinstance(config.get("split_special_tokens"), bool):
        settings["split_special_tokens"] = config["split_special_tokens"]
    return settings


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or several by name; None if there is none."""
    found = _declared_template(folder, config)
    texts = [found] if isinstance(found, str) else list((found or {}).values())
    if any(len(text) > _LONGEST_TEMPLATE for text in texts):
        raise CorruptCheckpointError(
            f"the chat template in {folder} is longer than {_LONGEST_TEMPLATE:,} characters", hint=_HINT
        )
    return found


def _declared_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    if (folder / _TEMPLATE).is_file():
        try:
            return read_data(folder / _TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise CorruptCheckpointError(f"{folder / _TEMPLATE} is not UTF-8 text", hint=_HINT) from error
    found = config.get("chat_template")
    if found is None:
        found = _optional(folder / _PROCESSOR_TEMPLATE).get("chat_template")
    if found is None or isinstance(found, str):
        return found
    pairs = list(found.items()) if isinstance(found, dict) else []
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        pairs = [(each.get("name"), each.get("template")) for each in found]
    if not pairs or not all(isinstance(each, str) for pair in pairs for each in pair):
        _fail("chat_template", found, "a template or a list of named templates")
    return dict(pairs)


def _extra(declared: Mapping[str, Any], name: str) -> "list[Any] | dict[str, Any] | None":
    value = declared.get(name)
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: _token(name, each) for key, each in value.items() if each is not None}
    if not isinstance(value, list):
        _fail(name, value, "a list of tokens")
    return [_token(name, each) for each in value if each is not None]


def _token(name: str, value: object) -> Any:
    """Return a token as text or with its flags; None if it is null.

    Raises:
        CorruptCheckpointError: the value is no token.
    """
    from tokenizers import AddedToken

    if value is None or isinstance(value, str):
        return value
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(content, str):
        _fail(name, value, "a token")
    flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
    return AddedToken(content, **flags, special=bool(value.get("special", True)))


def _objects(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object in an object; empty if it is null or missing."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        _fail(name, value, "an object")
    if name == "added_tokens_decoder" and not all(key.isdecimal() for key in value or ()):
        _fail(name, value, "an object of tokens by number")
    return value or {}


def _fail(name: str, value: object, wanted: str) -> NoReturn:
    raise CorruptCheckpointError(f"{_CONFIG}: {name} is {shown(value)}, not {wanted}", hint=_HINT)


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


# --- folders without tokenizer.json ------------------------------------------------------------------------------


def _from_other_files(folder: Path) -> Any:
    """Let transformers build the tokenizer from a vocabulary."""
    from transformers import AutoTokenizer

    _check_packages(folder, sorted(path.name for path in folder.iterdir() if path.is_file()))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if isinstance(error, SpecchatError) or is_lack_of_memory(error):
            raise
        raise CorruptCheckpointError(
            f"cannot read the tokenizer in {folder}: {_first_line(error)}", hint=_HINT
        ) from error


def _check_packages(folder: Path, names: Iterable[str]) -> None:
    """Check that a vocabulary exists, and that the package that reads it is installed."""
    if any(name in _PLAIN for name in names):
        return
    binary = next((name for name in names if name.endswith(_BINARY)), None)
    if binary is None:
        raise ModelNotFoundError(
            f"{folder} has no tokenizer ({_FILE})", hint=f"copy {_FILE} and {_CONFIG} from the original model"
        )
    # A SentencePiece model is a protobuf message that begins with its list of pieces; tiktoken's files are text.
    is_sentencepiece = (folder / binary).read_bytes()[:1] == b"\n"
    packages = ("sentencepiece", "protobuf") if is_sentencepiece else ("tiktoken",)
    if find_spec(packages[0]) is None:
        raise NotAvailableError(
            f"{folder} has its tokenizer only as {binary}, which needs the package {packages[0]}",
            hint=f"run pip install {' '.join(packages)}, or copy {_FILE} from a converted model",
        )


def is_failure(error: BaseException) -> bool:
    """Return whether a tokenizer failed: by an error, or by a panic in Rust, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "transformers cannot read its files")
