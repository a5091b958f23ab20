"""OpenAI's objects: answers, chunks of streams, token counts and models, with our figures in a field of their own."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Protocol

from specchat.chat.answer import Delta, Usage
from specchat.records.generation import FinishReason
from specchat.serve.worker import Job

# Field of our figures, which no other server has.
OWN_FIELD = "specchat"


@dataclass(frozen=True)
class ServedModel:
    """The model of a server.

    Attributes:
        id: name in answers.
        names: names that requests may use.
        ctx: most tokens of prompt and answer together.
        created: time at which the server started, in seconds since 1970.
    """

    id: str
    names: frozenset[str]
    ctx: int
    created: int

    def as_object(self) -> dict[str, Any]:
        """Return the model as /v1/models lists it."""
        head = {"id": self.id, "object": "model", "created": self.created, "owned_by": "specchat"}
        return {**head, "max_model_len": self.ctx}


class AnswerObjects(Protocol):
    """The objects of one answer."""

    def whole(self, job: Job) -> dict[str, Any]:
        """Return the object of a finished answer."""

    def first(self) -> dict[str, Any] | None:
        """Return the first chunk of a stream, or None."""

    def piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a delta, or None for a delta without text."""

    def last(self, job: Job) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""

    def counts(self, job: Job) -> dict[str, Any]:
        """Return the chunk with the token counts."""


class _Objects:
    """What the objects of both protocols share.

    Args:
        model: name of the model.
        prefix: first letters of the answer's id.
        kind, chunk_kind: names of the whole object and of a chunk.
        includes_usage: whether a stream ends with the token counts; every other chunk then has none.
    """

    def __init__(self, model: str, prefix: str, kind: str, chunk_kind: str, *, includes_usage: bool) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._no_usage = {"usage": None} if includes_usage else {}

    def counts(self, job: Job) -> dict[str, Any]:
        """Return the chunk with the token counts."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": _usage_of(job)}

    def _answer(self, job: Job, choice: dict[str, Any]) -> dict[str, Any]:
        choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": _finish_reason(job)}]
        head = {**self._head, "object": self._kind, "choices": choices}
        return {**head, "usage": _usage_of(job), OWN_FIELD: figures(job)}

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}]
        return {**self._head, "object": self._chunk_kind, "choices": choices, **self._no_usage, **more}


class ChatObjects(_Objects):
    """The objects of /v1/chat/completions; thinking has the field that DeepSeek and vLLM use."""

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        super().__init__(model, "chatcmpl", "chat.completion", "chat.completion.chunk", includes_usage=includes_usage)

    def whole(self, job: Job) -> dict[str, Any]:
        """Return the object of a finished answer."""
        reasoning = job.answer.text("reasoning")
        message = {"role": "assistant", "content": job.answer.text("answer"), "refusal": None}
        return self._answer(job, {"message": message | ({"reasoning_content": reasoning} if reasoning else {})})

    def first(self) -> dict[str, Any] | None:
        """Return the first chunk of a stream, which names the role."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a delta, or None for a delta without text."""
        name = "content" if delta.part == "answer" else "reasoning_content"
        return self._chunk({"delta": {name: delta.text}}) if delta.text else None

    def last(self, job: Job) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        return self._chunk({"delta": {}}, _finish_reason(job), **{OWN_FIELD: figures(job)})


class TextObjects(_Objects):
    """The objects of /v1/completions."""

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        super().__init__(model, "cmpl", "text_completion", "text_completion", includes_usage=includes_usage)

    def whole(self, job: Job) -> dict[str, Any]:
        """Return the object of a finished answer."""
        return self._answer(job, {"text": job.answer.text("answer")})

    def first(self) -> dict[str, Any] | None:
        """Return None: a text has no role."""
        return None

    def piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a delta, or None for a delta without text."""
        return self._chunk({"text": delta.text}) if delta.text else None

    def last(self, job: Job) -> dict[str, Any]:
        """Return the chunk that says why the answer ended."""
        return self._chunk({"text": ""}, _finish_reason(job), **{OWN_FIELD: figures(job)})


def figures(job: Job) -> dict[str, Any]:
    """Return our figures of a finished answer: seconds, tokens per step, and the share of accepted draft tokens."""
    answer = job.answer
    timings, speculation = answer.timings(load_s=0.0), answer.speculation(tree_budget=0)
    num_drafted = sum(step.tree_nodes for step in answer.steps)
    return {
        "seed": job.request.sampling.seed,
        "finish_reason": answer.finish_reason,
        "queue_s": job.queue_s,
        "ttft_s": timings.ttft_s,
        "decode_s": timings.decode_s,
        "tok_per_s": timings.tok_per_s,
        "steps": speculation.steps,
        "tokens_per_step": speculation.tokens_per_step,
        "accepted_per_step": speculation.accepted_per_step,
        "mean_tree_nodes": speculation.mean_tree_nodes,
        "draft_acceptance": answer.num_accepted / num_drafted if num_drafted else None,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's token counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _usage_of(job: Job) -> dict[str, Any]:
    return usage_object(job.answer.usage(len(job.request.prompt_ids)))


_REASONS: dict[FinishReason, str] = {"stop": "stop", "length": "length", "context": "length"}


def _finish_reason(job: Job) -> str:
    """Return OpenAI's word for the end of a complete answer."""
    assert job.answer.finish_reason is not None, "the answer has ended"
    return _REASONS[job.answer.finish_reason]
