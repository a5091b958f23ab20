"""Skeletons: a causal LM whose parameters are on the meta device, with its decoder layers and head."""

import copy
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from specchat.errors import UnsupportedModelError
from specchat.models.hf.attention import AttentionFunction, register_attention
from specchat.models.hf.config import text_model_class
from specchat.models.hf.hybrids import asks_for_caches
from specchat.models.hf.mixers import unclamp_time_steps
from specchat.models.hf.shared_blocks import SharedBlock, take_out_shared_blocks

# Building a model on meta patches torch's Module for the whole process. Parameters that another thread sets meanwhile
# would be lost.
modules_lock = threading.RLock()


@dataclass(frozen=True)
class Skeleton:
    """A causal LM whose parameters are still on torch's meta device.

    Attributes:
        config: configuration of the model.
        model: causal LM as a module of transformers.
        decoder: submodule from input ids to final hidden states.
        layers: decoder layers, in order.
        layers_name: path of the layers in `model`, such as "model.layers".
        shared_blocks: blocks that several layers share, which belong to no layer; most models have none.
    """

    config: Any
    model: Any
    decoder: Any
    layers: Any
    layers_name: str
    shared_blocks: tuple[SharedBlock, ...] = ()

    @property
    def shared_paths(self) -> tuple[str, ...]:
        """Paths of the shared blocks in `model`."""
        if not self.shared_blocks:
            return ()
        decoder = path_of(self.model, self.decoder)
        return tuple(f"{decoder}.{block.path}" for block in self.shared_blocks)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute scores [n, V] of final hidden states [n, D], including the architecture's scaling and caps."""
        head = _head_only(self.model, self.decoder)
        logits: torch.Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Compute final hidden states [S, D] of token ids [S] at logical positions [S] (int64); append to the cache."""
        out = self.decoder(
            input_ids=token_ids[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=asks_for_caches(self.config),
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden


def states_of(decoder: Any, rows: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """Compute the final states [S, D] of input rows [S, D] at positions [S] (int64); append to the cache.

    Args:
        decoder: decoder of a head, which embeds nothing.
        rows: input rows, in place of embeddings of tokens.
        positions: positions of the rows.
        cache: cache of the head's layers.
    """
    out = decoder(inputs_embeds=rows[None], position_ids=positions[None], past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


def build_skeleton(config: Any, dtype: torch.dtype, attention: AttentionFunction | None = None) -> Skeleton:
    """Build the modules of a configuration, with parameters on meta and real buffers.

    Args:
        config: configuration of the model, not modified.
        dtype: dtype of the parameters.
        attention: attention function that the layers call; None for the architecture's own, if only sizes matter.
    """
    from accelerate import init_empty_weights

    name = "eager" if attention is None else register_attention(attention)
    config = copy.deepcopy(config)  # transformers writes dtype and attention into it, and modules keep it
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    with modules_lock, init_empty_weights(include_buffers=False), _NoValues():
        model = _model_of(config, dtype, name)
    model.tie_weights()  # init_empty_weights has untied them
    return skeleton_of(model.eval())


class _NoValues(TorchFunctionMode):
    """Creates large uninitialized tensors on meta at once, and draws no values for tensors on meta.

    The fused experts of one layer may be larger than the machine's memory, in which the system would refuse them; as
    parameters they end on meta anyway. The first drawing on meta would import torch's compiler, which takes 0.7 s.
    """

    _LARGE = 1 << 28
    _DRAWING = ("torch.nn.init", "transformers.initialization")  # the second replaces the first in some scopes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", "") in self._DRAWING and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        if func is torch.empty and "device" not in kwargs:
            size = kwargs.get("size", args)
            size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            if math.prod(size) > self._LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _model_of(config: Any, dtype: torch.dtype, attention: str) -> Any:
    model_class = text_model_class(config)
    assert model_class is not None, "load_config refuses configurations without a causal LM"
    model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    unclamp_time_steps(model)
    return model


def skeleton_of(model: Any) -> Skeleton:
    """Find the decoder and its layers in a causal LM, and take blocks that layers share out of the layers.

    Raises:
        UnsupportedModelError: no list of decoder layers in the decoder.
    """
    found = model.get_decoder()
    # With some names of submodules, transformers returns the whole model.
    decoders = [found] if found is not model else list(model.children())
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for decoder in decoders:
        in_decoder = {id(module) for module in decoder.modules()}
        for name, module in model.named_modules():
            is_list = isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
            if is_list and id(module) in in_decoder:
                shared = take_out_shared_blocks(decoder, module, path_of(decoder, module))
                return Skeleton(model.config, model, decoder, module, name, shared)
    raise UnsupportedModelError(f"'{model.config.model_type}' has no plain list of decoder layers")


def path_of(model: Any, part: Any) -> str:
    """Return the path of a module within a model."""
    return next(path for path, module in model.named_modules() if module is part)


def norm_like(norm: Any, width: int) -> Any:
    """Return a norm of the same kind without weights, for rows of another width."""
    twin = copy.deepcopy(norm)
    twin.weight = torch.nn.Parameter(torch.empty(width, device="meta", dtype=norm.weight.dtype), requires_grad=False)
    return twin


def lookup_embeddings(skeleton: Skeleton) -> Any | None:
    """Return the input embeddings if their weights are only used to look up tokens, so no head shares them."""
    try:
        module = skeleton.model.get_input_embeddings()
    except NotImplementedError:  # an architecture that does not name its embeddings
        return None
    own = next(module.parameters(), None)
    uses = [p for _, p in skeleton.model.named_parameters(remove_duplicate=False) if p is own]
    return module if len(uses) == 1 else None


def head_names(skeleton: Skeleton) -> tuple[str, ...]:
    """Return the parameters that may hold the head's matrix, in order of preference if a checkpoint has both."""
    model = skeleton.model
    head, inputs = f"{path_of(model, model.get_output_embeddings())}.weight", model.get_input_embeddings()
    if inputs is None:  # of a head with the target's embeddings
        return (head,)
    embedding = f"{path_of(model, inputs)}.weight"
    return (embedding, head) if getattr(skeleton.config, "tie_word_embeddings", False) else (head, embedding)


class _Output(tuple[torch.Tensor, ...]):
    """The output of a decoder: hidden states; everything else that a head may copy from it is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """Final hidden states [1, rows, D]."""
        return self[0]

    def __getattr__(self, _: str) -> None:
        return None


class _GivenHidden(torch.nn.Module):
    """A replacement of the decoder that returns the hidden states that it receives; some heads pass ids by position.

    Args:
        decoder: decoder whose other attributes heads may read, such as factors.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.__dict__["_decoder"] = decoder  # not as a submodule, whose parameters would be listed twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Output:
        return _Output((inputs_embeds,))


def _head_only(model: Any, decoder: Any) -> Any:
    """Return a shallow copy of `model` that shares all weights and skips the decoder."""
    head = getattr(model, "_specchat_head", None)
    if head is None:
        head = _replaced(model, path_of(model, decoder).split("."), _GivenHidden(decoder))
        object.__setattr__(model, "_specchat_head", head)  # not as a submodule, whose parameters would be listed twice
    return head


def _replaced(module: Any, path: list[str], part: Any) -> Any:
    """Return a shallow copy of `module` with `part` at `path`; everything beside the path is shared."""
    if not path:
        return part
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._modules[path[0]] = _replaced(module._modules[path[0]], path[1:], part)
    return twin


def with_modules(skeleton: Skeleton, modules: Mapping[str, Any], embeddings: Any | None = None) -> Skeleton:
    """Return a skeleton that shares everything with the given one, but for some of its modules.

    Args:
        skeleton: skeleton to share.
        modules: modules to put in, by path.
        embeddings: input embeddings to put in; None to share them.
    """
    model, decoder = skeleton.model, path_of(skeleton.model, skeleton.decoder)
    if embeddings is not None:
        modules = {**modules, path_of(model, model.get_input_embeddings()): embeddings}
    for path, module in modules.items():
        model = _replaced(model, path.split("."), module)
    layers = model.get_submodule(skeleton.layers_name)
    return replace(skeleton, model=model, decoder=model.get_submodule(decoder), layers=layers)


def build_random(
    config: Any, generator: torch.Generator, attention: AttentionFunction
) -> tuple[Skeleton, Callable[[torch.Tensor], torch.Tensor]]:
    """Build a float32 model of a configuration with random weights, and its plain forward.

    Args:
        config: configuration of the model.
        generator: generator of the weights.
        attention: attention function that the skeleton's layers call.

    Returns:
        Skeleton, here with real weights, and a function from token ids [S] to logits [S, V] by the architecture's own
        eager attention. Call the function before the layers are wrapped for trees.
    """
    registered = register_attention(attention)
    model = _model_of(config, torch.float32, registered).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                std = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
            elif "sinks" in name:
                parameter.normal_(0.0, 1.0, generator=generator)

    def plain(token_ids: torch.Tensor) -> torch.Tensor:
        model.set_attn_implementation("eager")
        logits: torch.Tensor = model(token_ids[None], use_cache=False).logits[0]
        model.set_attn_implementation(registered)
        return logits

    return skeleton_of(model), plain
