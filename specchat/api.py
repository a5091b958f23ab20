"""specchat from Python: load a model, chat with it, let it write; no terminal is involved."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack

from specchat.chat.answer import Answer, Delta
from specchat.chat.reasoning import Parts, PlainText, ThinkTags
from specchat.chat.session import check_has_template
from specchat.chat.text import Detokenizer, StopStrings
from specchat.closing import Closeable
from specchat.engine.engine import Engine
from specchat.errors import EmptyPromptError, UsageError
from specchat.loading.engine import load_engine, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.planning import make_plan
from specchat.loading.request import Ask, ModelRequest
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.checkpoint.generation_config import GenerationDefaults, load_generation_defaults
from specchat.models.hf.tokenizer import Tokenizer, load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import FinishReason, Sampling
from specchat.records.model import Dtype, Quant
from specchat.records.plan import Plan, PlanChoices
from specchat.units import parse_size

_ROLES: tuple[Literal["system", "user", "assistant"], ...] = ("system", "user", "assistant")


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn.

    Attributes:
        temperature: divisor of the scores; 0 is greedy.
        top_p: probability mass of the tokens that are kept.
        top_k: number of the tokens that are kept; 0 keeps all.
        min_p: least probability of a kept token, relative to the best one.
        repetition_penalty: divisor for tokens that the text has already; 1 is none.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float


def load(
    model: str,
    *,
    draft: str = "auto",
    device: str = "auto",
    vram: int | str | None = None,
    ram: int | str | None = None,
    ctx: int | None = None,
    tree_budget: int | None = None,
    dtype: Literal["auto"] | Dtype = "auto",
    quant: Literal["auto"] | Quant = "auto",
    draft_quant: Literal["auto"] | Quant = "auto",
    offline: bool = False,
    confirm: Ask = lambda _question: True,
) -> "Model":
    """Find, plan and load a model; what is missing is downloaded.

    Args:
        model: MODEL as on the command line: demo, a folder, org/name, or a shape.
        draft: model that guesses, or auto, or none.
        device: auto, cpu, cuda or cuda:N.
        vram: device memory budget, in bytes or as text such as "8GiB"; None takes what is free.
        ram: cap on host memory, likewise.
        ctx: tokens that prompt and answer can have together; None takes the usual.
        tree_budget: draft nodes per tree; None adapts it while running.
        dtype: dtype of weights, activations and caches.
        quant: quantization of the target's matrices.
        draft_quant: quantization of the draft's matrices; it never changes the text.
        offline: whether the network must not be touched.
        confirm: receives a question before a download; False refuses it.

    Raises:
        SpecchatError: with a message and a hint; see `specchat.errors`.
    """
    choices = PlanChoices(
        device=device,
        dtype=dtype,
        vram_bytes=_bytes("vram", vram),
        ram_bytes=_bytes("ram", ram),
        ctx=ctx,
        tree_budget=tree_budget,
        quant=quant,
        draft_quant=draft_quant,
    )
    request = ModelRequest(model, draft, choices, offline)
    prepare_libraries()
    reporter = _Warnings()
    models = locate_models(request, parse_models(request), reporter, confirm)
    planned = make_plan(request, models, reporter)
    tokenizer = load_tokenizer(models.target.path)
    engine = load_engine(request, planned.models, planned.plan, reporter)
    return Model(engine, tokenizer, load_generation_defaults(models.target.path))


class Model(Closeable):
    """A loaded model: one answer at a time, all memory held until `close`.

    Args:
        engine: engine of the model.
        tokenizer: tokenizer of the target.
        defaults: recommendations of the model's makers for sampling.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, defaults: GenerationDefaults) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._stop_ids = stop_ids(defaults, tokenizer)

    @property
    def plan(self) -> Plan:
        """The plan that the engine runs under."""
        return self._engine.plan

    def close(self) -> None:
        """Free all memory and end all threads."""
        self._engine.close()

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        think: bool | None = None,
        seed: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> "Answering":
        """Answer the last message of a chat.

        The tokens that this chat shares with the last one are not read again.

        Args:
            messages: the whole chat; each has a "role" (system, user, assistant) and a "content".
            max_tokens: longest answer; None for as long as the context allows.
            stop: strings that end the answer and are cut off it.
            think: the template's switch for thinking; None leaves it alone.
            seed: key of the draws.
            **sampling: values of `SamplingOptions`; the model's own values hold where they are left out.

        Returns:
            The pieces of the answer, an iterator that computes while it is read.

        Raises:
            EmptyPromptError: no message.
            UsageError: the model was not made for chats, or its template refuses these messages.
            PromptTooLongError: the chat leaves no room for an answer.
        """
        check_has_template(self._tokenizer, base=False)
        text = self._tokenizer.render([_message(each) for each in messages], thinking=think) if messages else ""
        if not text:
            raise EmptyPromptError("there is no message to answer")
        parser = self._tokenizer.response_parser(text)
        parts = Parts(parser or ThinkTags(opened=text.rstrip().endswith("<think>")), continuing=False)
        ids = self._tokenizer.encode(text)
        return self._answering(ids, parts, parser is None, stop, max_tokens, self._sampling(sampling, seed))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        **sampling: Unpack[SamplingOptions],
    ) -> "Answering":
        """Continue a text, or token ids, without a chat template.

        Args:
            prompt: text, or token ids of the target.
            max_tokens: longest continuation; None for as long as the context allows.
            stop: strings that end the continuation and are cut off it.
            seed: key of the draws.
            **sampling: values of `SamplingOptions`; the model's own values hold where they are left out.

        Returns:
            The pieces of the continuation, an iterator that computes while it is read.

        Raises:
            EmptyPromptError: the prompt has no tokens.
            PromptTooLongError: the prompt leaves no room.
        """
        ids = self._tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise EmptyPromptError("the prompt is empty")
        parts = Parts(PlainText(), continuing=False)
        return self._answering(ids, parts, True, stop, max_tokens, self._sampling(sampling, seed))

    def _sampling(self, sampling: SamplingOptions, seed: int) -> Sampling:
        return resolve_sampling(SamplingChoices(**sampling), self._defaults, seed)

    def _answering(
        self,
        ids: list[int],
        parts: Parts,
        skip_special_tokens: bool,
        stop: Sequence[str],
        max_tokens: int | None,
        sampling: Sampling,
    ) -> "Answering":
        answer = Answer(
            detokenizer=Detokenizer(self._tokenizer, skip_special_tokens=skip_special_tokens),
            parts=parts,
            stops=StopStrings(stop),
            stop_ids=self._stop_ids,
            submitted=time.perf_counter(),
        )
        return Answering(self._engine, answer, ids, sampling, max_tokens)


class Answering(Iterator[Delta]):
    """An answer while it is written: iterate over its pieces, or call `read`.

    Args:
        engine: engine that writes the tokens.
        answer: sums of the answer so far.
        ids: token ids of the prompt.
        sampling: how tokens are drawn.
        max_tokens: longest answer; None for as long as the context allows.
    """

    def __init__(
        self, engine: Engine, answer: Answer, ids: list[int], sampling: Sampling, max_tokens: int | None
    ) -> None:
        self._answer = answer
        self._pieces = self._write(engine, ids, sampling, max_tokens)

    def __next__(self) -> Delta:
        """Return the next piece: new text, new token ids, and whether they are thinking or answer."""
        return next(self._pieces)

    def read(self) -> str:
        """Write the answer to its end and return its whole text, without the thinking."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Stop writing; what was written stays."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """The answer so far, without special tokens, stop string and thinking."""
        return self._answer.text("answer")

    @property
    def reasoning(self) -> str:
        """The thinking so far."""
        return self._answer.text("reasoning")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids written so far, the stop token included."""
        return tuple(self._answer.token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended: stop, length or context; None while it is written."""
        return self._answer.finish_reason

    def _write(
        self, engine: Engine, ids: list[int], sampling: Sampling, max_tokens: int | None
    ) -> Generator[Delta, None, None]:
        answer = self._answer
        for step in engine.generate(ids, sampling, stop_ids=answer.stop_ids, max_tokens=max_tokens):
            if step.draft_lost is not None:
                warnings.warn(step.draft_lost, stacklevel=3)
            yield from answer.take(step)
            if answer.cut_by_stop_string:
                break
        yield from answer.finish()


class _Warnings:
    """Reports warnings through Python's own, and no progress."""

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda _done, _total: None

    def warn(self, text: str) -> None:
        warnings.warn(text, stacklevel=4)


def _bytes(name: str, size: int | str | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size


def _message(values: Mapping[str, str]) -> Message:
    role = values.get("role")
    for known in _ROLES:
        if role == known and isinstance(values.get("content"), str):
            return Message(known, values["content"], values.get("reasoning"))
    raise UsageError(
        f"not a chat message: {dict(values)!r}", hint='{"role": "user", "content": "..."}; roles: ' + ", ".join(_ROLES)
    )
