"""From a client's request to one for the engine: sampling, token ids, and the answer's parsers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

from specchat.chat.answer import Answer
from specchat.chat.prompt import Prompt, check_has_template, ending_after
from specchat.chat.reasoning import Parser, Parts, PlainText
from specchat.chat.settings import random_seed
from specchat.chat.text import Detokenizer, StopStrings
from specchat.engine.requests import why_refused
from specchat.errors import EmptyPromptError, SpecchatError
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.records.chat import Message
from specchat.records.generation import Request
from specchat.records.plan import Plan
from specchat.serve.asked import Asked
from specchat.serve.errors import of_specchat

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServerDefaults:
    """Values of the command line for what a client leaves open.

    Attributes:
        sampling: sampling values; None leaves a value to the model.
        max_tokens: most tokens of an answer, or None.
        thinking: value of the chat template's thinking switch, or None.
    """

    sampling: SamplingChoices = field(default_factory=SamplingChoices)
    max_tokens: int | None = None
    thinking: bool | None = None


class Preparer:
    """Prepares requests for the engine.

    Args:
        tokenizer: tokenizer of the target.
        model_defaults: the model's generation_config.
        stop_ids: token ids that end an answer.
        plan: plan of the engine.
        vocab_size: number of tokens for which the target has an embedding.
        defaults: values for what a client leaves open.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_defaults: GenerationDefaults,
        stop_ids: frozenset[int],
        plan: Plan,
        vocab_size: int,
        defaults: ServerDefaults,
    ) -> None:
        self._tokenizer = tokenizer
        self._model_defaults = model_defaults
        self._stop_ids = stop_ids
        self._plan = plan
        self._vocab_size = vocab_size
        self._defaults = defaults
        tokenizer.encode(" ")  # the first call may change the tokenizer, which other threads must not see

    def prepare(self, asked: Asked) -> tuple[Request, Answer]:
        """Return the request for the engine, and the empty answer.

        Raises:
            ApiError: the template rejects the chat, or the prompt cannot be answered.
        """
        try:
            prompt, parts, skips_special_tokens = self._read(asked)
            request = self._request(asked, prompt)
            refusal = why_refused(request, self._plan, self._vocab_size)
        except SpecchatError as error:
            raise of_specchat(error, asked.prompt_field) from error
        if refusal is not None:
            raise of_specchat(refusal, asked.prompt_field)
        answer = Answer(
            detokenizer=Detokenizer(self._tokenizer, skip_special_tokens=skips_special_tokens),
            parts=parts,
            stops=StopStrings(asked.stops),
            stop_ids=self._stop_ids,
            submitted=time.perf_counter(),
        )
        return request, answer

    def _read(self, asked: Asked) -> tuple[Prompt, Parts, bool]:
        """Return the prompt, the parser of its answer, and whether the parser cannot see special tokens."""
        if not asked.is_chat:
            text = asked.prompt if isinstance(asked.prompt, str) else ""
            ids = self._encode(text, alone=True) if text else [each for each in asked.prompt if isinstance(each, int)]
            return _checked(Prompt((), "", None, text, ids)), Parts(PlainText()), True
        prompt = self._chat([each for each in asked.prompt if isinstance(each, Message)], asked.thinking)
        parser = self._tokenizer.response_parser(prompt.text)
        tags: Parser = parser or prompt.think_tags()
        return prompt, Parts(tags), parser is None

    def _chat(self, messages: Sequence[Message], thinking: bool | None) -> Prompt:
        check_has_template(self._tokenizer, base=False)
        thinking = self._defaults.thinking if thinking is None else thinking
        text = self._tokenizer.render(messages, thinking=thinking)
        ending = ending_after(self._tokenizer.render(messages, ending="none", thinking=thinking), text)
        ending_ids = self._encode(ending) if ending else []
        return _checked(Prompt((), "", None, text, self._encode(text), ending_ids))

    def _encode(self, text: str, *, alone: bool = False) -> list[int]:
        """Return the token ids of a text; one without a chat template starts with the tokenizer's special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=alone)

    def _request(self, asked: Asked, prompt: Prompt) -> Request:
        given = {name: value for name, value in asdict(asked.sampling).items() if value is not None}
        seed = random_seed() if asked.seed is None else asked.seed
        return Request(
            prompt_ids=tuple(prompt.ids),
            sampling=resolve_sampling(replace(self._defaults.sampling, **given), self._model_defaults, seed),
            stop_ids=self._stop_ids,
            max_tokens=self._defaults.max_tokens if asked.max_tokens is None else asked.max_tokens,
            cancel=Event(),
            restore_at=prompt.restore_at,
        )


def _checked(prompt: Prompt) -> Prompt:
    if not prompt.ids:
        raise EmptyPromptError("the model's tokenizer makes no tokens of the prompt")
    return prompt
