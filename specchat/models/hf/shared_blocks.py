"""Blocks of modules that several decoder layers share, such as the attention blocks of Zamba 2.

A shared block belongs to no layer, so its weights are loaded and counted once. It stays on the device: a pass uses the
block in many layers, so resident it saves several times as much streaming as a layer of the same size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LIST = "shared_blocks"


@dataclass(frozen=True)
class SharedBlock:
    """A block that several layers use.

    Attributes:
        path: path of the block in the decoder.
        uses: paths in the decoder by which the layers use the block, such as "layers.6.shared_transformer". Checkpoints
            name the block's tensors by one of them.
    """

    path: str
    uses: tuple[str, ...]


def take_out_shared_blocks(decoder: Any, layers: Any, layers_name: str) -> tuple[SharedBlock, ...]:
    """Move the blocks that several layers share into a list of the decoder; layers still call them by their names.

    Args:
        decoder: decoder whose tied parameters are tied; modified.
        layers: decoder layers.
        layers_name: path of the layers in the decoder.
    """
    blocks: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if parameters := tuple(map(id, child.parameters())):
                blocks.setdefault(parameters, []).append((index, name))
    shared = [uses for uses in blocks.values() if len(uses) > 1]
    for uses in shared:
        _take_out(decoder, layers, uses)
    return tuple(
        SharedBlock(f"{_LIST}.{number}", tuple(f"{layers_name}.{index}.{name}" for index, name in uses))
        for number, uses in enumerate(shared)
    )


def _take_out(decoder: Any, layers: Any, uses: Sequence[tuple[int, str]]) -> None:
    first, own_name = uses[0]
    block = layers[first]._modules[own_name]
    if not hasattr(decoder, _LIST):
        setattr(decoder, _LIST, torch.nn.ModuleList())
        decoder._tied_weights_keys = {}  # one module needs no tying
    getattr(decoder, _LIST).append(block)
    for index, name in uses:
        layers[index]._modules.pop(name, None)  # a layer may occur twice
        object.__setattr__(layers[index], name, block)  # not as a submodule, whose parameters would be the layer's
