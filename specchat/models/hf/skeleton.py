"""Modules without weights: a causal LM on the meta device, its decoder layers and its head."""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from specchat.errors import UnsupportedModelError
from specchat.models.hf.attention import AttentionFunction, register_attention

# Making a model on meta patches torch's Module for the whole process while it lasts, so a thread that sets parameters
# meanwhile would lose them.
modules_lock = threading.RLock()


@dataclass(frozen=True)
class Skeleton:
    """A causal LM whose parameters are still on torch's meta device.

    Attributes:
        config: its configuration.
        model: the whole module.
        decoder: input ids to final hidden states.
        layers: the decoder layers, in order.
        layers_name: their path in `model`, such as "model.layers".
    """

    config: Any
    model: Any
    decoder: Any
    layers: Any
    layers_name: str

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [n, V] of hidden states [n, D], with whatever the architecture does between the two."""
        head = _head_only(self.model, self.decoder)
        logits: torch.Tensor = head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Final hidden states [S, D] of token ids [S] at logical positions [S] (both int64), appended to the cache."""
        out = self.decoder(
            input_ids=token_ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden


def build_skeleton(config: Any, dtype: torch.dtype, attention: AttentionFunction | None = None) -> Skeleton:
    """Build the modules of a configuration, with parameters on meta and real buffers.

    Args:
        config: the model's configuration, which stays as it is.
        dtype: of the parameters.
        attention: the function that the layers call; None for the architecture's own, where only sizes matter.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    name = "eager" if attention is None else register_attention(attention)
    config = copy.deepcopy(config)  # transformers writes dtype and attention into it, and modules go by it ever after
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    with modules_lock, init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name)
    model.tie_weights()  # making parameters empty has untied them
    return skeleton_of(model.eval())


def skeleton_of(model: Any) -> Skeleton:
    """Finds decoder and layers in a causal LM.

    Raises:
        UnsupportedModelError: there is no list of decoder layers where one is expected.
    """
    decoder = model.get_decoder()
    in_decoder = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        is_list = isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers
        if is_list and id(module) in in_decoder:
            return Skeleton(model.config, model, decoder, module, name)
    raise UnsupportedModelError(f"'{model.config.model_type}' has no plain list of decoder layers")


def path_of(model: Any, part: Any) -> str:
    """Where a module is within another."""
    return next(path for path, module in model.named_modules() if module is part)


def lookup_embeddings(skeleton: Skeleton) -> Any | None:
    """The module of the input embeddings, if nothing but looking up tokens uses its weights: no head shares them."""
    try:
        module = skeleton.model.get_input_embeddings()
    except NotImplementedError:  # an architecture that does not tell
        return None
    uses = [p for _, p in skeleton.model.named_parameters(remove_duplicate=False) if p is module.weight]
    return module if len(uses) == 1 else None


def head_names(skeleton: Skeleton) -> tuple[str, ...]:
    """The parameters that the head's matrix may be read from, the right one first if a checkpoint has several."""
    model = skeleton.model
    head, embedding = (
        f"{path_of(model, module)}.weight" for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    return (embedding, head) if getattr(skeleton.config, "tie_word_embeddings", False) else (head, embedding)


class _GivenHidden(torch.nn.Module):
    """Stands in the decoder's place and returns the hidden states it is given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _head_only(model: Any, decoder: Any) -> Any:
    """A shallow copy of `model`, sharing all weights, whose decoder is skipped."""
    head = getattr(model, "_specchat_head", None)
    if head is None:
        head = copy.copy(model)
        head._modules = dict(model._modules)
        name = next(name for name, child in model.named_children() if child is decoder)
        head._modules[name] = _GivenHidden()
        object.__setattr__(model, "_specchat_head", head)  # not a submodule: it would be walked twice
    return head


def build_random(
    config: Any, generator: torch.Generator, attention: AttentionFunction
) -> tuple[Skeleton, Callable[[torch.Tensor], torch.Tensor]]:
    """Build a float32 model of a configuration with random weights, and its plain forward.

    Args:
        config: the model's configuration.
        generator: source of the weights.
        attention: the function that the skeleton's layers call.

    Returns:
        The skeleton (with real weights here), and a function from token ids [S] to logits [S, V] by the architecture's
        own eager attention; to be called before the layers are wrapped for trees.
    """
    from transformers import AutoModelForCausalLM

    registered = register_attention(attention)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=registered).eval()
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
