"""Making a model's weights ready to stream: from its own files if they serve as they are, else from a pack."""

from collections.abc import Callable

from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.packs.build import PackProgress, build_pack
from specchat.models.packs.checkpoint_source import CheckpointLayers
from specchat.models.packs.file_format import NOT_QUANTIZED
from specchat.models.packs.inventory import packs_folder
from specchat.models.packs.pack import Pack, key_for, open_pack
from specchat.models.weights.choose_recipe import choose_recipe
from specchat.records.model import Dtype, ModelSource
from specchat.units import MIB, format_bytes

# Smaller models are read and cast for every pass faster than anyone would notice, and leave nothing on the disk.
SMALL_BYTES = 64 * MIB


def prepare(
    source: ModelSource,
    dtype: Dtype,
    quant: str = NOT_QUANTIZED,
    *,
    progress: Callable[[PackProgress], None],
    warn: Callable[[str], None],
) -> Pack | None:
    """The pack that `source` is to be streamed from; None if its own files serve, layer by layer, as they are.

    Casting, merging or quantizing tensors would otherwise be done again for every pass.

    Args:
        source: local files.
        dtype: that passes compute in.
        quant: what the matrices are to be stored in.
        progress: told while a pack is made.
        warn: told in one line what is written where, about a damaged pack, or a wait for another process.

    Raises:
        DoesNotFitError: no room on the disk for the pack.
        ModelError: the files cannot be read.
    """
    skeleton = build_skeleton(load_config(source.path), torch_dtype(dtype))
    recipe = choose_recipe(source, skeleton, quant)
    quantizer = NOT_QUANTIZED if recipe is None else recipe.identity
    if source.path.parent == packs_folder():  # a synthetic model, made as a pack
        pack = open_pack(source.path.name, warn)
        if pack is not None and (pack.dtype, pack.quantizer) == (dtype, quantizer):
            return pack
    checkpoint = open_checkpoint(source.path)
    with CheckpointLayers(skeleton, checkpoint, recipe) as layers:
        small = recipe is None and sum(info.nbytes for info in checkpoint.tensors.values()) <= SMALL_BYTES
        if small or layers.is_streamable:
            return None
        key = key_for(source, checkpoint, dtype, quantizer)
        pack = open_pack(key, warn)
        if pack is not None and pack.fits(layers):
            return pack
        size = format_bytes(sum(p.nbytes for p in skeleton.model.parameters()))
        what = f"repacking {source.name} as {dtype}" if recipe is None else f"packing {source.name} as {recipe.name}"
        warn(f"{what} ({size}) in {packs_folder() / key}, which may be deleted afterwards")
        return build_pack(key, layers, name=source.name, dtype=dtype, quantizer=quantizer, progress=progress, warn=warn)
