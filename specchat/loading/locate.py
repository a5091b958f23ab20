"""Find a target and its draft: parse names, look up, download or write files, compare vocabularies."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Literal, NoReturn

from specchat.errors import ModelError, UnsupportedModelError, UsageError
from specchat.loading.checking import check_model
from specchat.loading.choosing import sketch_heads, without_unused
from specchat.loading.models import Found, Models, Refs
from specchat.loading.request import MTP, RETRIEVAL, SELF, Ask, ModelRequest, Reporter
from specchat.loading.sketches import refuse_by_configuration, sketch_draft, sketch_model
from specchat.models import locate
from specchat.models.catalog.families import known_families
from specchat.models.catalog.known_heads import kind_of
from specchat.models.catalog.ref import SHAPE_PREFIX, ModelRef, parse_model
from specchat.models.catalog.shape import Shape
from specchat.models.checkpoint.gguf import is_mtp_alone
from specchat.models.checkpoint.safetensors import has_weights, weight_files
from specchat.models.drafts import (
    DraftChoice,
    as_draft,
    choose_draft,
    copy_of,
    fits,
    head_in,
    head_on_hub,
    heads_in_cache,
    known_heads_of,
    mtp_head,
    own_copy,
    relative_in_cache,
)
from specchat.models.gguf.heads import is_head_alone
from specchat.models.hf.pairing import check_pair
from specchat.models.hub.cache import cached_gguf, cached_models
from specchat.models.hub.download import Download, agree
from specchat.models.hub.stores import listed_name, runnable_names
from specchat.models.locate import Missing
from specchat.paths import from_home
from specchat.records.model import ModelSource, Quant
from specchat.units import format_bytes

_MOST_SHOWN = 8
# Smaller synthetic models are written without a question.
_LARGE_BYTES = 2 << 30


def parse_models(request: ModelRequest) -> Refs:
    """Parse the names of target and draft without looking them up.

    Raises:
        UsageError: no model is named, or a name is not valid.
    """
    if request.model is None:
        _refuse_without_model()
    if request.draft != "none" and "none" in request.draft.split("+"):
        raise UsageError("--draft none drafts nothing, so nothing can be added", hint="use --draft retrieval")
    words = {MTP, SELF, "auto"} & set(request.draft.split("+"))
    if words and request.draft_model not in words:
        raise UsageError(f"--draft {request.draft} merges more than one drafter", hint="only +retrieval can be added")
    parse = partial(parse_model, names_here=lambda: [*request.aliases, *names_here()], listed_name=listed_name)
    draft = None if request.draft_model in (MTP, SELF, "auto", "none") else parse(request.draft_model)
    target = _stored(parse(request.model), request.choices.quant)
    return Refs(target, None if draft is None else _stored(draft, request.choices.draft_quant))


def locate_models(request: ModelRequest, refs: Refs, reporter: Reporter, ask: Ask) -> Models:
    """Find the models' files; write missing ones, or download them after the user has agreed.

    Args:
        request: models and choices.
        refs: parsed names.
        reporter: receives progress and warnings.
        ask: asks before a download.

    Raises:
        ModelError: a model cannot be found or downloaded.
        UsageError: the user did not confirm a download.
        UnsupportedModelError: the target is known not to run.
    """
    found = without_unused(request, _look_up(request, refs, reporter), reporter, _tokenizer_folder(request))
    models = _obtain_all(request, refs, found, reporter, ask)
    for model in (models.target, models.draft):
        if model is not None and not has_weights(model.path):
            if not model.part:
                check_model(model)  # a model of this kind may not run at all
            weight_files(model.path)  # raises
    return models


def sketch_models(request: ModelRequest, refs: Refs, reporter: Reporter, ask: Ask, folder: Path) -> Models:
    """Find the models for a plan; for a missing model, download only the configuration.

    Of pre-quantized checkpoints and GGUF files the headers are downloaded: only they hold the sizes of the matrices.

    Args:
        request: models and choices.
        refs: parsed names.
        reporter: receives progress and warnings.
        ask: asks before a download.
        folder: existing folder for configurations to write.

    Raises:
        ModelError: a model cannot be found or downloaded.
        UsageError: the user did not confirm a download.
        UnsupportedModelError: the target is known not to run.
    """
    found = _look_up(request, refs, reporter)
    target = sketch_model(found.target, folder, _tokenizer_folder(request))
    draft = None if found.draft is None else sketch_draft(found.draft, folder)
    if request.draft_model == MTP and not has_weights(target.path):
        return _obtain_all(request, refs, found, reporter, ask)
    here = [model for model in (target, draft) if model is not None]
    if found.are_here and all(has_weights(model.path) for model in here):
        return _pair(request, refs, target, draft, found, reporter)
    if request.draft_model == SELF:
        return Models(target, own_copy(target), "")
    missing = [head for head in found.heads if isinstance(head, Download)]
    heads = tuple(head for head in sketch_heads(missing, folder) if fits(target, head))
    return Models(target, draft, found.draft_note, heads)  # the vocabularies are not available yet


def names_here() -> list[str]:
    """Return the models that run without a download: those of the hub's cache and of other programs' stores."""
    return [*cached_models(), *cached_gguf(), *runnable_names()]


def models_here() -> str:
    """Return the models that run without a download, as a text for messages."""
    here = names_here()
    more = f" and {len(here) - _MOST_SHOWN} more" if len(here) > _MOST_SHOWN else ""
    return ", ".join(["demo (embedded, a toy)", *here[:_MOST_SHOWN]]) + more


def _refuse_without_model() -> NoReturn:
    raise UsageError(
        f"no MODEL is given; available without a download: {models_here()}",
        hint="try `specchat run demo`, or `specchat probe` for the models that run on this machine",
    )


def _stored(ref: ModelRef, quant: Literal["auto"] | Quant) -> ModelRef:
    """Store the quantization in a shape; "auto" keeps full precision, and other references stay unchanged."""
    return ref if ref.shape is None or quant == "auto" else replace(ref, shape=replace(ref.shape, quant=quant))


def _look_up(request: ModelRequest, refs: Refs, reporter: Reporter) -> Found:
    """Refuse an unsupported target, find it and choose a draft, all without downloading weights."""
    why = known_families().why_unsupported(refs.target.text)
    if why is not None:
        raise UnsupportedModelError(f"{refs.target.text} is not supported: {why}")
    target = locate.look_up(
        refs.target, offline=request.offline, warn=reporter.warn, tokenizer=_tokenizer_folder(request)
    )
    _refuse_head_alone(refs.target.text, target)
    choice = _choose_draft(request, refs, reporter)
    if request.draft_model != "auto":
        return Found(target, choice.found, choice.note)
    # A draft in the cache comes before one that must be downloaded.
    draft_is_here = isinstance(choice.found, ModelSource)
    heads = known_heads_of(refs.target, target, offline=is_offline(request) or draft_is_here)
    heads += head_on_hub(target)
    are_here = any(isinstance(head, ModelSource) for head in heads)
    return Found(target, None if are_here and not draft_is_here else choice.found, choice.note, tuple(heads))


def _refuse_head_alone(name: str, target: ModelSource | Missing) -> None:
    """Refuse a file that only drafts for a model.

    Raises:
        UnsupportedModelError: the target is an MTP layer without the model that it is for, or another head.
    """
    if isinstance(target, ModelSource):
        is_alone = is_head_alone(target.path)
        if not is_alone and as_draft(target).is_head:
            raise UnsupportedModelError(
                f"{name} is a head that drafts for a model, and not a model", hint=f"use it as a draft: --draft {name}"
            )
    else:
        is_alone = isinstance(target, Download) and _holds_head_alone(target)
    if is_alone:
        raise UnsupportedModelError(
            f"{name} holds the MTP layer of a model, and not the model", hint=f"use it as a draft: --draft {name}"
        )


def _tokenizer_folder(request: ModelRequest) -> Path | None:
    if request.tokenizer is None:
        return None
    return locate.tokenizer_folder(parse_model(request.tokenizer), offline=request.offline)


def _choose_draft(request: ModelRequest, refs: Refs, reporter: Reporter) -> DraftChoice:
    if refs.draft is not None:
        return DraftChoice(locate.look_up(refs.draft, offline=request.offline, warn=reporter.warn))
    if request.draft_model in (MTP, SELF):
        return DraftChoice(None)
    if request.draft_model == "none":
        return DraftChoice(None, RETRIEVAL if request.retrieval else "no draft")
    return choose_draft(refs.target, offline=request.offline, warn=reporter.warn)


def is_offline(request: ModelRequest) -> bool:
    """Return whether the network must not be used, by the request or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return request.offline or constants.HF_HUB_OFFLINE


def _obtain_all(request: ModelRequest, refs: Refs, found: Found, reporter: Reporter, ask: Ask) -> Models:
    """Download or write the files of all models, after one question for all downloads.

    Raises:
        UnsupportedModelError: a model's configuration is not supported; no weights are downloaded.
    """
    downloads = [each for each in (found.target, found.draft, *found.heads) if isinstance(each, Download)]
    for each in downloads:
        refuse_by_configuration(each, _tokenizer_folder(request) if each is found.target else None)
    agree(downloads, lambda missing: ask(_download_question(missing, found.target)))
    for shape in (found.target, found.draft):
        if isinstance(shape, Shape):
            _agree_to_write(shape, ask)
    target = _obtain(found.target, reporter, _tokenizer_folder(request))
    draft = None if found.draft is None else as_draft(_obtain(found.draft, reporter))
    found = replace(found, heads=tuple(as_draft(_obtain(head, reporter)) for head in found.heads))
    return _pair(request, refs, target, draft, found, reporter)


def _agree_to_write(shape: Shape, ask: Ask) -> None:
    """Ask before a large synthetic model is written.

    Raises:
        UsageError: the user declined.
    """
    from specchat.models.packs.inventory import packs_folder
    from specchat.models.synthetic.layers import bytes_to_write  # imports torch

    size = bytes_to_write(shape)
    if size <= _LARGE_BYTES:
        return
    what = f"the synthetic model {SHAPE_PREFIX}{shape.label} ({format_bytes(size)})"
    if not ask(f"write {what} to {packs_folder()}? it may be deleted afterwards"):
        raise UsageError(f"writing {what} was not confirmed", hint="add --yes to write it without a question")


def _pair(
    request: ModelRequest,
    refs: Refs,
    target: ModelSource,
    draft: ModelSource | None,
    found: Found,
    reporter: Reporter,
) -> Models:
    """Pair a target with its draft.

    A draft must share the vocabulary. If no automatic one was found, a cached model of the same family may replace it.

    Raises:
        VocabularyMismatchError: the user named a draft with another vocabulary.
        UsageError: the user asked for a head or a copy that the target cannot have.
    """
    if request.draft_model == MTP:
        return Models(target, head_in(target), "")
    if request.draft_model == SELF:
        return Models(target, own_copy(target), "")
    if request.draft_model != "auto":
        if draft is not None:
            check_pair(target, draft)
        return Models(target, draft, found.draft_note if draft is None else "")
    note = found.draft_note if draft is None else ""
    if draft is not None and not fits(target, draft):
        note = f"plain decoding: {draft.name} has another vocabulary"
        draft = None
    elif draft is None and refs.target.kind in ("hub", "folder", "stored"):
        draft = relative_in_cache(target)
    if target.is_toy:  # the toy has a draft model of its own
        return Models(target, draft, note)
    return Models(target, draft, note, _heads_of(target, found.heads, reporter), copy_of(target))


def _heads_of(
    target: ModelSource, known: Sequence[ModelSource | Missing], reporter: Reporter
) -> tuple[ModelSource, ...]:
    """Return the heads that may draft; a damaged one must not keep the target from running."""
    heads = list[ModelSource]()
    try:
        own = mtp_head(target)
        heads += [own] if own is not None else []
    except ModelError as error:
        reporter.warn(f"the MTP layer of {target.name} is not used: {error.message}")
    others = [each for each in known if isinstance(each, ModelSource) and each.is_head]
    here = [each for each in others if all(each.path != head.path for head in heads) and fits(target, each)]
    known_paths = {each.path for each in here}
    heads += [*here, *(each for each in heads_in_cache(target) if each.path not in known_paths)]
    return tuple(heads)


def _obtain(found: ModelSource | Missing, reporter: Reporter, tokenizer: Path | None = None) -> ModelSource:
    if isinstance(found, ModelSource):
        return found
    what = f"downloading {found.name}" if isinstance(found, Download) else f"writing {found.label}"
    with reporter.moving(what) as update:
        return locate.obtain(found, progress=update, warn=reporter.warn, tokenizer=tokenizer)


def _kind(download: Download) -> str:
    """Return what a head is, for the question; nothing for a model."""
    kind = "an MTP layer" if _holds_head_alone(download) else kind_of(download.name)
    return f", {kind}" if kind else ""


def _holds_head_alone(download: Download) -> bool:
    return any(is_mtp_alone(PurePath(file).name) for file in download.files)


def _download_question(downloads: Sequence[Download], target: ModelSource | Missing) -> str:
    what = " and ".join(f"{each.name} ({format_bytes(each.missing_bytes)}{_kind(each)})" for each in downloads)
    question = (
        f"download {what} to {from_home(downloads[0].folder)} ({format_bytes(downloads[0].free_disk_bytes)} free)?"
    )
    if downloads[0] is target:  # the target may be stored a second time, in a form that streams
        question += f"\nstreaming may also need a copy of up to {format_bytes(downloads[0].num_bytes)}"
    return question
