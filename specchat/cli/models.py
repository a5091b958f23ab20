"""What `run` and `bench` do alike: find the models, plan for them, make their weights ready to stream."""

import os
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from specchat.cli.options import ModelOptions
from specchat.config import ModelSource, Plan
from specchat.errors import NotAvailableError, UsageError

if TYPE_CHECKING:
    from specchat.models.catalog import ModelRef
    from specchat.models.hf_compat import GenerationDefaults, Tokenizer
    from specchat.models.hub import Download
    from specchat.models.pack import Pack
    from specchat.ui.console import Talk


@dataclass(frozen=True)
class Refs:
    """The models of a run, as understood from the arguments; `draft` is None for plain decoding and for auto."""

    target: "ModelRef"
    draft: "ModelRef | None"


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        draft_note: what to say in the place of a draft when there is none.
    """

    target: ModelSource
    draft: ModelSource | None
    draft_note: str


def prepare_libraries() -> None:
    """Settings that libraries read when they are first imported.

    Their warnings and progress bars mean nothing to a user; SPECCHAT_DEBUG=1 lets them through.
    """
    # OpenMP's threads spin while they wait for each other. With another busy program beside them, one that is not
    # running is waited for all its time slice long: tens of times slower, many times in each layer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("SPECCHAT_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ[variable] = "error"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


def _refuse_without_model() -> NoReturn:
    from specchat.models.hub import cached_models

    cached = cached_models()
    shown = ", ".join(["demo (embedded, a toy)", *cached[:8]]) + (f" and {len(cached) - 8} more" * (len(cached) > 8))
    raise UsageError(f"which MODEL? here without a download: {shown}", hint="specchat run demo")


def parse_models(options: ModelOptions) -> Refs:
    """The models that the arguments mean; nothing is looked up yet.

    Raises:
        UsageError: no model is named, or a name means nothing.
        NotAvailableError: a kind of draft that this version does not have.
    """
    from specchat.models.catalog import parse_model

    if options.model is None:
        _refuse_without_model()
    if options.draft in ("self", "retrieval"):
        raise NotAvailableError(
            f"--draft {options.draft} is not in this version", hint="use --draft MODEL, auto or none"
        )
    draft = None if options.draft in ("auto", "none") else parse_model(options.draft)
    return Refs(parse_model(options.model), draft)


def locate_models(options: ModelOptions, refs: Refs, say: "Talk") -> Models:
    """Finds the models' files, downloading or writing what is missing.

    Raises:
        ModelError: a model is not to be had.
    """
    from specchat.models.catalog import known_draft

    target = _locate(refs.target, options, say)
    if refs.draft is not None:
        return Models(target, _locate(refs.draft, options, say), "")
    if options.draft == "none":
        return Models(target, None, "no draft")
    return Models(target, known_draft(refs.target), "plain decoding: no draft known for this model")


def _locate(ref: "ModelRef", options: ModelOptions, say: "Talk") -> ModelSource:
    from specchat.models.hub import locate
    from specchat.ui.progress import ProgressLine

    what = "writing" if ref.kind == "shape" else "downloading"
    with ProgressLine(say, f"{what} {ref.text}") as line:
        return locate(
            ref,
            offline=options.offline,
            confirm=lambda download: options.yes or _agreed(download),
            progress=line.update,
            warn=say.warn,
        )


def _agreed(download: "Download") -> bool:
    """Asks before a download; where nobody can be asked, the answer is no."""
    from specchat.units import format_bytes

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    question = (
        f"download {download.name}: {format_bytes(download.missing_bytes)} to {download.folder} "
        f"({format_bytes(download.free_disk_bytes)} free)? [y/N] "
    )
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def make_plan(options: ModelOptions, models: Models) -> Plan:
    """What goes where on this machine.

    Raises:
        DoesNotFitError: no plan stays within the budget.
    """
    from specchat.planner import search

    return search.make_plan(
        search.PlanRequest(
            target=models.target,
            draft=models.draft,
            device=options.device,
            dtype=options.dtype,
            vram_bytes=options.vram_bytes,
            ctx=options.ctx,
            tree_budget=options.tree_budget,
            ram_bytes=options.ram_bytes,
        )
    )


def make_pack(target: ModelSource, plan: Plan, say: "Talk") -> "Pack | None":
    """The weights as they will be streamed, if they have to be repacked for that."""
    from specchat.models.prepare import prepare
    from specchat.ui.progress import ProgressLine

    if not plan.streamed:
        return None
    with ProgressLine(say, f"repacking {target.name}") as line:
        return prepare(
            target,
            plan.dtype,
            progress=lambda report: line.update(report.bytes_done, report.bytes_total),
            warn=say.warn,
        )


def stop_ids(defaults: "GenerationDefaults", tokenizer: "Tokenizer") -> frozenset[int]:
    """Tokens that end an answer.

    Chat models often end their turns with the tokenizer's end token where their config only has the base model's.
    """
    eos = tokenizer.eos_token_id
    return defaults.stop_ids if eos is None else defaults.stop_ids | {eos}
