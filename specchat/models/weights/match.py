"""A checkpoint and the modules that it fills: old key prefixes are dropped, and the head is tied as the files say."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice, product
from types import MappingProxyType
from typing import Any

from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.reader import TensorReader
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo
from specchat.models.hf.conversion import plan_weights
from specchat.models.hf.skeleton import Skeleton

_COMPILED = "_orig_mod."  # torch.compile adds this before the names of the module that it wraps
_WRAPPERS = ("module.", "language_model.")  # of parallel training, and of a text model cut out of a multimodal one


def match_checkpoint(
    config: Any, checkpoint: Checkpoint, build: Callable[[Any], Skeleton]
) -> tuple[Skeleton, Checkpoint]:
    """Build a model's modules, and return the checkpoint under keys that belong to them.

    A configuration may tie the head to the embeddings although the files hold a head of its own. As in transformers,
    such a head stays apart if its values differ, and a head without embeddings fills both.

    Args:
        config: configuration of the model; a head of its own is entered.
        checkpoint: checkpoint as stored.
        build: function that builds the modules of a configuration.

    Raises:
        CorruptCheckpointError: two tensors that belong to one parameter, or different copies of a shared block.
    """
    skeleton = build(config)
    checkpoint = _unwrapped(skeleton, checkpoint)
    _check_copies(skeleton, checkpoint)
    tied: Mapping[str, str] = skeleton.model.get_expanded_tied_weights_keys(all_submodels=True)
    keys = {name: key for key, name in plan_weights(skeleton, checkpoint.tensors).rest.items()} if tied else {}
    for head, embedding in tied.items():
        if head in keys and embedding not in keys:
            checkpoint = _renamed(checkpoint, {keys[head]: embedding})
        elif head in keys and not _are_equal(checkpoint, keys[head], keys[embedding]):
            config.tie_word_embeddings = False
            return build(config), checkpoint
    return skeleton, checkpoint


def _check_copies(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Check that the copies of a shared block, which some programs store for each layer that uses it, are equal."""
    for block in skeleton.shared_blocks:
        first: dict[str, str] = {}
        for use, key in product(block.uses, checkpoint.tensors):
            _, is_of_block, name = key.rpartition(f"{use}.")
            other = first.setdefault(name, key) if is_of_block else key
            if other != key and not _are_equal(checkpoint, other, key):
                raise CorruptCheckpointError(
                    f"'{other}' and '{key}' in {checkpoint.folder} differ, but both layers share one block",
                    hint="download the model again, or ask its publisher",
                )


def _unwrapped(skeleton: Skeleton, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without prefixes that other programs added; unchanged if the model knows its keys."""
    keys = {key: key for key in checkpoint.tensors}
    prefixes = iter(_WRAPPERS)
    if any(_COMPILED in key for key in keys):
        keys = {key: key.replace(_COMPILED, "") for key in keys}
    while not _has_layers(skeleton, keys.values()):
        prefix = next(prefixes, None)
        if prefix is None:
            return checkpoint  # the missing tensors are reported by their names in the model
        keys = {key: name.removeprefix(prefix) for key, name in keys.items()}
    return _renamed(checkpoint, {key: name for key, name in keys.items() if key != name})


def _has_layers(skeleton: Skeleton, keys: Iterable[str]) -> bool:
    """Return whether any key belongs to a decoder layer; usually one of the first does."""
    rest, size = iter(keys), 64
    while batch := list(islice(rest, size)):
        plan = plan_weights(skeleton, batch)
        if any(plan.direct) or any(plan.converted):
            return True
        size *= 4
    return False


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return the checkpoint with other keys for some tensors."""
    if not names:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    for key, info in checkpoint.tensors.items():
        name = names.get(key, key)
        if name in tensors:
            raise CorruptCheckpointError(
                f"{checkpoint.folder} has two tensors for '{name}'", hint="the folder mixes two checkpoints; keep one"
            )
        tensors[name] = replace(info, key=name)
    return Checkpoint(checkpoint.folder, MappingProxyType(tensors))


def _are_equal(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Return whether two tensors are stored as the same bytes."""
    with TensorReader(checkpoint) as reader:
        return reader.are_equal(key, other)
