"""The preparation of a model for streaming: its own files if they are streamable, else a pack."""

from collections.abc import Callable

from specchat.models.packs.build import PackProgress, build_pack
from specchat.models.packs.checkpoint_source import CheckpointLayers
from specchat.models.packs.file_format import NOT_QUANTIZED
from specchat.models.packs.inventory import packs_folder
from specchat.models.packs.pack import Pack, key_for, open_pack
from specchat.models.weights.experts import have_places
from specchat.models.weights.open import ModelWeights
from specchat.records.model import ModelSource
from specchat.units import MIB, format_bytes

# Reading and casting a smaller model in every pass takes no noticeable time, and needs no disk space.
SMALL_BYTES = 64 * MIB


def pack_name(source: ModelSource) -> str:
    """Return the name of a model's pack for messages and lists; that of a part names its target."""
    if source.part not in {"mtp", "self"}:
        return source.name
    folder = source.path
    if source.revision is not None and folder.parent.name == "snapshots":  # the folder's own name is the commit
        folder = folder.parents[1]
    target = folder.name.removeprefix("models--").replace("--", "/")
    return target if source.is_copy else f"the {source.part.upper()} layer of {target}"


def prepare(
    weights: ModelWeights,
    *,
    progress: Callable[[PackProgress], None],
    warn: Callable[[str], None],
    by_experts: bool = False,
) -> Pack | None:
    """Return the pack that a model is streamed from; None if its own files can be streamed.

    Without a pack, every pass would cast, merge or quantize tensors again.

    Args:
        weights: opened weights of the model.
        progress: receives the progress while a pack is written.
        warn: receives one line about a new pack, a damaged one, or a wait for another process.
        by_experts: whether passes read single experts instead of whole layers.

    Raises:
        DoesNotFitError: too little disk space for the pack.
        ModelError: the files cannot be read.
    """
    source, dtype, recipe = weights.source, weights.dtype, weights.recipe
    quantizer = NOT_QUANTIZED if recipe is None else recipe.identity
    if source.path.parent == packs_folder():  # a synthetic model is created as a pack
        pack = open_pack(source.path.name, warn)
        if pack is not None and (pack.dtype, pack.quantizer) == (dtype, quantizer):
            return pack
    if by_experts:
        if have_places(weights.reader, weights.skeleton):
            return None
    elif weights.reader.is_streamable or (recipe is None and _is_small(weights)):
        return None
    with CheckpointLayers(weights) as layers:
        # A low-bit copy has the pack of the model in the same precision.
        what_for = f"mtp: {quantizer}" if source.part == "mtp" else quantizer
        key = key_for(source, weights.checkpoint, dtype, what_for)
        pack = open_pack(key, warn)
        if pack is not None and pack.fits(layers):
            return pack
        name = pack_name(source)
        size = format_bytes(sum(p.nbytes for p in weights.skeleton.model.parameters()))
        what = f"repacking {name} as {dtype}" if recipe is None else f"packing {name} as {recipe.name}"
        warn(f"{what} ({size}) in {packs_folder() / key}, which may be deleted afterwards")
        return build_pack(key, layers, name=name, dtype=dtype, quantizer=quantizer, progress=progress, warn=warn)


def _is_small(weights: ModelWeights) -> bool:
    return sum(info.nbytes for info in weights.checkpoint.tensors.values()) <= SMALL_BYTES
