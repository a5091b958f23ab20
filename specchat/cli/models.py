"""What `run` and `bench` do alike: find the models, plan for them, make their weights ready to stream."""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from specchat.cli.options import ModelOptions, SamplingFlags, resolve_sampling
from specchat.errors import AllocationError, NotAvailableError, UsageError
from specchat.records.model import LOWER_QUANTS, ModelSource, Quant
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.engine.engine import Engine
    from specchat.models.catalog.ref import ModelRef
    from specchat.models.checkpoint.generation_config import GenerationDefaults
    from specchat.models.drafts import DraftChoice
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.models.hub.download import Download
    from specchat.models.locate import Missing
    from specchat.models.packs.pack import Pack
    from specchat.planner.explain import ExplainedPlan
    from specchat.planner.request import PlanRequest
    from specchat.ui.console import Talk
    from specchat.ui.progress import Reporter


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
    from specchat.models.hub.cache import cached_models

    cached = cached_models()
    shown = ", ".join(["demo (embedded, a toy)", *cached[:8]]) + (f" and {len(cached) - 8} more" * (len(cached) > 8))
    raise UsageError(f"which MODEL? here without a download: {shown}", hint="specchat run demo")


def parse_models(options: ModelOptions) -> Refs:
    """The models that the arguments mean; nothing is looked up yet.

    Raises:
        UsageError: no model is named, or a name means nothing.
        NotAvailableError: a kind of draft that this version does not have.
    """
    from specchat.models.catalog.ref import parse_model

    if options.model is None:
        _refuse_without_model()
    if options.draft in ("self", "retrieval"):
        raise NotAvailableError(
            f"--draft {options.draft} is not in this version", hint="use --draft MODEL, auto or none"
        )
    draft = None if options.draft in ("auto", "none") else parse_model(options.draft)
    target = _stored(parse_model(options.model), options.quant)
    return Refs(target, None if draft is None else _stored(draft, options.draft_quant))


def _stored(ref: "ModelRef", quant: 'Literal["auto"] | Quant') -> "ModelRef":
    """Shapes are made as they are to be stored; auto makes them in full precision."""
    return ref if ref.shape is None or quant == "auto" else replace(ref, shape=replace(ref.shape, quant=quant))


def locate_models(options: ModelOptions, refs: Refs, say: "Talk") -> Models:
    """Finds the models' files; downloads or writes what is missing, once agreed to.

    Raises:
        ModelError: a model is not to be had.
        UsageError: a download was not agreed to.
        UnsupportedModelError: the target is known not to run.
    """
    return _obtained(options, refs, _look_up(options, refs, say), say)


def sketch_models(options: ModelOptions, refs: Refs, say: "Talk", folder: Path) -> Models:
    """The models as far as a plan needs them: of those that are not at hand only the configuration is fetched.

    Checkpoints that come quantized are needed whole: only their headers tell how large their matrices are.

    Args:
        options: what was asked for.
        refs: the models that it means.
        say: told of cached copies that cannot be checked.
        folder: an existing one, for configurations that have to be written.

    Raises:
        ModelError: a model is not to be had.
        UsageError: a download was not agreed to.
        UnsupportedModelError: the target is known not to run.
    """
    found = _look_up(options, refs, say)
    target = _sketched(found.target, folder)
    draft = None if found.draft is None else _sketched(found.draft, folder)
    if target is None or (draft is None and found.draft is not None):
        return _obtained(options, refs, found, say)
    if found.are_here:
        return _together(options, refs, target, draft, found.draft_note)
    return Models(target, draft, found.draft_note)  # no vocabularies to compare yet


@dataclass(frozen=True)
class _Found:
    """The models, or what it takes to have them; `draft` None is plain decoding, and `draft_note` says why."""

    target: "ModelSource | Missing"
    draft: "ModelSource | Missing | None"
    draft_note: str

    @property
    def are_here(self) -> bool:
        """Whether nothing has to be downloaded or made."""
        return isinstance(self.target, ModelSource) and (self.draft is None or isinstance(self.draft, ModelSource))


def _look_up(options: ModelOptions, refs: Refs, say: "Talk") -> _Found:
    """Where the target is and which draft it gets; nothing is downloaded, and what cannot run is refused first."""
    from specchat.models.locate import look_up

    _refuse_unsupported(refs.target)
    target = look_up(refs.target, offline=options.offline, warn=say.warn)
    choice = _choose_draft(options, refs, say)
    return _Found(target, choice.found, choice.note)


def _obtained(options: ModelOptions, refs: Refs, found: _Found, say: "Talk") -> Models:
    """Both models' files, once their downloads are agreed to, in one question.

    Raises:
        UnsupportedModelError: by its configuration, the target cannot run; it is not downloaded for nothing.
    """
    from specchat.models.hub.download import Download, agree

    if isinstance(found.target, Download):
        _refuse_by_configuration(found.target)
    agree(
        [each for each in (found.target, found.draft) if isinstance(each, Download)],
        lambda downloads: options.yes or _agreed(downloads, found.target),
    )
    target = _obtain(found.target, say)
    draft = None if found.draft is None else _obtain(found.draft, say)
    return _together(options, refs, target, draft, found.draft_note)


def _refuse_by_configuration(target: "Download") -> None:
    from specchat.models.hf.config import load_config  # with torch
    from specchat.models.locate import sketch
    from specchat.models.weights.choose_recipe import is_prequantized

    sketched = sketch(target, Path())
    load_config(sketched.path)
    is_prequantized(sketched)  # in a way that can be read


def _together(
    options: ModelOptions, refs: Refs, target: ModelSource, draft: ModelSource | None, draft_note: str
) -> Models:
    """A target and its draft: one that nobody asked for must fit, and where none is known a relative may do."""
    from specchat.models.drafts import fits, relative_in_cache

    if draft is not None:
        if options.draft != "auto" or fits(target, draft):
            return Models(target, draft, "")
        return Models(target, None, f"plain decoding: {draft.name} has another vocabulary")
    may_have_relatives = options.draft == "auto" and refs.target.kind in ("hub", "folder")
    return Models(target, relative_in_cache(target) if may_have_relatives else None, draft_note)


def _sketched(found: "ModelSource | Missing", folder: Path) -> ModelSource | None:
    """What a plan can be made from; None for what would have to be downloaded whole."""
    if isinstance(found, ModelSource):
        return found
    from specchat.models.locate import sketch
    from specchat.models.weights.choose_recipe import is_prequantized  # with torch

    sketched = sketch(found, folder)
    return None if is_prequantized(sketched) else sketched


def _refuse_unsupported(target: "ModelRef") -> None:
    from specchat.errors import UnsupportedModelError
    from specchat.models.catalog.families import known_families

    why = known_families().why_unsupported(target.text)
    if why is not None:
        raise UnsupportedModelError(f"{target.text} is not supported: {why}")


def _choose_draft(options: ModelOptions, refs: Refs, say: "Talk") -> "DraftChoice":
    from specchat.models.drafts import DraftChoice, choose_draft
    from specchat.models.locate import look_up

    if refs.draft is not None:
        return DraftChoice(look_up(refs.draft, offline=options.offline, warn=say.warn))
    if options.draft == "none":
        return DraftChoice(None, "no draft")
    return choose_draft(refs.target, offline=options.offline, warn=say.warn)


def _obtain(found: "ModelSource | Missing", say: "Talk") -> ModelSource:
    from specchat.models.hub.download import Download
    from specchat.models.locate import obtain
    from specchat.ui.progress import ProgressLine

    if isinstance(found, ModelSource):
        return found
    what = f"downloading {found.name}" if isinstance(found, Download) else f"writing {found.label}"
    with ProgressLine(say, what) as line:
        return obtain(found, progress=line.update, warn=say.warn)


def _agreed(downloads: "Sequence[Download]", target: "ModelSource | Missing") -> bool:
    """Asks before a download; where nobody can be asked, the answer is no."""
    from specchat.units import format_bytes

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    what = " and ".join(f"{each.name} ({format_bytes(each.missing_bytes)})" for each in downloads)
    question = f"download {what} to {downloads[0].folder} ({format_bytes(downloads[0].free_disk_bytes)} free)?"
    if downloads[0] is target:  # of which a repacked copy may be needed
        question += f"\nstreaming may need a copy of up to {format_bytes(downloads[0].num_bytes)} beside it"
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@dataclass(frozen=True)
class Planned:
    """A plan, its reasons, and the models that it is for: a draft that would not pay is left out."""

    chosen: "ExplainedPlan"
    models: Models

    @property
    def plan(self) -> Plan:
        """What the engine runs under."""
        return self.chosen.plan


def make_plan(
    options: ModelOptions,
    models: Models,
    warn: Callable[[str], None],
    *,
    temperature: float | None = None,
    as_given: bool = False,
) -> Planned:
    """What goes where on this machine.

    Args:
        options: what was asked for.
        models: what was found.
        warn: told in one line of statistics that cannot be read.
        temperature: of the answers as chosen; None where the model's own holds.
        as_given: the draft is used and the precision kept even where something else would be faster: for comparisons.

    Raises:
        DoesNotFitError: no plan stays within the budget.
    """
    from specchat.planner import search

    request = _plan_request(options, models, temperature)
    if as_given:
        given = "none" if options.draft_quant == "auto" else options.draft_quant
        request = replace(request, draft_is_open=False, draft_quant=given, lowers_for_speed=False)
    chosen = search.choose_plan(request, warn)
    if models.draft is None or chosen.plan.draft is not None:
        return Planned(chosen, models)
    note = f"plain decoding: predicted faster here than with {models.draft.name}"
    return Planned(chosen, replace(models, draft=None, draft_note=note))


def _plan_request(options: ModelOptions, models: Models, temperature: float | None) -> "PlanRequest":
    from specchat.models.checkpoint.generation_config import load_generation_defaults
    from specchat.planner.request import PlanRequest

    sampling = resolve_sampling(SamplingFlags(temperature=temperature), load_generation_defaults(models.target.path), 0)
    return PlanRequest(
        target=models.target,
        draft=models.draft,
        device=options.device,
        dtype=options.dtype,
        vram_bytes=options.vram_bytes,
        ctx=options.ctx,
        tree_budget=options.tree_budget,
        ram_bytes=options.ram_bytes,
        slots=options.slots,
        quant=options.quant,
        draft_quant=options.draft_quant,
        # who asks for trees of some size, or for a draft in some precision, wants to have them
        draft_is_open=options.draft == "auto" and options.tree_budget is None and options.draft_quant == "auto",
        samples=not sampling.greedy,
    )


def load_engine(
    options: ModelOptions, models: Models, plan: Plan, reporter: "Reporter", temperature: float | None = None
) -> "Engine":
    """The engine as planned; where memory that was free has gone meanwhile, one step smaller, and said so.

    Raises:
        DoesNotFitError: nothing smaller is left to try.
    """
    from specchat.engine.engine import Engine

    while True:
        packs = make_pack(models.target, plan, reporter), make_draft_pack(models.draft, plan, reporter)
        try:
            return Engine.load(plan, models.target, models.draft, *packs, warn=reporter.warn)
        except AllocationError as error:
            from specchat.planner.search import smaller_plan

            plan = smaller_plan(_plan_request(options, models, temperature), plan)
            reporter.warn(f"{error.message}; trying again with {_size_of(plan)}")
        gc.collect()  # modules and what is bound to them refer to each other: what was loaded would stay until then


def _size_of(plan: Plan) -> str:
    layers = f"{len(plan.resident)} of {plan.num_layers} layers resident"
    return f"{layers} and a tree of {plan.tree_budget}" if plan.tree_budget else layers


def make_pack(target: ModelSource, plan: Plan, reporter: "Reporter") -> "Pack | None":
    """The target's weights as they will be used, if they have to be repacked for that."""
    return _packed(target, plan, plan.quant, reporter) if plan.streamed or plan.quant in LOWER_QUANTS else None


def make_draft_pack(draft: ModelSource | None, plan: Plan, reporter: "Reporter") -> "Pack | None":
    """The draft's weights, if they are to be quantized."""
    return _packed(draft, plan, plan.draft_quant, reporter) if draft and plan.draft_quant in LOWER_QUANTS else None


def _packed(source: ModelSource, plan: Plan, quant: str, reporter: "Reporter") -> "Pack | None":
    from specchat.models.packs.prepare import prepare

    with reporter.moving(f"{'quantizing' if quant in LOWER_QUANTS else 'repacking'} {source.name}") as update:
        return prepare(
            source,
            plan.dtype,
            quant,
            progress=lambda report: update(report.bytes_done, report.bytes_total),
            warn=reporter.warn,
        )


def stop_ids(defaults: "GenerationDefaults", tokenizer: "Tokenizer") -> frozenset[int]:
    """Tokens that end an answer.

    Chat models often end their turns with the tokenizer's end token where their config only has the base model's.
    """
    eos = tokenizer.eos_token_id
    return defaults.stop_ids if eos is None else defaults.stop_ids | {eos}
