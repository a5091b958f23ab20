"""Options of the commands. Every value is checked before slow work begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from specchat.chat.files import read_text
from specchat.chat.settings import MAX_SEED, whole
from specchat.errors import InvalidSizeError, UsageError
from specchat.files import read_given
from specchat.loading.devices import is_device, on_named_devices, parse_devices
from specchat.loading.request import ModelRequest
from specchat.loading.sampling import SamplingChoices
from specchat.loading.tokens import parse_workers
from specchat.paths import user_path
from specchat.records.chat import Overflow
from specchat.records.generation import Sampling
from specchat.records.model import DTYPE_BYTES, QUANTS, Dtype, Quant
from specchat.records.plan import DeviceChoice, PlanChoices
from specchat.units import parse_size

if TYPE_CHECKING:
    from specchat.chat.transcript import Saved
    from specchat.models.checkpoint.generation_config import GenerationDefaults

DTYPES: tuple[Literal["auto"] | Dtype, ...] = ("auto", *DTYPE_BYTES)


@dataclass(frozen=True)
class RunOptions:
    """Checked options of `specchat run`.

    Attributes:
        models: options about models, memory and device.
        seed: seed of the sampling, or None for a random one.
        yes: whether to download without asking.
        quiet: whether only answers and errors are shown.
        prompt: the PROMPT argument, or None.
        system: text of the system prompt, already read from its file.
        think: value of the chat template's thinking switch, or None to keep the template's default.
        resume: saved chat to resume, or None for a new chat.
        session_id: name of the session; None makes a new name if the chat is saved.
        saves: whether the chat is saved.
        keeps_history: whether typed lines are saved.
        raw: whether answers are shown without Markdown layout.
        files: names and texts of the files that go with the first message.
        vi: whether the keys of the prompt are those of vi.
        bell: whether the terminal's bell rings after a slow answer.
        aliases: models by the names that the user gave them.
        prompts: file of prompts to answer, or None.
        results: file of their results, or None.
        batch: number of answers that share a pass, or None to let the planner choose.
        sources: origin of each setting, by its name in config.toml.
    """

    models: ModelRequest
    seed: int | None = None
    yes: bool = False
    quiet: bool = False
    prompt: str | None = None
    sampling: SamplingChoices = field(default_factory=SamplingChoices)
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
    files: tuple[tuple[str, str], ...] = ()
    vi: bool = False
    bell: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    prompts: Path | None = None
    results: Path | None = None
    batch: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


def check_combination(options: RunOptions) -> RunOptions:
    """Refuse flags that contradict each other, and return the options unchanged.

    Raises:
        UsageError: two flags contradict each other.
    """
    has_prompts = options.prompts is not None
    has_system = options.system is not None and options.sources.get("system", "--system").startswith("--")
    pairs = (
        ("--json", options.json, "--json-stream", options.json_stream),
        ("--plan", options.plan, "--json-stream", options.json_stream),
        ("--quiet", options.quiet, "--verbose", options.verbose),
        ("--base", options.base, "--system", has_system),
        ("--prompts", has_prompts, "PROMPT", options.prompt is not None),
        ("--prompts", has_prompts, "--continue or --session", options.resume is not None or bool(options.session_id)),
        ("--prompts", has_prompts, "--json-stream", options.json_stream),
        ("--prompts", has_prompts, "--json", options.json and not options.plan),
    )
    for first, is_first, second, is_second in pairs:
        if is_first and is_second:
            raise UsageError(f"{first} and {second} cannot be combined", hint=f"leave {first} or {second} out")
    if has_prompts and options.results is None and not options.plan:
        raise UsageError("--prompts needs a file for the results", hint="add -o OUT.jsonl")
    if not has_prompts and options.results is not None:
        raise UsageError("-o is the file of the results of --prompts", hint="add --prompts IN.jsonl")
    if not has_prompts and options.batch is not None:
        raise UsageError("--batch is the number of answers of --prompts at once", hint="add --prompts IN.jsonl")
    return options


# --- single flags ------------------------------------------------------------------------------------------------


def seed(text: str | None) -> int | None:
    """Parse --seed; the limit is the size of the random generator's key."""
    return whole("--seed", text, 0, MAX_SEED)


def size(name: str, text: str) -> int:
    """Parse a SIZE and return bytes."""
    try:
        return parse_size(text)
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{name}: {error.message}", error.hint) from error


def context(name: str, text: str) -> int | None:
    """Parse a context length in tokens."""
    return whole(name, text, 1)


def tree_budget(name: str, text: str) -> int | None:
    """Parse a tree budget: draft nodes per tree, or None for auto."""
    if text == "auto":
        return None
    if text == "0":
        raise UsageError(f"{name} must be auto or at least 1, not 0", hint="use --draft none to decode without a draft")
    return whole(name, text, 1)


def batch(name: str, text: str | None) -> int | None:
    """Parse the number of answers that share a pass, or None for auto."""
    return None if text in (None, "auto") else whole(name, text, 1)


def port(name: str, text: str) -> int | None:
    """Parse a port; 0 takes a free one."""
    return whole(name, text, 0, 65535)


def parallel(name: str, text: str) -> int | None:
    """Parse the number of answers at once."""
    return whole(name, text, 1)


def api_key(name: str, text: str) -> str:
    """Check that a key can be sent in a header."""
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise UsageError(f"{name} must be printable ASCII characters, without spaces around them")
    return text


def dtype(name: str, text: str) -> Literal["auto"] | Dtype:
    """Check the name of a dtype."""
    for known in DTYPES:
        if text == known:
            return known
    raise UsageError(f"{name} must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not '{text}'")


def quant(name: str, text: str) -> Literal["auto"] | Quant:
    """Check the name of a quantization."""
    if text == "auto":
        return "auto"
    for known in QUANTS:
        if text == known:
            return known
    raise UsageError(f"{name} must be auto, {', '.join(QUANTS[:-1])} or {QUANTS[-1]}, not '{text}'")


def device(name: str, text: str) -> str:
    """Check the form of a device's name; whether the device exists is checked later."""
    if text == "auto" or is_device(text):
        return text
    raise UsageError(f"{name} must be auto, cpu, cuda or cuda:N, not '{text}'")


def devices(name: str, text: str) -> Literal["auto"] | tuple[DeviceChoice, ...]:
    """Parse a list of devices with memory budgets."""
    return parse_devices(name, text)


def workers(name: str, text: str) -> tuple[tuple[str, int], ...]:
    """Parse a list of the addresses of workers."""
    return parse_workers(name, text)


def system_prompt(name: str, text: str) -> str:
    """Return the system prompt; read text after @ from that file."""
    if not text.startswith("@"):
        return _utf8(name, text)
    try:
        return read_given(user_path(text[1:])).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} cannot read {text[1:] or 'a file without a name'}: {reason}") from error


def files(texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Read the files of --file and return their names and texts."""
    paths = [user_path(text) for text in texts or ()]
    return tuple((path.name, read_text(path)) for path in paths)


def stop_strings(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings; refuse an empty one, which would stop at once."""
    if not all(texts):
        raise UsageError(f"{name} must not be empty")
    return tuple(_utf8(name, text) for text in texts)


def _utf8(name: str, text: str) -> str:
    """Return a text; Python decodes invalid bytes of arguments to lone surrogates, which no file and no model takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8 text") from error
    return text


def on_devices(choices: PlanChoices, sources: Mapping[str, str]) -> PlanChoices:
    """Return choices with the device and the budget of the first device in --devices; a list of one becomes --device.

    Args:
        choices: choices with a device, a budget and a list of devices.
        sources: origin of each setting, by key.

    Raises:
        UsageError: a device and a list of devices were asked for by flags.
    """
    by_flag = [sources.get(key, "").startswith("--") for key in ("device", "devices")]
    if all(by_flag):
        raise UsageError("--device and --devices cannot be combined", hint="leave --device or --devices out")
    return on_named_devices(replace(choices, devices=()) if by_flag[0] else choices)


# --- effective settings ------------------------------------------------------------------------------------------


def sampling_sources(sources: Mapping[str, str], defaults: "GenerationDefaults") -> dict[str, str]:
    """Return the origin of each sampling setting, the model's own included; settings left out are defaults."""
    if "seed" not in sources:
        sources = {**sources, "seed": "random"}
    names = ("top_k", "top_p", "min_p") if defaults.do_sample else ()
    found = {name for name in (*names, "repetition_penalty") if getattr(defaults, name) is not None}
    if defaults.do_sample:
        found.add("temperature")
    return {**dict.fromkeys(found, "the model's generation_config.json"), **sources}


def without_effect(sampling: Sampling, sources: Mapping[str, str]) -> list[str]:
    """Return a warning for each flag that has no effect."""
    if not sampling.greedy:
        return []
    flags = [sources[name] for name in ("top_p", "top_k", "min_p") if sources.get(name, "").startswith("--")]
    return [
        f"{flag} has no effect: the temperature is 0 (greedy); use --temperature T above 0 to sample" for flag in flags
    ]
