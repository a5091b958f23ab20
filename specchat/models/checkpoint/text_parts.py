"""Tensors that text needs no part of, told by their names: images, sound and draft heads of multimodal checkpoints."""

from collections.abc import Mapping

# Modules beside the language model, by the names of transformers and of the models' makers. A name that is missing here
# costs a download, not an answer: unknown tensors count as needed, and the model then does not use them.
_BESIDE_TEXT = frozenset(
    {
        "audio_encoder",
        "audio_projector",
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "image_newline",
        "mm_projector",
        "mtp",
        "multi_modal_projector",
        "vision_embedder",
        "vision_encoder",
        "vision_language_adapter",
        "vision_model",
        "vision_projection",
        "vision_tower",
        "visual",
        "vit",
    }
)
_HEAD = "mtp"
# The name that tells an MTP head of Qwen's layout from other drafters under the same prefix, which are not read.
_HEAD_MARK = "mtp.pre_fc_norm_hidden.weight"
_DEPTH = 2  # "visual.blocks.0", "model.vision_tower.encoder"


def is_beside_text(key: str) -> bool:
    """Return whether a tensor belongs to a part of the model that text never passes through."""
    return not _BESIDE_TEXT.isdisjoint(key.split(".")[:_DEPTH])


def shards_beside_text(weight_map: Mapping[str, str], *, with_head: bool = False) -> frozenset[str]:
    """Return the files of an index that hold nothing that text needs.

    Args:
        weight_map: file name of each tensor.
        with_head: whether an MTP head is needed, too.
    """
    needed = {file for key, file in weight_map.items() if not is_beside_text(key)}
    if with_head and any(key.endswith(_HEAD_MARK) for key in weight_map):
        needed |= {file for key, file in weight_map.items() if _HEAD in key.split(".")[:_DEPTH]}
    return frozenset(weight_map.values()) - needed
