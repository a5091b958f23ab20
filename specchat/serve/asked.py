"""What a client asks for: the bodies of OpenAI's chat completions and completions, read and checked.

Fields that are not known are ignored, as OpenAI's own servers do. Fields that would change the answer in a way this
server cannot are refused, unless their value asks for nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from specchat.chat.settings import KINDS, MAX_SEED
from specchat.errors import UsageError
from specchat.loading.sampling import SamplingChoices
from specchat.records.chat import Message
from specchat.serve.errors import ApiError, missing, unsupported, wrong_type, wrong_value
from specchat.serve.fields import Fields, checked_text, fields_of

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
}
_REFUSED = {
    "tools": "tools are not supported",
    "functions": "functions are not supported",
    "logit_bias": "logit_bias is not supported",
    "top_logprobs": "log probabilities are not supported",
    "audio": "audio is not supported: this server writes text",
    "web_search_options": "web search is not supported",
    "suffix": "suffix is not supported: this server only continues the prompt",
    "echo": "echo is not supported: the answer never repeats the prompt",
}
_ZERO_ONLY = ("presence_penalty", "frequency_penalty")
_ONE_ONLY = ("n", "best_of")
_MOST_STOPS = 32
# A lower temperature draws the likeliest token always, and would overflow the scores.
_LEAST_TEMPERATURE = 1e-4
_NO_LIMIT = {"top_k": 0, "max_tokens": None}
_LIMITS = {"temperature": (0.0, 100.0), "repetition_penalty": (0.01, 100.0)}


@dataclass(frozen=True)
class Asked:
    """A request of a client.

    Attributes:
        model: name of the model, or None.
        prompt: messages of a chat, or a text or token ids to continue.
        sampling: sampling values of the client.
        seed: seed of the draws, or None.
        max_tokens: most tokens of the answer, or None.
        stops: texts that end the answer.
        streams: whether the answer is sent while it is written.
        includes_usage: whether a stream ends with the token counts.
        thinking: value of the chat template's thinking switch, or None.
    """

    model: str | None
    prompt: tuple[Message, ...] | str | tuple[int, ...]
    sampling: SamplingChoices = field(default_factory=SamplingChoices)
    seed: int | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    streams: bool = False
    includes_usage: bool = False
    thinking: bool | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a chat."""
        return isinstance(self.prompt, tuple) and isinstance(self.prompt[0], Message)

    @property
    def prompt_field(self) -> str:
        """Name of the field of the prompt."""
        return "messages" if self.is_chat else "prompt"


def read_object(body: bytes) -> Fields:
    """Parse a body.

    Raises:
        ApiError: the body is not a JSON object.
    """
    try:
        values = json.loads(body)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", "invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from error
    return fields_of("", values)


def read_chat(fields: Fields) -> Asked:
    """Return the request in a body of /v1/chat/completions.

    Raises:
        ApiError: a field is missing, has a wrong type or value, or asks for what this server does not do.
    """
    if fields.flag("logprobs"):
        raise unsupported("logprobs", "log probabilities are not supported")
    messages = fields.required("messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", "a list of messages")
    if not messages:
        raise wrong_value("messages", "messages must have at least one message")
    return _read(fields, tuple(_message(fields_of(f"messages[{i}]", each)) for i, each in enumerate(messages)))


def read_completion(fields: Fields) -> Asked:
    """Return the request in a body of /v1/completions.

    Raises:
        ApiError: a field is missing, has a wrong type or value, or asks for what this server does not do.
    """
    if fields.get("logprobs") is not None and fields.get("logprobs") is not False:  # a count here; 0 asks for some, too
        raise unsupported("logprobs", "log probabilities are not supported")
    return _read(fields, _prompt(fields.required("prompt")))


def _read(fields: Fields, prompt: tuple[Message, ...] | str | tuple[int, ...]) -> Asked:
    _check_refused(fields)
    return Asked(
        model=fields.text("model"),
        prompt=prompt,
        sampling=_sampling(fields),
        seed=_seed(fields),
        max_tokens=_max_tokens(fields),
        stops=_stops(fields),
        streams=bool(fields.flag("stream")),
        includes_usage=bool(fields.inner("stream_options").flag("include_usage")),
        thinking=_thinking(fields),
    )


def _check_refused(fields: Fields) -> None:
    """Refuse what would change the answer in a way that this server cannot."""
    for name, message in _REFUSED.items():
        if fields.get(name):
            raise unsupported(name, message)
    for name in _ZERO_ONLY:
        if fields.number(name):
            raise unsupported(name, f"{name} is not supported; use repetition_penalty")
    for name in _ONE_ONLY:
        number = fields.whole(name)
        if number is not None and number != 1:
            raise unsupported(name, f"{name} must be 1: a request gets one answer")
    if fields.inner("response_format").get("type") not in (None, "text"):
        raise unsupported("response_format", "response_format must be text: this server does not constrain answers")
    if fields.get("modalities") not in (None, ["text"]):
        raise unsupported("modalities", 'modalities must be ["text"]: this server writes text')


# --- prompts ---------------------------------------------------------------------------------------------------------


def _message(fields: Fields) -> Message:
    role = fields.required("role")
    if role in ("tool", "function") or fields.get("tool_calls") or fields.get("function_call"):
        raise unsupported(fields.path("role"), "tools are not supported, and neither are their messages")
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise wrong_value(fields.path("role"), f"{fields.path('role')} must be one of {known}")
    text = _content(fields.path("content"), fields.required("content"))
    reasoning = fields.text("reasoning_content") if role == "assistant" else None
    return Message(_ROLES[role], text, reasoning or None)


def _content(path: str, value: Any) -> str:
    """Return the text of a message, which is a string or a list of parts."""
    if isinstance(value, str):
        return checked_text(path, value)
    if not isinstance(value, list):
        raise wrong_type(path, "a string or a list of parts")
    return "\n".join(_part(fields_of(f"{path}[{i}]", each)) for i, each in enumerate(value))


def _part(fields: Fields) -> str:
    kind = fields.required("type")
    if kind != "text":
        raise unsupported(
            fields.path("type"), f"{fields.path('type')} must be text: this server reads no images or sound"
        )
    if (text := fields.text("text")) is None:
        raise missing(fields.path("text"))
    return text


def _prompt(value: Any) -> str | tuple[int, ...]:
    """Return the prompt of a completion: a text, token ids, or a list of one of them."""
    if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
        if len(value) > 1:
            raise unsupported("prompt", "prompt must be a single prompt: a request gets one answer")
        value = value[0]
    if not value and isinstance(value, str | list):
        raise wrong_value("prompt", "prompt must not be empty")
    if isinstance(value, str):
        return checked_text("prompt", value)
    if not isinstance(value, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        raise wrong_type("prompt", "a string or a list of token ids")
    return tuple(value)


# --- settings of the answer ------------------------------------------------------------------------------------------


def _sampling(fields: Fields) -> SamplingChoices:
    top_k = _setting(fields, "top_k", "top_k")
    penalty = "repetition_penalty" if fields.get("repetition_penalty") is not None else "repeat_penalty"
    temperature = _setting(fields, "temperature", "temperature")
    if temperature is not None and temperature < _LEAST_TEMPERATURE:
        temperature = 0.0
    return SamplingChoices(
        temperature=temperature,
        top_p=_setting(fields, "top_p", "top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=_setting(fields, "min_p", "min_p"),
        repetition_penalty=_setting(fields, penalty, "repetition_penalty"),
    )


def _setting(fields: Fields, name: str, kind: str) -> float | int | None:
    """Return a setting with the limits of the command line; -1 is other servers' word for no limit."""
    value = fields.number(name)
    if value == -1 and kind in _NO_LIMIT:
        return _NO_LIMIT[kind]
    if value is None:
        return None
    least, most = _LIMITS.get(kind, (-math.inf, math.inf))
    try:
        parsed = KINDS[kind].parse(name, repr(value))
    except UsageError as error:
        raise wrong_value(name, error.message) from error
    if not least <= value <= most:
        raise wrong_value(name, f"{name} must be from {least:g} to {most:g}, not {value:g}")
    return parsed


def _seed(fields: Fields) -> int | None:
    """Return a seed of our range; -1 is other servers' word for a random one."""
    seed = fields.whole("seed")
    return None if seed in (None, -1) else int(seed) % (MAX_SEED + 1)


def _max_tokens(fields: Fields) -> int | None:
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    most = _setting(fields, name, "max_tokens")
    return None if most is None else int(most)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", "a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise wrong_value("stop", f"stop must have at most {_MOST_STOPS} strings")
    texts = tuple(checked_text("stop", each) for each in stops)
    if not all(texts):
        raise wrong_value("stop", "stop must not have an empty string")
    return texts


def _thinking(fields: Fields) -> bool | None:
    """Return the thinking switch, in the form of vLLM and llama.cpp's server."""
    switches = fields.inner("chat_template_kwargs")
    found = switches.flag("enable_thinking")
    return switches.flag("thinking") if found is None else found
