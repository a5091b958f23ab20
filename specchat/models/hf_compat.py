"""Every call whose behaviour depends on the version of transformers; nothing else imports it.

Written against transformers 5.17 to 5.23. What is leaned on and not promised by its makers: the attention and mask
registries, the cache layer protocol, the weight conversion mapping, the order of logits processors.
"""

import copy
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from specchat.config import KvShape, Message, Part, Sampling
from specchat.errors import CorruptCheckpointError, UnsupportedModelError, UsageError, is_lack_of_memory
from specchat.models.checkpoint.json_file import read_json
from specchat.models.quantized import Matrix, experts_forward

# --- tokenizer ---------------------------------------------------------------------------------------------------


class Tokenizer:
    """A model's tokenizer and chat template, as far as specchat needs them."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chats (base models were not)."""
        return bool(self._hf.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence id, if the tokenizer names one."""
        token_id = self._hf.eos_token_id
        return None if token_id is None else int(token_id)

    @property
    def backend(self) -> Any | None:
        """The `tokenizers.Tokenizer` underneath, or None for a tokenizer written in Python."""
        return getattr(self._hf, "backend_tokenizer", None)

    @cached_property
    def thinking_switch(self) -> str | None:
        """The name of the template's variable that switches thinking on and off, if it has one."""
        return next((name for name in _THINKING_SWITCHES if name in self._template_variables()), None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        ending: Literal["answer", "continue", "none"] = "answer",
        thinking: bool | None = None,
    ) -> str:
        """The chat as the model's template writes it.

        Args:
            messages: all of it, the system prompt first.
            ending: up to where the next answer starts, or to where the last message leaves off, or no further.
            thinking: the template's switch for thinking; without effect where there is none.

        Raises:
            UsageError: the template refuses these messages (a system prompt it has no place for, say).
        """
        import jinja2

        turns = [_as_turn(message) for message in messages]
        if ending == "continue":
            _mark_end(turns[-1])
        switches = {} if thinking is None or self.thinking_switch is None else {self.thinking_switch: thinking}
        try:
            text = self._hf.apply_chat_template(
                turns, add_generation_prompt=ending == "answer", tokenize=False, **switches
            )
        except jinja2.TemplateError as error:
            raise UsageError(f"the model's chat template refuses this chat: {error}") from error
        assert isinstance(text, str)
        return _up_to_mark(text) if ending == "continue" else text

    def response_parser(self, prompt: str) -> "ResponseParser | None":
        """What finds thinking and answer in the model's text, if it has a format that is described.

        Args:
            prompt: the rendered chat, which may begin the answer.
        """
        template = getattr(self._hf, "response_template", None) or self._known_format()
        return None if template is None else ResponseParser(self._hf, template, prompt)

    def _known_format(self) -> Mapping[str, Any] | None:
        """The format of models that need their special tokens to be understood and often ship no description."""
        tokens = set(self._hf.all_special_tokens)
        return _HARMONY if {"<|channel|>", "<|message|>"} <= tokens else None

    def _template_variables(self) -> set[str]:
        """What the template asks of its caller, besides messages."""
        import jinja2
        from jinja2.meta import find_undeclared_variables

        template = self._hf.get_chat_template() if self.has_chat_template else ""
        # blocks that mark answers for training mean nothing to plain jinja2
        template = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateError:  # rendering it will say what is wrong
            return set()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised, none is added unless asked."""
        ids = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, exactly as the tokenizer joins it (no clean-up of spaces)."""
        text = self._hf.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def vocabulary(self) -> Mapping[str, int]:
        """Every token and its id."""
        vocabulary: dict[str, int] = self._hf.get_vocab()
        return vocabulary


# What templates call the variable that switches thinking (Qwen3, GLM-4.5, SmolLM3; Granite, DeepSeek-V3.1).
_THINKING_SWITCHES = ("enable_thinking", "thinking")

# Marks in a rendered chat where the message to be continued leaves off.
_END_MARK = "[the message goes on here]"

# OpenAI's harmony format (gpt-oss): channels for thinking and answer, told apart by special tokens only.
_HARMONY: Mapping[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "reasoning_content": {
            "open_pattern": r"<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>",
            "close": ["<|end|>", "<|call|>"],
            "repeats": True,
            "join": "\n",
            "content": "text",
        },
        "content": {"open_pattern": r"<\|channel\|>final[^<]*<\|message\|>", "close": ["<|return|>", "<|end|>"]},
    },
}
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def _as_turn(message: Message) -> dict[str, str]:
    """A message in the words of templates, which have several for thinking."""
    turn = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn |= dict.fromkeys(_REASONING_FIELDS, message.reasoning)
    return turn


def _mark_end(turn: dict[str, str]) -> None:
    """Marks where the message leaves off: in its thinking, if it did not get further."""
    thinks = not turn["content"] and turn.get(_REASONING_FIELDS[0])
    for name in _REASONING_FIELDS if thinks else ("content",):
        turn[name] += _END_MARK


def _up_to_mark(text: str) -> str:
    # transformers' continue_final_message does the same, but not for thinking in all versions, and it drops blanks
    # at the end that the continued text then has twice.
    begin, found, _ = text.rpartition(_END_MARK)
    if not found:
        raise UsageError("the model's chat template cannot show this answer unfinished, so it cannot be continued")
    return begin


class ResponseParser:
    """Cuts a model's text, special tokens included, into thinking and answer, as its format is described.

    Args:
        hf: the tokenizer.
        template: transformers' description of the format.
        prompt: the rendered chat, which may begin the answer.
    """

    def __init__(self, hf: Any, template: Mapping[str, Any], prompt: str) -> None:
        self._parser = hf.get_response_parser(template, prefix=prompt)
        self._special_tokens = tuple(hf.all_special_tokens)
        self.part: Part = "answer"
        self._pieces(self._parser.initial_events)

    def feed(self, text: str) -> list[tuple[Part, str]]:
        """The pieces that are certain after `text`; an empty one says that a part begins."""
        return self._pieces(self._parser.feed(text))

    def finish(self) -> list[tuple[Part, str]]:
        """What was held back, at the end of the text."""
        try:
            _, events = self._parser.finalize()
        except ValueError:  # a part that must be there is not: nothing to a chat
            return []
        return self._pieces(events)

    def _pieces(self, events: Iterable[Mapping[str, Any]]) -> list[tuple[Part, str]]:
        pieces: list[tuple[Part, str]] = []
        for event in events:
            part: Part = "reasoning" if event["field"] in _REASONING_FIELDS else "answer"
            self.part = "answer" if event["type"] == "region_close" else part
            if event["type"] != "region_close":
                pieces.append((part, self._without_special_tokens(event.get("text", ""))))
        return pieces

    def _without_special_tokens(self, text: str) -> str:
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder; never remote code, never the network.

    Raises:
        CorruptCheckpointError: the files are missing or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorruptCheckpointError(
            f"the tokenizer in {folder} cannot be read: {reason}", hint="download or copy the model's folder again"
        ) from error


# --- sampling ---------------------------------------------------------------------------------------------------


def logits_processors(sampling: Sampling) -> Any:
    """The processors of transformers in its order: penalty, then (if sampling) temperature, top-k, top-p, min-p.

    Returns:
        A callable (input_ids int64 [B, S], scores float32 [B, V]) -> scores float32 [B, V].

    Source: transformers' GenerationMixin._get_logits_processor; a test compares the two.
    """
    import transformers as hf

    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    if sampling.greedy:
        return processors
    if sampling.temperature != 1.0:
        processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(hf.MinPLogitsWarper(sampling.min_p))
    return processors


# --- configuration ------------------------------------------------------------------------------------------------

_QUANTIZATION = ("quantization_config", "compression_config")
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_REFUSED = "use a model whose layers are all attention with rotary positions, such as Llama, Qwen3 or Gemma"


def load_config(folder: Path) -> Any:
    """The model's configuration, checked against what the engine can verify trees on.

    Raises:
        CorruptCheckpointError: config.json is not a configuration.
        UnsupportedModelError: remote code, several modalities, recurrent layers, ALiBi, or an unknown architecture.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    values = read_json(folder / "config.json")
    kind = values.get("model_type", "unknown")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "model_type" in values and kind not in _known_model_types():
            raise UnsupportedModelError(
                f"model type '{kind}' is not supported", hint="specchat runs no code from model folders"
            ) from error
        raise CorruptCheckpointError(f"{folder / 'config.json'} is not a model's configuration: {error}") from error
    if "text_config" in values:
        raise UnsupportedModelError(f"'{kind}' is a multimodal model: only text models are supported yet")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"'{kind}' is not a model that writes text")
    for name in _QUANTIZATION:  # ours to read; transformers would look for quantizers of its own
        vars(config).pop(name, None)
    _check_layer_kinds(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    return config


def _known_model_types() -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING

    known: Mapping[str, Any] = CONFIG_MAPPING
    return known


def _check_layer_kinds(config: Any, model_class: Any) -> None:
    kind = config.model_type
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types - _ATTENTION_KINDS or getattr(model_class, "_is_stateful", False):
        names = ", ".join(sorted(layer_types - _ATTENTION_KINDS)) or "recurrent"
        raise UnsupportedModelError(f"'{kind}' has {names} layers, on which specchat cannot verify trees yet", _REFUSED)
    if kind in {"bloom", "mpt"} or getattr(config, "alibi", False):
        raise UnsupportedModelError(f"'{kind}' has ALiBi positions, on which specchat cannot verify trees", _REFUSED)


def max_positions(config: Any) -> int:
    """The longest context, cut below the length at which longrope or dynamic scaling would change old positions."""
    longest = int(config.max_position_embeddings)
    scaling = getattr(config, "rope_parameters", None) or {}
    variants = scaling.values() if all(isinstance(v, dict) for v in scaling.values()) else [scaling]
    for rope in variants:
        if rope and rope.get("rope_type") in {"longrope", "dynamic"}:
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or longest
            longest = min(longest, int(original))
    return longest


def kv_shapes(config: Any) -> tuple[KvShape, ...]:
    """What each layer stores per token. The load-time self-check holds this against the modules themselves."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None) and hasattr(config, "qk_rope_head_dim"):
        shape = KvShape(1, config.kv_lora_rank, config.qk_rope_head_dim)  # latent attention: cached before expansion
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = KvShape(getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)
    return (shape,) * config.num_hidden_layers


def mlp_size(config: Any) -> int:
    """Width of the MLP's inner activation for one row, all active experts together (an upper bound for the ledger)."""
    dense = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    expert = getattr(config, "moe_intermediate_size", None) or dense
    active = getattr(config, "num_experts_per_tok", None) or 1
    return max(dense, int(expert) * int(active))


# --- modules without weights ---------------------------------------------------------------------------------------

ATTENTION = "tree"

# Making a model on meta patches torch's Module for the whole process while it lasts, so a thread that sets parameters
# meanwhile would lose them.
_modules_lock = threading.RLock()


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


def build_skeleton(config: Any, dtype: torch.dtype, attention: str = ATTENTION) -> Skeleton:
    """The modules of `config` (with tree attention, unless only sizes matter); parameters on meta, buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    _register_masks(ATTENTION)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    with _modules_lock, init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
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


# Which experts a row goes to is decided by small differences, and so is how much of a shared expert it gets.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})


def find_matrices(skeleton: Skeleton) -> list[Matrix]:
    """Where a matrix may be stored in a number format: linears and fused experts of the layers, and the head.

    Routers and whatever is more than a plain nn.Linear are left out.
    """
    matrices = []
    for index, layer in enumerate(skeleton.layers):
        for path, module in layer.named_modules(prefix=f"{skeleton.layers_name}.{index}"):
            if type(module) is torch.nn.Linear and path.rpartition(".")[2] not in _ROUTERS:
                matrices.append(Matrix(path, index, (module.out_features, module.in_features)))
            elif _fuses_experts(module):
                matrices += _expert_matrices(path, index, module)
    head = skeleton.model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        matrices.append(Matrix(path_of(skeleton.model, head), None, (head.out_features, head.in_features)))
    return matrices


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


def _fuses_experts(module: Any) -> bool:
    """Whether transformers would let another implementation compute the module's experts."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and not module.has_post_expert_norm


def _expert_matrices(path: str, layer: int, module: Any) -> Iterator[Matrix]:
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        num_experts, *shape = getattr(module, name).shape
        rows, cols = reversed(shape) if module.is_transposed else shape
        yield Matrix(f"{path}.{name}", layer, (rows, cols), num_experts, module.is_transposed)


def use_quantized_experts(skeleton: Skeleton) -> None:
    """Lets modules whose fused experts have been quantized compute with them."""
    for module in skeleton.layers.modules():
        if _fuses_experts(module) and isinstance(module.down_proj, torch.nn.ModuleList):
            module.forward = partial(experts_forward, module)


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


# --- attention, masks, cache ---------------------------------------------------------------------------------------

_row_layout: ContextVar[Any] = ContextVar("row_layout")


@contextmanager
def row_scope(make_mask: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, masks are made by `make_mask(mask_function)`, once per kind of layer and pass.

    The mask function is transformers' own rule for the kind (causal, sliding, chunked): (batch, head, query position,
    key position) -> bool, broadcast over tensors.
    """
    token = _row_layout.set(make_mask)
    try:
        yield
    finally:
        _row_layout.reset(token)


def use_attention(function: Callable[..., Any]) -> None:
    """Names the attention that skeletons are built with; called once, by the engine."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, function)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Another attention that skeletons can be built with; its masks are made by `row_scope`, too."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    _register_masks(name)


def _register_masks(name: str) -> None:
    from transformers import AttentionMaskInterface

    def make_mask(*, mask_function: Any, **_: Any) -> Any:
        return _row_layout.get()(mask_function)

    AttentionMaskInterface.register(name, make_mask)


def cache_for(layers: Sequence[Any]) -> Any:
    """Presents key-value buffers (with `length`, `capacity` and `append`) as a transformers cache."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, kv: Any) -> None:
            super().__init__()
            self.kv = kv
            self.is_initialized = True

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            raise AssertionError("buffers are made before the first pass")

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            keys, values = self.kv.append(key_states, value_states)
            return keys, values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.kv.length + query_length, 0

        def get_seq_length(self) -> int:
            return int(self.kv.length)

        def get_max_length(self) -> int:
            return int(self.kv.capacity)

    return Cache(layers=[Layer(kv) for kv in layers])


# --- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightPlan:
    """Which checkpoint tensors fill which parameters.

    Attributes:
        direct: per layer, parameter or buffer name within the layer -> checkpoint key, where a copy is enough.
        converted: per layer, the parameters that transformers merges from several tensors (fused experts), by name
            within the layer (the first one, where one conversion fills several), and the checkpoint keys of each.
        rest: checkpoint keys of everything outside the layers -> parameter or buffer.
        places: checkpoint key -> where it is in its parameter, of those in `converted` that are only put together.
    """

    direct: tuple[Mapping[str, str], ...]
    converted: tuple[Mapping[str, Sequence[str]], ...]
    rest: Mapping[str, str]
    places: Mapping[str, "ModulePlace"]


def plan_weights(skeleton: Skeleton, keys: Iterable[str]) -> WeightPlan:
    """Sorts checkpoint keys by the renaming and conversion rules that transformers has for this architecture."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _weight_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stacking = _stacking(converters)
    known = skeleton.model.state_dict()
    prefix = skeleton.model.base_model_prefix
    places: dict[str, ModulePlace] = {}
    direct: list[dict[str, str]] = [{} for _ in skeleton.layers]
    converted: list[dict[str, list[str]]] = [{} for _ in skeleton.layers]
    rest: dict[str, str] = {}
    in_layer = re.compile(re.escape(skeleton.layers_name) + r"\.(\d+)\.(.+)")
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue  # rotary tables of old checkpoints, heads of other tasks, extra prediction layers
        match = in_layer.fullmatch(name)
        if match is None:
            rest[key] = name
        elif pattern is None:
            direct[int(match[1])][match[2]] = key
        else:
            converted[int(match[1])].setdefault(match[2], []).append(key)
            if pattern in stacking:
                places[key] = _place(name, key, pattern, stacking[pattern])
    return WeightPlan(tuple(direct), tuple(converted), rest, places)


@dataclass(frozen=True)
class ModulePlace:
    """Where in the model a matrix of the checkpoint belongs.

    Attributes:
        path: of a module with a `weight`, or of the parameter that fuses the matrices of experts.
        expert: which of them; 0 for others.
        part: which of the parts that are put together, from the first row to the last.
        num_parts: how many there are, of equal size.
    """

    path: str
    expert: int = 0
    part: int = 0
    num_parts: int = 1


def locate_modules(skeleton: Skeleton, modules: Iterable[str]) -> dict[str, ModulePlace]:
    """Finds the places of a checkpoint's modules that have a `weight`, by the rules of `plan_weights`.

    Args:
        skeleton: nothing in it has been replaced.
        modules: their paths in the checkpoint.

    Returns:
        By module; those that the model does not have, or merges in ways unknown here, are left out.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _weight_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stacking = _stacking(converters)
    known = skeleton.model.state_dict()
    places = {}
    for module in modules:
        key = f"{module}.weight"
        name, pattern = rename_source_key(key, renamings, converters, skeleton.model.base_model_prefix, known)
        if name not in known:
            continue
        if pattern is None:
            places[module] = ModulePlace(name.removesuffix(".weight"))
        elif pattern in stacking:
            places[module] = _place(name, key, pattern, stacking[pattern])
    return places


def _place(name: str, key: str, pattern: str, converter: Any) -> ModulePlace:
    """Where a tensor of one expert belongs, by the rule that it goes through."""
    expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    assert expert is not None
    patterns = converter.source_patterns
    return ModulePlace(name, int(expert[1]), patterns.index(pattern), len(patterns))


def _stacking(converters: Iterable[Any]) -> dict[str, Any]:
    """The rules that only put experts' tensors together, by what they ask for."""
    return {pattern: entry for entry in converters if _stacks(entry) for pattern in entry.source_patterns}


def _stacks(converter: Any) -> bool:
    """Whether tensors of experts are stacked, after those of one expert were put one above the other."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _weight_mapping(skeleton: Skeleton) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(skeleton.model)
    return mapping


class TensorWhenAsked:
    """A tensor that is read when a conversion gets to it, and forgotten by whoever holds only this.

    Args:
        read: returns it.
    """

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


def load_converted(
    skeleton: Skeleton, tensors: Mapping[str, torch.Tensor | TensorWhenAsked], dtype: torch.dtype
) -> None:
    """Loads checkpoint tensors into the skeleton's parameters through transformers' conversions.

    Raises:
        CorruptCheckpointError: a shape does not fit, or tensors that belong together are not all there.
        MemoryError: there is not enough for a conversion.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(dtype=dtype, weight_mapping=_weight_mapping(skeleton), device_map={"": "cpu"})
    with _modules_lock, _quiet(), _without_threads():
        info, _ = convert_and_load_state_dict_in_model(skeleton.model, dict(tensors), settings)
    if any(_lacks_memory(text) for text in info.conversion_errors.values()):
        raise MemoryError
    problems = [str(p) for p in (*info.mismatched_keys, *info.conversion_errors, *info.error_msgs)]
    if problems:
        raise CorruptCheckpointError(f"tensors do not fit the configuration: {', '.join(sorted(problems)[:3])}")


# Its threads gain nothing here, for tensors are at hand or read in order; and where memory is short, waiting for a
# thread that died on its way has no end.
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def _lacks_memory(trace: str) -> bool:
    """Whether an error, of which transformers keeps only the text, was for lack of memory."""
    return "MemoryError" in trace or is_lack_of_memory(RuntimeError(trace))


@contextmanager
def _without_threads() -> Iterator[None]:
    """No threads of transformers."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers on stderr."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


# --- a small sibling, for the load-time check ----------------------------------------------------------------------


def tiny_config(config: Any) -> Any:
    """A configuration of the same architecture, small enough to run at every load.

    Head dims and layer kinds stay; heads, widths, experts and vocabulary shrink; windows shrink so that they matter.
    """
    tiny = copy.deepcopy(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tiny_kv = min(kv_heads, 2)
    tiny_heads = tiny_kv * min(heads // kv_heads, 4)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = list(getattr(config, "layer_types", None) or [])
    num_layers = max(2, 1 + max((kinds.index(kind) for kind in set(kinds)), default=0))
    values: dict[str, Any] = {
        "num_attention_heads": tiny_heads,
        "num_key_value_heads": tiny_heads if heads == kv_heads else tiny_kv,
        "hidden_size": tiny_heads * head_dim,
        "head_dim": head_dim,
        "num_hidden_layers": min(num_layers, config.num_hidden_layers),
        "layer_types": kinds[:num_layers] or None,
        "vocab_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 8 if getattr(config, "sliding_window", None) else None,
        "attention_chunk_size": 8,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if heads == kv_heads:
        values["num_attention_heads"] = values["num_key_value_heads"] = min(heads, 2)
        values["hidden_size"] = min(heads, 2) * head_dim
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            setattr(tiny, name, value)
    return tiny


def build_random(config: Any, generator: torch.Generator) -> tuple[Skeleton, Callable[[torch.Tensor], torch.Tensor]]:
    """A float32 model of `config` with random weights, and its plain forward.

    Returns:
        The skeleton (with real weights here) for tree attention, and a function from token ids [S] to logits [S, V]
        by the architecture's own eager attention; to be called before the layers are wrapped for trees.
    """
    from transformers import AutoModelForCausalLM

    _register_masks(ATTENTION)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION).eval()
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
        model.set_attn_implementation(ATTENTION)
        return logits

    return skeleton_of(model), plain
