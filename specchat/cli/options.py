"""What was asked for: every flag checked, before anything slow begins."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specchat.chat.settings import MAX_SEED, whole
from specchat.errors import InvalidSizeError, UsageError
from specchat.records.chat import Overflow
from specchat.records.generation import Sampling
from specchat.records.model import DTYPE_BYTES, QUANTS, Dtype, Quant
from specchat.units import parse_size

if TYPE_CHECKING:
    from specchat.chat.transcript import Saved
    from specchat.models.checkpoint.generation_config import GenerationDefaults

DTYPES: tuple[Literal["auto"] | Dtype, ...] = ("auto", *DTYPE_BYTES)
OVERFLOWS: tuple[Overflow, ...] = ("stop", "drop-oldest")


@dataclass(frozen=True)
class SamplingFlags:
    """Settings of sampling as chosen; None where the model's own holds."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class ModelOptions:
    """What every command can be told of models, memory and device, checked.

    Attributes:
        model: MODEL, or None if it was left out.
        draft: a model, or one of auto, none, self, retrieval.
        vram_bytes: --vram in bytes, or None for what is free.
        ram_bytes: --ram in bytes, or None for what is free.
        slots: buffers for streamed layers, or None; only a sweep of `bench` sets it.
        tree_budget: None is auto.
        quant: what the target's matrices are stored in.
        draft_quant: likewise for the draft.
        seed: None is the command's own choice.
    """

    model: str | None = None
    draft: str = "auto"
    device: str = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    slots: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    dtype: Literal["auto"] | Dtype = "auto"
    quant: Literal["auto"] | Quant = "auto"
    draft_quant: Literal["auto"] | Quant = "auto"
    seed: int | None = None
    offline: bool = False
    yes: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class RunOptions:
    """Everything `specchat run` can be told, checked.

    Attributes:
        models: which models, and what they may take.
        prompt: PROMPT, or None.
        system: the text itself, read from its file if it was one.
        think: switch of the template's thinking, or None to leave it alone.
        resume: the session that goes on, or None for a new one.
        session_id: the name of the session, or None to find one if the chat is to be saved.
        saves: whether chats are saved.
        keeps_history: whether typed lines are remembered.
        raw: show answers as they are, without Markdown.
        sources: where settings come from, by their names in config.toml.
    """

    models: ModelOptions
    prompt: str | None = None
    sampling: SamplingFlags = SamplingFlags()
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    system: str | None = None
    think: bool | None = None
    overflow: Overflow = "stop"
    base: bool = False
    json: bool = False
    json_stream: bool = False
    plan: bool = False
    verbose: bool = False
    raw: bool = False
    resume: "Saved | None" = None
    session_id: str | None = None
    saves: bool = True
    keeps_history: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)


def check_combination(options: RunOptions) -> RunOptions:
    """Refuses flags that contradict each other.

    Raises:
        UsageError: two of them do.
    """
    has_system = options.system is not None and options.sources.get("system", "--system").startswith("--")
    pairs = (
        ("--json", options.json, "--json-stream", options.json_stream),
        ("--plan", options.plan, "--json-stream", options.json_stream),
        ("--quiet", options.models.quiet, "--verbose", options.verbose),
        ("--base", options.base, "--system", has_system),
    )
    for first, is_first, second, is_second in pairs:
        if is_first and is_second:
            raise UsageError(f"{first} and {second} cannot be combined", hint=f"leave {first} or {second} out")
    return options


# --- single flags ------------------------------------------------------------------------------------------------


def seed(text: str | None) -> int | None:
    """A seed that fits the generator's key."""
    return whole("--seed", text, 0, MAX_SEED)


def random_seed() -> int:
    """A seed for runs that name none; short enough to be typed again."""
    return secrets.randbits(32)


def size(name: str, text: str) -> int:
    """A SIZE in bytes."""
    try:
        return parse_size(text)
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{name}: {error.message}", error.hint) from error


def context(name: str, text: str) -> int | None:
    """Tokens of the context."""
    return whole(name, text, 1)


def tree_budget(name: str, text: str) -> int | None:
    """Draft nodes per tree, or None for auto."""
    if text == "auto":
        return None
    if text == "0":
        raise UsageError(f"{name} must be auto or at least 1, not 0", hint="--draft none drafts nothing")
    return whole(name, text, 1)


def dtype(name: str, text: str) -> Literal["auto"] | Dtype:
    """A dtype's name."""
    for known in DTYPES:
        if text == known:
            return known
    raise UsageError(f"{name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not '{text}'")


def quant(name: str, text: str) -> Literal["auto"] | Quant:
    """What a model's matrices are to be stored in."""
    if text == "auto":
        return "auto"
    for known in QUANTS:
        if text == known:
            return known
    raise UsageError(f"{name} must be auto, {', '.join(QUANTS[:-1])} or {QUANTS[-1]}, not '{text}'")


def device(name: str, text: str) -> str:
    """A device's name; whether it is there is found out later."""
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdecimal() and index.isascii()):
        return text
    raise UsageError(f"{name} must be auto, cpu, cuda or cuda:N, not '{text}'")


def overflow(name: str, text: str) -> Overflow:
    """What becomes of a chat that fills its context."""
    for known in OVERFLOWS:
        if text == known:
            return known
    raise UsageError(f"{name} must be {' or '.join(OVERFLOWS)}, not '{text}'")


def system_prompt(name: str, text: str) -> str:
    """The system prompt, from a file when it starts with @."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} cannot read {text[1:] or 'a file without a name'}: {reason}") from error


def stop_strings(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; an empty one would stop everywhere."""
    if not all(texts):
        raise UsageError(f"{name} must not be empty")
    return tuple(texts)


# --- what holds in the end ---------------------------------------------------------------------------------------


def resolve_sampling(flags: SamplingFlags, defaults: "GenerationDefaults", seed: int) -> Sampling:
    """What the answer is drawn with.

    A choice of the user's comes before the model's own generation_config, and that before greedy. A model whose config
    does not ask for sampling is greedy, whatever else it says there; the repetition penalty holds either way, as in
    transformers.

    Args:
        flags: as chosen.
        defaults: the model's.
        seed: keys the draws.
    """
    samples = bool(defaults.do_sample)
    return Sampling(
        temperature=_first(flags.temperature, _first(defaults.temperature, None, 1.0) if samples else None, 0.0),
        top_k=int(_first(flags.top_k, defaults.top_k if samples else None, 0)),
        top_p=_first(flags.top_p, defaults.top_p if samples else None, 1.0),
        min_p=_first(flags.min_p, defaults.min_p if samples else None, 0.0),
        repetition_penalty=_first(flags.repetition_penalty, defaults.repetition_penalty, 1.0),
        seed=seed,
    )


def sampling_sources(sources: Mapping[str, str], defaults: "GenerationDefaults") -> dict[str, str]:
    """Where each setting of answers comes from, the model's own included; what is missing is a default."""
    if "seed" not in sources:
        sources = {**sources, "seed": "random"}
    names = ("top_k", "top_p", "min_p") if defaults.do_sample else ()
    found = {name for name in (*names, "repetition_penalty") if getattr(defaults, name) is not None}
    if defaults.do_sample:
        found.add("temperature")
    return {**dict.fromkeys(found, "the model's generation_config.json"), **sources}


def without_effect(sampling: Sampling, sources: Mapping[str, str]) -> list[str]:
    """What to say of flags that change nothing."""
    if not sampling.greedy:
        return []
    flags = [sources[name] for name in ("top_p", "top_k", "min_p") if sources.get(name, "").startswith("--")]
    return [f"{flag} has no effect: the temperature is 0 (greedy); --temperature T above 0 samples" for flag in flags]


def _first(flag: float | None, default: float | None, fallback: float) -> float:
    if flag is not None:
        return flag
    return fallback if default is None else default
