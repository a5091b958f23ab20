"""What was asked for: every flag checked, before anything slow begins."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specchat.chat.settings import MAX_SEED, number, whole
from specchat.config import Dtype, Sampling
from specchat.errors import InvalidSizeError, UsageError
from specchat.units import parse_size

if TYPE_CHECKING:
    from specchat.models.hf_compat import GenerationDefaults

DTYPES: tuple[Literal["auto"] | Dtype, ...] = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class SamplingFlags:
    """The sampling flags as given; None where the model's own setting holds."""

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
        tree_budget: None is auto.
        seed: None is the command's own choice.
    """

    model: str | None = None
    draft: str = "auto"
    device: str = "auto"
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    ctx: int | None = None
    tree_budget: int | None = None
    dtype: Literal["auto"] | Dtype = "auto"
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
    """

    models: ModelOptions
    prompt: str | None = None
    sampling: SamplingFlags = SamplingFlags()
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    system: str | None = None
    base: bool = False
    json: bool = False
    json_stream: bool = False
    plan: bool = False
    verbose: bool = False


def check_combination(options: RunOptions) -> RunOptions:
    """Refuses flags that contradict each other.

    Raises:
        UsageError: two of them do.
    """
    pairs = (
        ("--json", options.json, "--json-stream", options.json_stream),
        ("--plan", options.plan, "--json-stream", options.json_stream),
        ("--quiet", options.models.quiet, "--verbose", options.verbose),
        ("--base", options.base, "--system", options.system is not None),
    )
    for first, is_first, second, is_second in pairs:
        if is_first and is_second:
            raise UsageError(f"{first} and {second} cannot be combined", hint=f"leave {first} or {second} out")
    return options


# --- single flags ------------------------------------------------------------------------------------------------


def sampling_flags(
    *,
    temperature: str | None,
    top_p: str | None,
    top_k: str | None,
    min_p: str | None,
    repetition_penalty: str | None,
) -> SamplingFlags:
    """The sampling flags, in the ranges where they mean something."""
    return SamplingFlags(
        temperature=number("--temperature", temperature, lambda t: t >= 0, "from 0 (greedy) up"),
        top_p=number("--top-p", top_p, lambda p: 0 < p <= 1, "above 0 and at most 1"),
        top_k=whole("--top-k", top_k, 0),
        min_p=number("--min-p", min_p, lambda p: 0 <= p <= 1, "from 0 to 1"),
        repetition_penalty=number("--repetition-penalty", repetition_penalty, lambda r: r > 0, "above 0"),
    )


def seed(text: str | None) -> int | None:
    """A seed that fits the generator's key."""
    return whole("--seed", text, 0, MAX_SEED)


def random_seed() -> int:
    """A seed for runs that name none; short enough to be typed again."""
    return secrets.randbits(32)


def size(flag: str, text: str | None) -> int | None:
    """A SIZE in bytes."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{flag}: {error.message}", error.hint) from error


def tree_budget(text: str) -> int | None:
    """Draft nodes per tree, or None for auto."""
    if text == "auto":
        return None
    if text == "0":
        raise UsageError("--tree-budget must be auto or at least 1, not 0", hint="--draft none drafts nothing")
    return whole("--tree-budget", text, 1)


def dtype(text: str) -> Literal["auto"] | Dtype:
    """A dtype's name."""
    for name in DTYPES:
        if text == name:
            return name
    raise UsageError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not '{text}'")


def device(text: str) -> str:
    """A device's name; whether it is there is found out later."""
    kind, colon, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdecimal() and index.isascii()):
        return text
    raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not '{text}'")


def system_prompt(text: str | None) -> str | None:
    """The system prompt, from a file when it starts with @."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--system cannot read {text[1:] or 'a file without a name'}: {reason}") from error


def stop_strings(texts: list[str] | None) -> tuple[str, ...]:
    """The stop strings; an empty one would stop everywhere."""
    if texts and not all(texts):
        raise UsageError("--stop must not be empty")
    return tuple(texts or ())


# --- what holds in the end ---------------------------------------------------------------------------------------


def resolve_sampling(flags: SamplingFlags, defaults: "GenerationDefaults", seed: int) -> tuple[Sampling, list[str]]:
    """What the answer is drawn with, and what the user should know about it.

    A flag comes before the model's own generation_config, and that before greedy. A model whose config does not ask for
    sampling is greedy, whatever else it says there; the repetition penalty holds either way, as in transformers.

    Args:
        flags: as given.
        defaults: the model's.
        seed: keys the draws.
    """
    samples = bool(defaults.do_sample)
    penalty = _first(flags.repetition_penalty, defaults.repetition_penalty, 1.0)
    temperature = _first(flags.temperature, _first(defaults.temperature, None, 1.0) if samples else None, 0.0)
    if temperature == 0:
        return Sampling(repetition_penalty=penalty, seed=seed), _without_effect(flags)
    return (
        Sampling(
            temperature=temperature,
            top_k=int(_first(flags.top_k, defaults.top_k if samples else None, 0)),
            top_p=_first(flags.top_p, defaults.top_p if samples else None, 1.0),
            min_p=_first(flags.min_p, defaults.min_p if samples else None, 0.0),
            repetition_penalty=penalty,
            seed=seed,
        ),
        [],
    )


def _first(flag: float | None, default: float | None, fallback: float) -> float:
    if flag is not None:
        return flag
    return fallback if default is None else default


def _without_effect(flags: SamplingFlags) -> list[str]:
    given = (("--top-p", flags.top_p), ("--top-k", flags.top_k), ("--min-p", flags.min_p))
    return [
        f"{name} has no effect: the temperature is 0 (greedy); --temperature T above 0 samples"
        for name, value in given
        if value is not None
    ]
