"""The choice among drafts that would have to be downloaded: the one that the plan uses."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from specchat.errors import ModelError
from specchat.loading.models import Found, Models
from specchat.loading.planning import make_plan
from specchat.loading.request import ModelRequest, Reporter
from specchat.loading.sketches import sketch_draft, sketch_model
from specchat.models import locate
from specchat.models.drafts import fits, mtp_head
from specchat.models.gguf.heads import announces_head
from specchat.models.hub.download import Download
from specchat.models.locate import Missing
from specchat.records.model import ModelSource


def without_unused(request: ModelRequest, found: Found, reporter: Reporter, tokenizer: Path | None) -> Found:
    """Return what was found with the draft that a plan chooses, if heads would have to be downloaded.

    Configurations and headers are enough for the plan, so nothing is downloaded in vain.

    Args:
        request: models and choices of the user.
        found: models, of which heads may be missing.
        reporter: receives warnings.
        tokenizer: folder of the tokenizer that replaces the one in a GGUF file.

    Raises:
        DoesNotFitError: no plan stays within the budget.
        UnsupportedModelError: draft trees do not work on the target's architecture.
    """
    missing = [head for head in found.heads if isinstance(head, Download)]
    if not missing:
        return found
    with TemporaryDirectory(prefix="specchat-") as name:
        folder = Path(name)
        target = sketch_model(found.target, folder, tokenizer)
        own = _own_head(found.target, target, folder)
        heads = tuple(head for head in sketch_heads(missing, folder) if fits(target, head))
        draft = None if found.draft is None else sketch_draft(found.draft, folder)
        if not heads:
            return replace(found, heads=())
        models = Models(target, draft, found.draft_note, heads if own is None else (own, *heads))
        chosen = make_plan(request, models, reporter).plan.draft
    used = tuple(head for head in missing if head.name == chosen)
    return replace(found, draft=None, heads=used) if used else replace(found, heads=())


def sketch_heads(heads: list[Download], folder: Path) -> list[ModelSource]:
    """Return heads that a plan can be made from; those that cannot be read are left out.

    Args:
        heads: heads on the hub.
        folder: existing folder for their configurations.
    """
    sketched = []
    for head in heads:
        with suppress(ModelError):  # a head that the hub no longer has must not keep the target from running
            sketched.append(sketch_draft(head, folder))
    return [head for head in sketched if head.is_head]


def _own_head(found: ModelSource | Missing, target: ModelSource, folder: Path) -> ModelSource | None:
    """Return the MTP head among a target's files, of which the headers are downloaded if there may be one."""
    if not announces_head(target.path):
        return None
    with suppress(ModelError):  # other drafts are left
        if isinstance(found, Download) and not target.headers_only:
            target = locate.sketch_weights(found, folder)
        return mtp_head(target)
    return None
