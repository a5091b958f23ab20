"""Settings from several places, and which of them holds: flag, session, environment, config.toml, in this order.

What none of them says is left to the model's generation_config.json and to defaults, further on.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from specchat.chat.settings import KINDS, suggestion
from specchat.cli import options
from specchat.errors import UsageError

# As it was written: a flag's or variable's text, or a value of TOML.
Raw = str | bool | tuple[str, ...]

ENVIRONMENT_PREFIX = "SPECCHAT_"
# Variables that are no settings of a chat.
_OTHER_VARIABLES = ("CONFIG", "CACHE_DIR", "STATE_DIR", "DEBUG")
_WORDS_FOR_YES = ("1", "true", "yes", "on")
_WORDS_FOR_NO = ("0", "false", "no", "off", "")
_ALIAS = re.compile(r"\w[\w.-]*", re.ASCII)
_NO_ALIASES = ("demo", "auto", "none", "self", "retrieval")


@dataclass(frozen=True)
class Key:
    """A setting that config.toml and the environment know, under the name of its flag with underscores.

    Attributes:
        name: as in config.toml.
        parse: (name for complaints, as written) -> value; raises UsageError.
    """

    name: str
    parse: Callable[[str, Any], Any]


@dataclass(frozen=True)
class Layer:
    """Settings from one place.

    Attributes:
        values: by key.
        name_of: key -> what to call the setting in complaints and in /info.
        is_parsed: the values are not as written but as they hold.
    """

    values: Mapping[str, Any]
    name_of: Callable[[str], str]
    is_parsed: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings that somebody has chosen.

    Attributes:
        values: by key.
        sources: where each came from.
        aliases: names that stand for models.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The value that holds, or `default` if nobody has chosen one."""
        return self.values.get(key, default)

    def model(self, key: str) -> str | None:
        """A model's name, with aliases replaced by what they stand for."""
        text = self.get(key)
        return None if text is None else self.aliases.get(text, text)


def _text(parse: Callable[[str, str], Any], name: str, raw: Any) -> Any:
    """Numbers of TOML are read as they are on the command line, so that both have the same limits."""
    if isinstance(raw, bool | tuple):
        raise UsageError(f"{name} must be a number or a text")
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
        raise UsageError(f"{name} must be a text or a list of texts")
    return options.stop_strings(name, (raw,) if isinstance(raw, str) else raw)


def _key(name: str, parse: Callable[[str, str], Any]) -> Key:
    return Key(name, partial(_text, parse))


def _as_it_is(_name: str, text: str) -> str:
    return text


# What every command can be told, besides `model` and `seed`, which mean something else to each.
SHARED_KEYS = (
    _key("draft", _as_it_is),
    _key("device", options.device),
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
    _key("overflow", options.overflow),
    Key("save", _flag),
    Key("history", _flag),
    Key("raw", _flag),
)


# --- places ------------------------------------------------------------------------------------------------------


def flags(given: Mapping[str, Raw | Sequence[str] | None]) -> Layer:
    """The command line; None is a flag that was not given."""
    values = {name: tuple(raw) if isinstance(raw, list) else raw for name, raw in given.items() if raw is not None}
    return Layer(values, lambda key: _flag_name(key, values[key]))


def _flag_name(key: str, raw: Any) -> str:
    if key == "model":
        return "MODEL"
    return ("--no-" if raw is False else "--") + key.replace("_", "-")


def environment() -> Layer:
    """Variables named like settings.

    Raises:
        UsageError: one is nearly named like a setting.
    """
    known = {key.name for key in RUN_KEYS}
    values: dict[str, str] = {}
    for variable, text in os.environ.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name == variable or name in _OTHER_VARIABLES:
            continue
        if name.lower() not in known:
            _refuse_unknown("the environment variable", variable, [ENVIRONMENT_PREFIX + k.upper() for k in known])
        values[name.lower()] = text
    return Layer(values, lambda key: ENVIRONMENT_PREFIX + key.upper())


def config_file(chosen: str | None) -> tuple[Layer, dict[str, str]]:
    """The settings and the aliases in config.toml; none of either if there is no such file and none was named.

    Args:
        chosen: --config, which comes before SPECCHAT_CONFIG, and that before the platform's folder for configuration.

    Raises:
        UsageError: the file that was named is missing, or a file makes no sense.
    """
    chosen = chosen or os.environ.get("SPECCHAT_CONFIG")
    path = Path(chosen).expanduser() if chosen else default_config_path()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if chosen:
            raise UsageError(f"there is no configuration file {path}") from error
        table = {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML's own, and bytes that are no text
        raise UsageError(f"{path} is not TOML: {error}") from error
    aliases = _aliases(path, table.pop("aliases", {}))
    known = [key.name for key in RUN_KEYS]
    values = {}
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in known:
            _refuse_unknown(f"{path} has a setting that does not exist:", name, [*known, "aliases"])
        values[key] = _raw(f"{name} in {path}", value)
    return Layer(values, lambda key: f"{key} in {path}"), aliases


def default_config_path() -> Path:
    """Where config.toml is looked for."""
    import platformdirs

    return Path(platformdirs.user_config_dir("specchat", appauthor=False)) / "config.toml"


def _aliases(path: Path, table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(model, str) for model in table.values()):
        raise UsageError(f"aliases in {path} must be a table of texts", hint='[aliases] and then big = "org/name"')
    for name in table:
        if name in _NO_ALIASES or not _ALIAS.fullmatch(name):
            raise UsageError(f"'{name}' in {path} cannot be an alias", hint="it means something already")
    return table


def _raw(name: str, value: Any) -> Raw:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise UsageError(f"{name} must be a number, a text or true or false")


def _refuse_unknown(what: str, name: str, known: Iterable[str]) -> None:
    raise UsageError(f"{what} {name}", hint=suggestion(name, sorted(known)))


# --- what holds --------------------------------------------------------------------------------------------------


def resolve(keys: Sequence[Key], layers: Sequence[Layer], aliases: Mapping[str, str]) -> Settings:
    """The first layer that has a setting decides it; every layer's values are checked all the same.

    Raises:
        UsageError: a value that its setting does not take.
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
