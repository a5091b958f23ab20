"""The engine: draft trees, verify them in one target pass, keep the tokens that the target alone would write.

One pass may serve several sequences, each in a seat of its own. While layers stream, a pass over ten sequences takes
about as long as a pass over one. A chat is the case of one sequence. A sequence that ends gives its seat to the next
request, whose prompt joins the trees of the others in the next pass. A seat keeps the rows of its last sequence, so
prompts that begin alike are not computed again from their first token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specchat.closing import Closeable
from specchat.engine import stats
from specchat.engine.device import current, prepare, trim_heap
from specchat.engine.drafters import complete_drafter, load_draft
from specchat.engine.drafting.drafter import Drafter
from specchat.engine.drafting.head_check import HeadDisagreesError
from specchat.engine.drafting.policy import AdaptivePolicy, DraftPolicy, Roots, fixed_policy
from specchat.engine.kv_cache import Kept, keep_together
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.loading import allocating, check_room, load_target
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.recurrent.restore import marks_of_prompt
from specchat.engine.relief import MemoryRelief
from specchat.engine.requests import RequestQueue, broken_scores, why_refused
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.seats import Seats
from specchat.engine.sequence import TokenSequence
from specchat.engine.stages import Stages
from specchat.engine.tree import TokenTree
from specchat.engine.walk import Walk, walk_down
from specchat.hardware.pressure import MemoryWatch
from specchat.models.hf.pairing import check_pair
from specchat.models.hf.refusals import computing
from specchat.models.packs.pack import Pack
from specchat.models.quant.autotune import autotuner
from specchat.models.weights.open import ModelWeights
from specchat.records.generation import Activity, Phase, Request, Sampling, Step
from specchat.records.limits import noise_rows
from specchat.records.plan import Plan
from specchat.records.usage import MemoryReport


class Engine(Closeable):
    """A target, its drafter, and the committed tokens of every seat.

    Args:
        plan: sizes and placement.
        target: model that determines the text.
        drafter: drafter of the target's trees.
        runtime_bytes: memory of the process before any weight was read, in bytes.
        watch: tells when memory is short; None keeps all layers.

    Attributes:
        plan: sizes, and the placement of layers: the one of the last stage, without layers that were given back.
        stages: makes room in the caches; callers that run passes on the target ask it before.
        load_s: seconds that loading took.
    """

    def __init__(
        self,
        plan: Plan,
        target: TreeModel,
        drafter: Drafter,
        runtime_bytes: int = 0,
        watch: MemoryWatch | None = None,
    ) -> None:
        self.plan, self.load_s = plan, 0.0
        self._target, self._drafter = target, drafter
        self._policy: DraftPolicy = fixed_policy(plan)
        if plan.adaptive and plan.expected is not None:
            self._policy = AdaptivePolicy(plan.work.tree_budget, plan.expected, plan.work.seats)
        self._seats = Seats(plan.work.seats, target)
        self._phase: Phase = "idle"
        self._draft_lost: str | None = None
        self._draft_news: str | None = None  # the same reason, until a step has told it
        self._meter = stats.MemoryMeter([target, *drafter.models], runtime_bytes)
        self._relief = MemoryRelief(target, watch)
        self.stages = Stages(plan, target, drafter.models)

    @classmethod
    def load(
        cls,
        plan: Plan,
        target: ModelWeights,
        draft: ModelWeights | None,
        pack: Pack | None = None,
        draft_pack: Pack | None = None,
        warn: Callable[[str], None] = lambda _: None,
        watch: MemoryWatch | None = None,
        load: Callable[..., TreeModel] = load_target,
    ) -> Engine:
        """Read both models into memory as planned; `loading.checking` has checked the architectures.

        Args:
            plan: sizes and placement.
            target: weights of the target.
            draft: weights of the draft; None without a draft model.
            pack: pack of the target; None reads the checkpoint's own files.
            draft_pack: pack of the draft; None reads the checkpoint's own files.
            warn: receives one-line warnings about refused memory pinning and its cost.
            watch: tells when memory is short, so that layers are given back; None keeps all layers.
            load: loads the target, as `load_target` does.

        Raises:
            VocabularyMismatchError: draft and target have different token ids.
            CorruptCheckpointError: the files are damaged or truncated.
            AllocationError: planned memory cannot be allocated.
        """
        begin = time.perf_counter()
        runtime_bytes = stats.runtime_bytes()
        if draft is not None:
            check_pair(target.source, draft.source)
        device = torch.device(plan.work.device)
        with allocating(plan), current(device):
            check_room(plan, watch)
            prepare(device)
            # Load the draft first: it has no threads to clean up if the target fails to load.
            small = None if draft is None or draft.source.is_copy else load_draft(plan, draft, draft_pack)
            model = load(plan, target, pack, warn)
            drafter = complete_drafter(plan, model, small, draft, draft_pack)
        trim_heap()
        engine = cls(plan, model, drafter, runtime_bytes, watch)
        engine.load_s = time.perf_counter() - begin
        return engine

    def close(self) -> None:
        """Stop threads and close files."""
        with current(self._target.device):
            self._target.close()
            self._drafter.close()

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        max_tokens: int | None = None,
        cancel: threading.Event | None = None,
        restore_at: Sequence[int] = (),
    ) -> Iterator[Step]:
        """Yield the tokens that the target alone would write after `prompt_ids`, one step at a time.

        The first seat is used. Caches keep their longest common prefix with the prompt. They stay consistent if the
        iterator is closed early.

        Args:
            prompt_ids: all tokens so far, at least one.
            sampling: parameters of the draws.
            stop_ids: token ids that end the answer; the stop token is the answer's last token.
            max_tokens: most tokens of the answer; None for no limit but the context.
            cancel: event that stops the current pass between two layers and discards its work.
            restore_at: lengths of the prompt at which a later prompt may differ, besides its end.

        Yields:
            Steps; the last one has a finish_reason, and an interrupted one has no tokens.

        Raises:
            PromptTooLongError: the context has no room for one more token.
            UnknownTokenError: the target has no embedding for a token.
            BrokenScoresError: the target computes NaN or infinity.
            UnsupportedModelError: the modules cannot compute with the values of config.json.
        """
        request = Request(tuple(prompt_ids), sampling, stop_ids, max_tokens, restore_at=tuple(restore_at))
        for _, step in self._answer([request], 1, cancel):
            if step.error is not None:
                raise step.error
            yield step

    def generate_many(
        self, requests: Iterable[Request | None], *, seats: int | None = None, cancel: threading.Event | None = None
    ) -> Iterator[tuple[int, Step]]:
        """Answer many requests, as many at once as there are seats; each text is that of the request alone.

        Args:
            requests: requests in order; taken from the iterable when a seat is free. None means that no request waits
                now: the answers in progress go on, and without any the iterator ends.
            seats: most answers at once; None for all seats of the plan.
            cancel: event that stops the current pass between two layers and ends all answers.

        Yields:
            Number of the request, and a step; a pass yields one step for each of its requests. The last step of each
            request has a finish_reason: "error" for a request that fails alone, "interrupt" after cancelling.
        """
        yield from self._answer(requests, min(seats or self.plan.work.seats, self.plan.work.seats), cancel)

    def truncate(self, length: int) -> None:
        """Drop the first seat's committed tokens beyond `length`; prompt and answer tokens count alike."""
        self._seats.truncate(0, length)

    def forget(self) -> None:
        """Empty all caches: target and drafter compute the next prompt from its first token."""
        self._seats.forget()
        self._drafter.reset()

    @property
    def generation_bytes(self) -> int:
        """Bytes held for generation, without weights: KV caches and dequantization scratch."""
        return sum(model.generation_bytes for model in (self._target, *self._drafter.models))

    @property
    def target(self) -> TreeModel:
        """The target model; callers that run passes on it must call `forget` before and after."""
        return self._target

    @contextmanager
    def drafting_with(self, drafter: Drafter) -> Iterator[None]:
        """Use another drafter inside the block, with trees of the planned size; the caller closes the drafter."""
        own = self._drafter, self._policy, self._draft_lost, self._draft_news
        self._drafter, self._policy = drafter, fixed_policy(self.plan)
        self._draft_lost = self._draft_news = None
        try:
            yield
        finally:
            self._drafter, self._policy, self._draft_lost, self._draft_news = own

    @property
    def draft_lost(self) -> str | None:
        """Reason why answers are decoded without the planned draft, in one line; None as long as drafting works."""
        return self._draft_lost

    def relieve(self) -> None:
        """Give kept layers back to the system if memory is short; between passes only. The next step warns.

        Raises:
            LostWorkerError: a worker was lost since the last pass.
        """
        self._target.check()
        resident = self.plan.placement.resident
        self.plan = self._relief.relieve(self.plan)
        is_copy = any(model.cache is self._target.cache for model in self._drafter.models)
        if is_copy and self.plan.placement.resident != resident:
            self._lose_draft("needs layers that were given back")

    def memory(self) -> MemoryReport:
        """Return the memory held, next to the prediction of the plan's ledger."""
        return self._meter.report(self.plan, self._relief)

    @property
    def activity(self) -> Activity:
        """Current activity of the engine; safe to read from any thread."""
        phase = self._phase
        passing = phase in ("prefill", "verifying")
        return Activity(phase, self._target.layers_done if passing else 0, self.plan.placement.num_layers)

    def _answer(
        self, requests: Iterable[Request | None], num_seats: int, cancel: threading.Event | None
    ) -> Iterator[tuple[int, Step]]:
        """Answer requests in the first seats, pass by pass; see `generate_many`."""
        queue, free, live = RequestQueue(requests), set(range(num_seats)), list[TokenSequence]()
        while True:
            for sequence in [each for each in live if each.is_cancelled]:
                live.remove(sequence)
                free.add(sequence.seat)
                yield sequence.index, Step.without_pass("interrupt")
            yield from self._admit(queue, free, live)
            if not live:
                trim_heap()  # of what the last pass needed, and the longest prompt
                return
            self.relieve()
            try:
                with computing(self.plan.target), current(self._target.device):
                    steps = self._step(live, cancel)
            finally:
                self._phase = "idle"
            results = list(zip(live, steps, strict=True))
            for sequence, step in results:
                if step.finish_reason is not None:
                    live.remove(sequence)
                    free.add(sequence.seat)
                yield sequence.index, step
            if steps[0].finish_reason == "interrupt":
                return

    def _admit(self, queue: RequestQueue, free: set[int], live: list[TokenSequence]) -> Iterator[tuple[int, Step]]:
        """Seat waiting requests: at least one, and more while their prompts cost little time; yield refusals."""
        num_rows = num_live = len(live)
        while free and (request := queue.first) is not None:
            length = len(request.prompt_ids)
            fits = num_rows + length <= self.plan.work.prompt_rows
            if len(live) > num_live and not (fits and self._policy.may_join(length, Roots(len(live), num_rows))):
                return
            index, request = queue.take()
            if request.is_cancelled:
                yield index, Step.without_pass("interrupt")
                continue
            if (error := why_refused(request, self.plan, self._target.vocab_size)) is not None:
                yield index, Step.without_pass("error", error)
                continue
            seat = self._seats.take(free, request.prompt_ids)
            free.remove(seat)
            live.append(self._seated(index, request, seat))
            num_rows += length

    def _seated(self, index: int, request: Request, seat: int) -> TokenSequence:
        """Return the sequence of a request, in a seat that keeps the rows that the prompt shares with it."""
        tokens = list(request.prompt_ids)
        assert tokens, "empty prompts are refused before"
        num_cached = self._seats.reuse(seat, tokens)
        marks = marks_of_prompt(num_cached, len(tokens), request.restore_at)
        for model in (self._target, *self._drafter.models):
            model.cache.mark(seat, marks)
        ctx, num_seats = self.plan.work.ctx, self.plan.work.seats
        limit = len(tokens) + (request.max_tokens if request.max_tokens is not None else ctx)
        return TokenSequence(
            index=index,
            seat=seat,
            tokens=tokens,
            num_cached=num_cached,
            sampler=Sampler(request.sampling, self._target.vocab_size, self._target.device, noise_rows(num_seats)),
            stop_ids=request.stop_ids,
            max_length=min(limit, ctx),
            length_reason="length" if limit <= ctx else "context",
            cancel=request.cancel,
        )

    def _step(self, live: Sequence[TokenSequence], cancel: threading.Event | None) -> list[Step]:
        """Draft trees, verify them in one pass, commit the accepted paths; return empty steps on cancellation."""
        self.stages.fit(max(self._seats.longest, *(len(each.tokens) for each in live)), self._relief.layers)
        clock = stats.StepClock(self._target.streamer, len(live), self._target.device)
        cached, pending = zip(*((each.num_cached, len(each.pending)) for each in live), strict=True)
        measured = autotuner().num_measured
        try:
            self._phase = "drafting"
            with clock.drafting():
                trees = self._grow(live, cancel)
            self._phase = "prefill" if max(pending) > 1 else "verifying"
            trees, walks, hidden = self._verify(live, trees, clock, cancel)
        except PassCancelledError:
            clock.stop()
            return [clock.step((), "interrupt", 0, rows, TokenTree(), ()) for rows in cached]
        tapped = None if self._drafter.taps is None else self._drafter.taps.take()
        keep_together([kept for each in zip(live, trees, walks, strict=True) for kept in self._commit(*each)])
        if self._drafter.wants_states:
            for sequence, walk, before in zip(live, walks, cached, strict=True):
                if not walk.is_broken:
                    self._drafter.receive(sequence.seat, walk.final_states(before, hidden, tapped))
        clock.stop()
        steps = [
            clock.step(
                walk.tokens,
                "error" if walk.is_broken else sequence.finish_reason,
                new_rows,
                cached_rows,
                tree,
                walk.path,
                broken_scores(self.plan) if walk.is_broken else None,
                self._drafter.work,
            )
            for sequence, tree, walk, new_rows, cached_rows in zip(live, trees, walks, pending, cached, strict=True)
        ]
        models = (self._target, *self._drafter.models)
        news = [self._relief.take_news(), self._draft_news, *(each for model in models for each in model.take_news())]
        self._draft_news = None
        steps[0] = replace(steps[0], warning="; ".join(filter(None, news)) or None)
        if measured == autotuner().num_measured:  # else the pass has measured kernels, and others will be faster
            self._policy.record_pass(steps, trees, [walk.path for walk in walks])
        return steps

    def _grow(self, live: Sequence[TokenSequence], cancel: threading.Event | None) -> list[TokenTree]:
        """Return the draft's trees; once the draft's scores are of no use, do without them for good."""
        try:
            with computing(self.plan.draft or "the draft"):
                return self._drafter.grow(live, self._policy, cancel)
        except ScoresNotFiniteError:
            fault = f"computes NaN or infinity in {self.plan.work.dtype}"
        except HeadDisagreesError as error:
            fault = str(error)
        self._lose_draft(fault)
        return self._drafter.grow(live, self._policy, cancel)

    def _lose_draft(self, fault: str) -> None:
        if self._draft_lost is None:
            self._draft_lost = self._draft_news = f"the draft {self.plan.draft} {fault}: going on without it"
        self._drafter.without_scores()

    def _verify(
        self,
        live: Sequence[TokenSequence],
        trees: list[TokenTree],
        clock: stats.StepClock,
        cancel: threading.Event | None,
    ) -> tuple[list[TokenTree], list[Walk], Tensor]:
        """Run the target's pass and draw its tokens.

        A branch that overflows spoils every row of its part: attention multiplies masked values by 0, and 0 x NaN is
        NaN. So the pass is repeated without trees before a sequence is given up.

        Returns:
            The trees that were verified, the finished walks, and the pass's hidden states [rows, hidden]. A walk is
            broken if plain decoding computes NaN, too.
        """
        tokens, parts, walks = list[int](), list[tuple[int, RowLayout]](), list[Walk]()
        for sequence, tree in zip(live, trees, strict=True):
            new = sequence.pending
            walks.append(Walk(sequence, tree, root_row=len(tokens) + len(new) - 1))
            parts.append((sequence.seat, self._rows_for(sequence, tree)))
            tokens += [*new, *tree.tokens]
        with clock.verifying():
            hidden = self._target.forward(tokens, PassLayout(parts), cancel, self._drafter.taps)
        self._meter.saw_pass(hidden)
        with clock.sampling():
            walk_down(self._target, walks, hidden, self.plan.work.head_rows, self._drafter.observe)
        if not any(walk.is_broken for walk in walks):
            return trees, walks, hidden
        repeats = any(map(len, trees))
        for sequence, walk in zip(live, walks, strict=True):
            if repeats or walk.is_broken:
                self._target.cache.wipe(sequence.seat, sequence.num_cached)
        return self._verify(live, [TokenTree() for _ in live], clock, cancel) if repeats else (trees, walks, hidden)

    def _commit(self, sequence: TokenSequence, tree: TokenTree, walk: Walk) -> list[Kept]:
        """Append the drawn tokens, and return the rows of the accepted path; nothing stays of a broken walk."""
        keeps = list[Kept]()
        if not walk.is_broken:
            first = len(sequence.tokens)
            keeps.append(Kept(self._target.cache, sequence.seat, first, [first + node for node in walk.path]))
            kept = sequence.tokens + [tree.tokens[node] for node in walk.path]
            self._seats.commit(sequence.seat, kept)
            sequence.num_cached = len(kept)
            sequence.tokens += walk.tokens
        return [*keeps, *self._drafter.commit(sequence.seat, walk.path, walk.tokens)]

    def _rows_for(self, sequence: TokenSequence, tree: TokenTree) -> RowLayout:
        """Return the layout of a part: pending tokens in sequence, of which the last is the root, then the tree."""
        begin, length = sequence.num_cached, len(sequence.tokens)
        root = length - 1
        positions = [*range(begin, length), *(root + depth for depth in tree.depths)]
        return RowLayout(begin, length - begin, tree.ancestors, torch.tensor(positions))
