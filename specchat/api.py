"""Python interface: load a model, chat with it, continue texts."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack

from specchat.chat.answer import Answer, Delta
from specchat.chat.prompt import check_has_template
from specchat.chat.reasoning import Parts, PlainText, ThinkTags
from specchat.chat.text import Detokenizer, StopStrings
from specchat.closing import Closeable
from specchat.engine.engine import Engine
from specchat.errors import EmptyPromptError, UsageError
from specchat.loading.devices import on_named_devices, parse_devices
from specchat.loading.engine import load_engine, stop_ids
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.planning import make_plan
from specchat.loading.request import Ask, ModelRequest
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.loading.tokens import parse_workers, workers_choice
from specchat.models.checkpoint.generation_config import GenerationDefaults, load_generation_defaults
from specchat.models.hf.tokenizer import Tokenizer, load_tokenizer
from specchat.paths import state_folder
from specchat.planner.learning import Learning
from specchat.planner.statistics import AnswerStep
from specchat.records.chat import Message
from specchat.records.generation import FinishReason, Sampling
from specchat.records.model import Dtype, Quant
from specchat.records.plan import Plan, PlanChoices
from specchat.units import parse_size

_ROLES: tuple[Literal["system", "user", "assistant"], ...] = ("system", "user", "assistant")


class SamplingOptions(TypedDict, total=False):
    """Sampling settings.

    Attributes:
        temperature: divisor of the scores; 0 means greedy decoding.
        top_p: probability mass of the kept tokens.
        top_k: number of kept tokens; 0 keeps all.
        min_p: least probability of a kept token, relative to the best one.
        repetition_penalty: divisor for the scores of tokens that occur in the text; 1 means no penalty.
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
    devices: str = "",
    workers: str = "",
    token_file: str | None = None,
    vram: int | str | None = None,
    ram: int | str | None = None,
    ctx: int | None = None,
    tree_budget: int | None = None,
    dtype: Literal["auto"] | Dtype = "auto",
    quant: Literal["auto"] | Quant = "auto",
    draft_quant: Literal["auto"] | Quant = "auto",
    offline: bool = False,
    tokenizer: str | None = None,
    learn: bool = True,
    confirm: Ask = lambda _question: True,
) -> "Model":
    """Find, plan and load a model; download missing files.

    Args:
        model: MODEL as on the command line: demo, a folder, a GGUF file, org/name, or a shape.
        draft: model that drafts trees, or auto, or none.
        device: auto, cpu, cuda or cuda:N.
        devices: devices that share the layers, as for `--devices`; empty for one device.
        workers: other machines that compute layers, as for `--workers`; empty for none.
        token_file: file with the token of the workers; None for the variable SPECCHAT_TOKEN.
        vram: device memory budget, in bytes or as text such as "8GiB"; None uses the free memory.
        ram: cap on host memory, in bytes or as text; None uses the free memory.
        ctx: maximum number of tokens of prompt and answer together; None uses the default.
        tree_budget: draft nodes per tree; None adapts the number while running.
        dtype: dtype of weights, activations and caches.
        quant: quantization of the target's matrices.
        draft_quant: quantization of the draft's matrices; it never changes the text.
        offline: whether network access is forbidden.
        tokenizer: folder or hub id whose tokenizer replaces the one in a GGUF file; None for the file's own.
        learn: whether tokens per pass, times, and numbers of uses of experts are kept for the next plan; never a text.
        confirm: receives a question before a download; a result of False refuses the download.

    Raises:
        SpecchatError: the model cannot be found, planned or loaded; see `specchat.errors`.
    """
    if devices and device != "auto":
        raise UsageError("device and devices cannot be combined", hint="leave one of them out")
    if devices and workers:
        raise UsageError("devices and workers cannot be combined", hint="leave one of them out")
    choices = PlanChoices(
        device=device,
        devices=parse_devices("devices", devices) if devices else (),
        dtype=dtype,
        vram_bytes=_bytes("vram", vram),
        ram_bytes=_bytes("ram", ram),
        ctx=ctx,
        tree_budget=tree_budget,
        quant=quant,
        draft_quant=draft_quant,
    )
    others = workers_choice(parse_workers("workers", workers), token_file) if workers else None
    request = ModelRequest(model, draft, on_named_devices(choices), offline, tokenizer=tokenizer, workers=others)
    prepare_libraries()
    reporter = _Warnings()
    models = locate_models(request, parse_models(request), reporter, confirm)
    planned = make_plan(request, models, reporter)
    of_target = load_tokenizer(models.target.path)
    defaults = load_generation_defaults(models.target.path)
    for line in defaults.ignored:
        reporter.warn(line)
    engine = load_engine(request, planned.models, planned.plan, reporter)
    return Model(engine, of_target, defaults, Learning(state_folder(), planned.plan) if learn else None)


class Model(Closeable):
    """A loaded model; writes one answer at a time and holds its memory until `close`.

    Args:
        engine: engine of the model.
        tokenizer: tokenizer of the target.
        defaults: sampling values that the model recommends.
        learning: keeps what passes show for the next plan; None keeps nothing.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, defaults: GenerationDefaults, learning: Learning | None = None
    ) -> None:
        self._engine = engine
        self._learning = learning
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._stop_ids = stop_ids(defaults, tokenizer)

    @property
    def plan(self) -> Plan:
        """The plan that the engine runs under."""
        return self._engine.plan

    def close(self) -> None:
        """Free all memory and stop all threads."""
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

        Tokens shared with the previous chat are not read again.

        Args:
            messages: the whole chat; each has a "role" (system, user, assistant) and a "content".
            max_tokens: maximum length of the answer in tokens; None sets no limit except the context.
            stop: strings that end the answer; the answer does not contain them.
            think: switch of the chat template for thinking; None uses the default of the template.
            seed: seed of the random draws.
            **sampling: values of `SamplingOptions`; missing ones default to those of the model.

        Returns:
            Iterator over the pieces of the answer; it computes while it is read.

        Raises:
            EmptyPromptError: there is no message.
            UsageError: the model has no chat template, or its template refuses these messages.
            PromptTooLongError: the chat leaves no room for an answer.
        """
        check_has_template(self._tokenizer, base=False)
        text = self._tokenizer.render([_message(each) for each in messages], thinking=think) if messages else ""
        if not text:
            raise EmptyPromptError("the chat has no message to answer")
        parser = self._tokenizer.response_parser(text)
        parts = Parts(parser or ThinkTags.after(text), continuing=False)
        ids = self._tokenizer.encode(text)
        if not ids:
            raise EmptyPromptError("the model's tokenizer makes no tokens of the chat")
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
            max_tokens: maximum length of the continuation in tokens; None sets no limit except the context.
            stop: strings that end the continuation; the continuation does not contain them.
            seed: seed of the random draws.
            **sampling: values of `SamplingOptions`; missing ones default to those of the model.

        Returns:
            Iterator over the pieces of the continuation; it computes while it is read.

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
        return Answering(self._engine, answer, ids, sampling, max_tokens, self._learning)


class Answering(Iterator[Delta]):
    """An answer in progress: iterate over its pieces, or call `read`.

    Args:
        engine: engine that writes the tokens.
        answer: accumulated answer.
        ids: token ids of the prompt.
        sampling: sampling settings.
        max_tokens: maximum length of the answer in tokens; None sets no limit except the context.
        learning: keeps what passes show for the next plan; None keeps nothing.
    """

    def __init__(
        self,
        engine: Engine,
        answer: Answer,
        ids: list[int],
        sampling: Sampling,
        max_tokens: int | None,
        learning: Learning | None = None,
    ) -> None:
        self._answer = answer
        self._learning = learning
        self._pieces = self._write(engine, ids, sampling, max_tokens)

    def __next__(self) -> Delta:
        """Return the next piece: new text and token ids, and whether they belong to thinking or answer."""
        return next(self._pieces)

    def read(self) -> str:
        """Write the answer to its end and return its text without the thinking."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Stop writing; the text so far stays available."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """Text of the answer so far, without special tokens, stop string and thinking."""
        return self._answer.text("answer")

    @property
    def reasoning(self) -> str:
        """Text of the thinking so far."""
        return self._answer.text("reasoning")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids written so far, the stop token included."""
        return tuple(self._answer.token_ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Reason for the end of the answer: stop, length or context; None before the end."""
        return self._answer.finish_reason

    def _write(
        self, engine: Engine, ids: list[int], sampling: Sampling, max_tokens: int | None
    ) -> Generator[Delta, None, None]:
        answer, learning = self._answer, self._learning
        try:
            for step in engine.generate(ids, sampling, stop_ids=answer.stop_ids, max_tokens=max_tokens):
                if step.warning is not None:
                    warnings.warn(step.warning, stacklevel=3)
                if learning is not None and engine.plan is learning.plan:
                    learning.add([AnswerStep(step, samples=not sampling.greedy)])
                yield from answer.take(step)
                if answer.cut_by_stop_string:
                    break
            yield from answer.finish()
        finally:
            if learning is not None:
                learning.close()


class _Warnings:
    """Reporter that passes warnings to Python's `warnings` and ignores progress."""

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
        f"not a chat message: {dict(values)!r}",
        hint='use {"role": "user", "content": "..."} with one of the roles ' + ", ".join(_ROLES),
    )
