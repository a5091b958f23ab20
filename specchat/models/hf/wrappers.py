"""The text halves of multimodal models: configuration, class and tensor names of the language model in a wrapper."""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from specchat.errors import UnsupportedModelError
from specchat.models.hf.refusals import HAS_ENCODER, HINT

# Where wrappers keep their language model, in today's modules and in older checkpoints.
_TEXT_PREFIXES = (
    "model.language_model.",
    "language_model.",
    "model.text_model.",
    "text_model.",
    "thinker.",
    "model.llm.",
    "llm.",
    "model.decoder.",
)

# Values of the text configuration that the wrapper's own head ignores.
_IGNORED_BY_HEAD: Mapping[str, Mapping[str, float]] = {
    "aya_vision": {"logit_scale": 1.0},
    "cohere2_vision": {"logit_scale": 1.0},
    "granite_speech": {"logits_scaling": 1.0},
    "granite_speech_plus": {"logits_scaling": 1.0},
}

_MARK = "specchat_wrapper"


def text_half(config: Any) -> Any:
    """Return the configuration of the language model in a multimodal configuration, or `config` itself.

    Raises:
        UnsupportedModelError: a multimodal model that does not answer with text, or hides its language model.
    """
    from transformers import GenerationMixin

    text = _text_config(config)
    if text is config:
        return config
    wrapper = _wrapper_class(type(config))
    if wrapper is None:
        raise UnsupportedModelError(f"'{config.model_type}' is not a model that generates text")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"'{config.model_type}' {HAS_ENCODER}", HINT)
    if not issubclass(wrapper, GenerationMixin):
        raise UnsupportedModelError(f"'{config.model_type}' does not write its text token by token")
    setattr(text, _MARK, config.model_type)
    owner = _owner(config, text)
    has_head = _wrapper_class(type(owner)) or wrapper
    if getattr(has_head, "_tied_weights_keys", None):
        text.tie_word_embeddings = bool(getattr(owner, "tie_word_embeddings", False))
    if getattr(text, "dtype", None) is None:
        text.dtype = getattr(config, "dtype", None)
    for name, value in _IGNORED_BY_HEAD.get(config.model_type, {}).items():
        setattr(text, name, value)
    return text


def wrapper_type(config: Any) -> str | None:
    """Return the type of the multimodal model that a text configuration was taken from; None for a text model."""
    found: str | None = getattr(config, _MARK, None)
    return found


def _text_config(config: Any) -> Any:
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several text models
        return config
    is_part = hasattr(text, "model_type") and type(text) is not type(config)
    return text if is_part else config


def _owner(config: Any, text: Any) -> Any:
    """Return the part of a multimodal configuration that holds the text configuration, or `config` itself."""
    for name in config.sub_configs:
        part: Any = getattr(config, name, None)
        if getattr(part, "sub_configs", None) and any(getattr(part, each, None) is text for each in part.sub_configs):
            return part
    return config


def _wrapper_class(config_class: Any) -> Any | None:
    """Return transformers' class of a multimodal model that generates text; None if there is none."""
    from transformers.models.auto import modeling_auto

    for name in ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"):
        mapping = getattr(modeling_auto, name, {})
        if config_class in mapping:
            return mapping[config_class]
    return None


def text_half_class(config: Any) -> Any | None:
    """Return a causal LM around a language model that transformers only has as a part of a multimodal one.

    Returns:
        A class of transformers' kind; None if the module of the multimodal model has no such language model.
    """
    kind = wrapper_type(config)
    if kind is None:
        return None
    from transformers import CONFIG_MAPPING

    wrapper = _wrapper_class(CONFIG_MAPPING[kind])
    decoder = None if wrapper is None else _decoder_class(wrapper.__module__, type(config))
    return None if decoder is None else _with_head(decoder)


def _decoder_class(module: str, config_class: Any) -> Any | None:
    """Return the class of token embeddings, layers and final norm that takes a text configuration."""
    from transformers import PreTrainedModel

    modules = [importlib.import_module(module)]
    if config_class.__module__.startswith("transformers.models."):
        own = config_class.__module__.replace(".configuration_", ".modeling_")
        modules += [importlib.import_module(own)] if importlib.util.find_spec(own) else []
    for each in modules:
        for name, found in vars(each).items():
            is_model = inspect.isclass(found) and issubclass(found, PreTrainedModel)
            if is_model and found.config_class is config_class and name.endswith("Model") and "PreTrained" not in name:
                return found
    return None


@cache
def _with_head(decoder: Any) -> Any:
    """Return a causal LM class: `decoder` as `model`, and a head."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    base = next(each for each in decoder.__mro__[1:] if each.__name__.endswith("PreTrainedModel"))

    class TextHalf(base):  # type: ignore[misc,valid-type]
        base_model_prefix = "model"
        _tied_weights_keys: Mapping[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            hidden = self.model(input_ids=input_ids, **kwargs)[0]
            return CausalLMOutputWithPast(logits=_scaled(self.lm_head(hidden), self.config))

    TextHalf.__name__ = TextHalf.__qualname__ = decoder.__name__.removesuffix("Model") + "ForCausalLM"
    return TextHalf


def _scaled(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Apply the scales and the cap that wrappers' heads apply to logits (Granite, Muse)."""
    logits = logits * (getattr(config, "output_multiplier", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def text_keys(key: str) -> list[str]:
    """Return the names that a tensor of a multimodal checkpoint may have in its text half, likeliest first."""
    inner = [key.removeprefix(prefix) for prefix in _TEXT_PREFIXES if key.startswith(prefix)]
    return [*inner, key]


def wrapper_mapping(config: Any) -> list[Any]:
    """Return transformers' rules for the tensor names of the multimodal model that a text configuration is part of."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = wrapper_type(config)
    if kind is None:
        return []
    from transformers import CONFIG_MAPPING

    wrapper = _wrapper_class(CONFIG_MAPPING[kind])
    by_class = None if wrapper is None else get_checkpoint_conversion_mapping(wrapper.__name__)
    return by_class or get_checkpoint_conversion_mapping(kind) or []
