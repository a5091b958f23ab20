"""Settings from several sources, by precedence: flag, session, environment, config.toml.

Settings without a source come later from the model's generation_config.json or from defaults.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from specchat.chat.settings import KINDS, overflow, suggestion
from specchat.cli import options
from specchat.errors import UsageError
from specchat.files import read_regular
from specchat.loading.sampling import SamplingChoices
from specchat.paths import user_path

# A value before parsing: the text of a flag or variable, or a TOML value.
Raw = str | bool | tuple[str, ...]

ENVIRONMENT_PREFIX = "SPECCHAT_"
# Variables that are not settings.
_VARIABLES_HINT = "a variable is named like its option: SPECCHAT_VRAM for --vram"
_OTHER_VARIABLES = ("CONFIG", "CACHE_DIR", "STATE_DIR", "DEBUG", "TOKEN")
_WORDS_FOR_YES = ("1", "true", "yes", "on")
_WORDS_FOR_NO = ("0", "false", "no", "off", "")
_ALIAS = re.compile(r"\w[\w.-]*", re.ASCII)
_NO_ALIASES = ("demo", "auto", "none", "self", "mtp", "retrieval")


@dataclass(frozen=True)
class Key:
    """A setting of config.toml and the environment, named like its flag, with underscores.

    Attributes:
        name: name in config.toml.
        parse: function (name for error messages, raw value) -> parsed value; raises UsageError.
    """

    name: str
    parse: Callable[[str, Any], Any]


@dataclass(frozen=True)
class Layer:
    """Settings from one source.

    Attributes:
        values: values by key.
        name_of: maps a key to the name shown in error messages and in /info.
        is_parsed: whether the values are already parsed.
    """

    values: Mapping[str, Any]
    name_of: Callable[[str], str]
    is_parsed: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings that the user has chosen.

    Attributes:
        values: values by key.
        sources: origin of each value, by key.
        aliases: models by alias.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the chosen value, or `default` if there is none."""
        return self.values.get(key, default)

    def model(self, key: str) -> str | None:
        """Return the model that a setting names, with its alias resolved, or None."""
        text = self.get(key)
        return None if text is None else self.aliases.get(text, text)

    def sampling(self) -> SamplingChoices:
        """Return the chosen sampling values."""
        return SamplingChoices(**{each.name: self.get(each.name) for each in fields(SamplingChoices)})


def _text(parse: Callable[[str, str], Any], name: str, raw: Any) -> Any:
    """Parse a TOML number as the command line would, so that both have the same limits."""
    if isinstance(raw, bool | tuple):
        raise UsageError(f"{name} must be a number or a string")
    return parse(name, raw)


def _flag(name: str, raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.lower() if isinstance(raw, str) else None
    if word not in (*_WORDS_FOR_YES, *_WORDS_FOR_NO):
        raise UsageError(f"{name} must be true or false, not '{raw}'")
    return word in _WORDS_FOR_YES


def _texts(name: str, raw: Any) -> tuple[str, ...]:
    if isinstance(raw, bool):
        raise UsageError(f"{name} must be a string or a list of strings")
    return options.stop_strings(name, (raw,) if isinstance(raw, str) else raw)


def _key(name: str, parse: Callable[[str, str], Any]) -> Key:
    return Key(name, partial(_text, parse))


def _as_it_is(_name: str, text: str) -> str:
    return text


# Settings of every command, without `model` and `seed`, which differ from command to command.
SHARED_KEYS = (
    _key("draft", _as_it_is),
    _key("tokenizer", _as_it_is),
    _key("device", options.device),
    _key("devices", options.devices),
    _key("workers", options.workers),
    _key("token_file", _as_it_is),
    _key("vram", options.size),
    _key("ram", options.size),
    _key("ctx", options.context),
    _key("tree_budget", options.tree_budget),
    _key("dtype", options.dtype),
    _key("quant", options.quant),
    _key("draft_quant", options.quant),
    Key("offline", _flag),
)
RUN_KEYS = (
    _key("model", _as_it_is),
    *SHARED_KEYS,
    *(_key(kind.key, kind.parse) for kind in KINDS.values()),
    Key("stop", _texts),
    _key("system", options.system_prompt),
    Key("think", _flag),
    _key("overflow", overflow),
    Key("save", _flag),
    Key("history", _flag),
    Key("vi", _flag),
    Key("bell", _flag),
    Key("raw", _flag),
)
# Settings of the server besides those of an answer.
_SERVER_KEYS = (
    _key("host", _as_it_is),
    _key("port", options.port),
    _key("api_key", options.api_key),
    _key("parallel", options.parallel),
    Key("allow_origin", _texts),
)
SERVE_KEYS = (
    _key("model", _as_it_is),
    *SHARED_KEYS,
    *(_key(kind.key, kind.parse) for kind in KINDS.values()),
    Key("think", _flag),
    Key("save", _flag),
    *_SERVER_KEYS,
)
_ALL_NAMES = tuple(key.name for key in (*RUN_KEYS, *_SERVER_KEYS))


# --- sources -----------------------------------------------------------------------------------------------------


def flags(given: Mapping[str, Raw | Sequence[str] | None]) -> Layer:
    """Return the flags as a layer; None marks a flag that was not given."""
    values = {name: tuple(raw) if isinstance(raw, list) else raw for name, raw in given.items() if raw is not None}
    return Layer(values, lambda key: _flag_name(key, values[key]))


def _flag_name(key: str, raw: Any) -> str:
    if key == "model":
        return "MODEL"
    return ("--no-" if raw is False else "--") + key.replace("_", "-")


def environment() -> Layer:
    """Return the SPECCHAT_* variables as a layer.

    Raises:
        UsageError: a variable names no setting.
    """
    values: dict[str, str] = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or name in _OTHER_VARIABLES:
            continue
        if name.lower() not in _ALL_NAMES:
            close = difflib.get_close_matches(name.lower(), _ALL_NAMES, n=1)
            meant = f"did you mean {ENVIRONMENT_PREFIX}{close[0].upper()}?" if close else _VARIABLES_HINT
            raise UsageError(f"unknown environment variable {variable}", hint=meant)
        values[name.lower()] = text
    return Layer(values, lambda key: ENVIRONMENT_PREFIX + key.upper())


def config_file(chosen: str | None) -> tuple[Layer, dict[str, str]]:
    """Read the settings and the aliases of config.toml; return empty ones if the default file does not exist.

    Args:
        chosen: value of --config. It overrides SPECCHAT_CONFIG, which overrides the default path.

    Raises:
        UsageError: a named file is missing, or a file is invalid.
    """
    chosen = chosen or os.environ.get("SPECCHAT_CONFIG")
    path = user_path(chosen) if chosen else default_config_path()
    try:
        table = tomllib.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        if chosen:
            raise UsageError(f"the configuration file {path} does not exist") from error
        table = {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error
    except ValueError as error:  # invalid TOML or invalid UTF-8
        raise UsageError(f"{path} is not TOML: {error}") from error
    aliases = _aliases(path, table.pop("aliases", {}))
    values = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in _ALL_NAMES:
            _refuse_unknown(f"{path} has an unknown setting:", name, [*_ALL_NAMES, "aliases"])
        values[key] = _raw(f"{name} in {path}", value)
    return Layer(values, lambda key: f"{key} in {path}"), aliases


def default_config_path() -> Path:
    """Return the default path of config.toml."""
    import platformdirs

    return Path(platformdirs.user_config_dir("specchat", appauthor=False)) / "config.toml"


def _aliases(path: Path, table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(model, str) for model in table.values()):
        raise UsageError(
            f"aliases in {path} must be a table of strings", hint='write [aliases], and below it big = "org/name"'
        )
    for name in table:
        if name in _NO_ALIASES or not _ALIAS.fullmatch(name):
            raise UsageError(
                f"'{name}' in {path} cannot be an alias",
                hint="choose a word that has no other meaning, of letters, digits, - and .",
            )
    return table


def _raw(name: str, value: Any) -> Raw:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{name} must be a number, a string, a list of strings, true or false")


def _refuse_unknown(what: str, name: str, known: Iterable[str]) -> None:
    raise UsageError(f"{what} {name}", hint=suggestion(name, sorted(known)))


# --- precedence --------------------------------------------------------------------------------------------------


def resolve(keys: Sequence[Key], layers: Sequence[Layer], aliases: Mapping[str, str]) -> Settings:
    """Take each setting from the first layer that has it; check the values of all layers.

    Raises:
        UsageError: a value is invalid for its setting.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key in keys:
            if key.name not in layer.values:
                continue
            name, raw = layer.name_of(key.name), layer.values[key.name]
            value = raw if layer.is_parsed else key.parse(name, raw)
            if key.name not in values:
                values[key.name], sources[key.name] = value, name
    return Settings(values, sources, aliases)
