"""Models for a plan before their download: configurations, and headers of weights where sizes depend on them."""

from pathlib import Path
from tempfile import TemporaryDirectory

from specchat.loading.checking import check_model
from specchat.models import locate
from specchat.models.drafts import as_draft
from specchat.models.hub.download import Download
from specchat.models.locate import Missing
from specchat.records.model import ModelSource


def sketch_model(found: ModelSource | Missing, folder: Path, tokenizer: Path | None = None) -> ModelSource:
    """Return a source that a plan can be made from."""
    if isinstance(found, ModelSource):
        return found
    if isinstance(found, Download) and found.files:
        return locate.sketch_weights(found, folder, tokenizer)
    from specchat.models.weights.choose_recipe import is_prequantized  # imports torch

    sketched = locate.sketch(found, folder)
    if isinstance(found, Download) and is_prequantized(sketched):
        return locate.sketch_weights(found, folder)
    return sketched


def sketch_draft(found: ModelSource | Missing, folder: Path) -> ModelSource:
    """Return a draft that a plan can be made from; the sizes of a head follow from the headers of its files."""
    draft = as_draft(sketch_model(found, folder))
    if draft.part and isinstance(found, Download) and not draft.headers_only:
        return as_draft(locate.sketch_weights(found, folder))
    return draft


def refuse_by_configuration(model: Download, tokenizer: Path | None = None) -> None:
    """Refuse an unsupported model by its configuration or its GGUF header, before its weights are downloaded.

    Args:
        model: model to download.
        tokenizer: folder of the tokenizer that replaces the one in a GGUF file.

    Raises:
        UnsupportedModelError: the architecture, the quantization or the tokenizer is not supported.
    """
    from specchat.models.weights.choose_recipe import is_prequantized  # imports torch

    with TemporaryDirectory(prefix="specchat-") as folder:
        if model.files:
            sketched = locate.sketch_weights(model, Path(folder), tokenizer)
        else:
            sketched = locate.sketch(model, Path(folder))
        if not as_draft(sketched).part:
            check_model(sketched)
        is_prequantized(sketched)
