"""An engine without a model that answers many requests at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from threading import Event

from specchat.errors import PromptTooLongError
from specchat.records.generation import Request, Step
from support.fake_engine import EOS, TOKENIZER


@dataclass
class Echoes:
    """Answers several requests at once: each repeats its prompt, two tokens a pass.

    Attributes:
        before_pass: called before each pass.
    """

    seats: int = 3
    ctx: int = 200
    requests: list[Request] = field(default_factory=list)
    num_passes: int = 0
    num_relieved: int = 0
    before_pass: Callable[[], None] = lambda: None

    def relieve(self) -> None:
        self.num_relieved += 1

    def generate_many(
        self, requests: Iterable[Request | None], *, cancel: Event | None = None
    ) -> Iterator[tuple[int, Step]]:
        waiting, live = iter(requests), dict[int, tuple[Request, list[int], int]]()
        num_taken = 0
        while True:
            for number in [each for each, (request, *_) in live.items() if request.cancel and request.cancel.is_set()]:
                del live[number]
                yield number, Step.without_pass("interrupt")
            while len(live) < self.seats and (taken := next(waiting, None)) is not None:
                number, request, num_taken = num_taken, taken, num_taken + 1
                self.requests.append(request)
                if len(request.prompt_ids) >= self.ctx:
                    yield number, Step.without_pass("error", PromptTooLongError("the prompt is too long"))
                    continue
                said = TOKENIZER.decode(request.prompt_ids).rpartition("[user]")[2].partition("\n[assistant]")[0]
                ids = [*TOKENIZER.encode(f"You said: {said}"), EOS]
                live[number] = request, ids[: request.max_tokens], len(request.prompt_ids)
            if not live:
                return
            self.num_passes += 1
            self.before_pass()
            num_sharing = len(live)
            for number, (request, ids, rows) in list(live.items()):
                if cancel is not None and cancel.is_set():
                    yield number, Step.without_pass("interrupt")
                    continue
                tokens = tuple(ids[:2])
                reason = None if len(ids) > 2 else "stop" if tokens[-1] in request.stop_ids else "length"
                step = Step(tokens, reason, rows, 0, 4, len(tokens) - 1, 2, 0.1, 0.0, 0.1, 0.0, 0.0, 0)
                live[number] = request, ids[2:], 1
                if reason is not None:
                    del live[number]
                yield number, replace(step, num_sharing=num_sharing)
            if cancel is not None and cancel.is_set():
                return
