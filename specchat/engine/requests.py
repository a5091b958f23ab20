"""Requests that wait for a seat, and the reasons to refuse or to give up one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from specchat.errors import BrokenScoresError, PromptTooLongError, SpecchatError, UnknownTokenError
from specchat.records.generation import Request
from specchat.records.model import LOWER_QUANTS
from specchat.records.plan import Plan


class RequestQueue:
    """Requests in order, taken from an iterable one by one.

    Args:
        requests: requests; the next one is only taken when it is looked at. None means that no request waits now.
    """

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self._rest: Iterator[Request | None] = iter(requests)
        self._first: Request | None = None
        self._num_taken = 0

    @property
    def first(self) -> Request | None:
        """Next request; None if none is left, or none waits now."""
        if self._first is None:
            self._first = next(self._rest, None)
        return self._first

    def take(self) -> tuple[int, Request]:
        """Remove and return the next request and its number; only after a look at it."""
        assert self._first is not None
        taken, self._first = self._first, None
        self._num_taken += 1
        return self._num_taken - 1, taken


def why_refused(request: Request, plan: Plan, num_known: int) -> SpecchatError | None:
    """Return the error of a prompt that cannot be answered; None if it can.

    Args:
        request: request with at least one token.
        plan: plan of the engine.
        num_known: number of tokens for which the target has an embedding.
    """
    num_tokens, ctx = len(request.prompt_ids), plan.work.ctx
    if num_tokens >= ctx:
        return PromptTooLongError(
            f"the prompt has {num_tokens} tokens, but the context holds {ctx} with the answer",
            hint="shorten the prompt, start a new chat, or set a larger --ctx if the model allows it",
        )
    for token_id in (min(request.prompt_ids), max(request.prompt_ids)):
        if not 0 <= token_id < num_known:
            return UnknownTokenError(
                f"the prompt has token {token_id}, but {plan.target} has only {num_known:,} embeddings",
                hint="the tokenizer and the weights do not match: download or copy the model's folder again",
            )
    return None


def broken_scores(plan: Plan) -> BrokenScoresError:
    """Return the error for a target that computes NaN or infinity, with the remedy for its precision."""
    if plan.quant in LOWER_QUANTS:
        remedy = "use --quant none"
    elif plan.work.dtype == "fp32":
        remedy = "the weights are probably damaged: download or convert the model again"
    else:
        remedy = "use --dtype bf16 or --dtype fp32" if plan.work.dtype == "fp16" else "use --dtype fp32"
    return BrokenScoresError(
        f"{plan.target} computes NaN or infinity in {plan.work.dtype}, so no token can be drawn", hint=remedy
    )
