"""The engine: draft a tree, verify the tree in one target pass, keep the tokens that the target alone would write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specchat.closing import Closeable
from specchat.engine import stats
from specchat.engine.attention import RowLayout
from specchat.engine.drafting.drafter import Drafter, ModelDrafter, NoDrafter
from specchat.engine.drafting.policy import AdaptivePolicy, DraftPolicy, FixedPolicy
from specchat.engine.loading import load_model
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.recurrent.restore import marks_of_prompt
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.engine.selfcheck import check_architecture
from specchat.engine.tree import ROOT, TokenTree, common_prefix
from specchat.errors import AllocationError, BrokenScoresError, PromptTooLongError, is_lack_of_memory
from specchat.models.hf.pairing import check_pair
from specchat.models.packs.pack import Pack
from specchat.models.weights.open import ModelWeights
from specchat.records.generation import Activity, DraftTree, FinishReason, Phase, Sampling, Step
from specchat.records.model import LOWER_QUANTS
from specchat.records.plan import MemoryReport, Placement, Plan
from specchat.units import format_bytes


@dataclass(frozen=True)
class _Answer:
    """Parameters of one call of `generate`."""

    sampler: Sampler
    stop_ids: frozenset[int]
    max_length: int
    length_reason: FinishReason
    cancel: threading.Event | None


class Engine(Closeable):
    """A target, its drafter, and the committed tokens.

    Args:
        plan: sizes and placement.
        target: model that determines the text.
        drafter: drafter of the target's trees.
        runtime_bytes: memory of the process before any weight was read, in bytes.
    """

    def __init__(self, plan: Plan, target: TreeModel, drafter: Drafter, runtime_bytes: int = 0) -> None:
        self.plan = plan
        self.load_s = 0.0
        self._target = target
        self._drafter = drafter
        self._policy: DraftPolicy = FixedPolicy(plan.work.tree_budget)
        if plan.adaptive and plan.expected is not None:
            self._policy = AdaptivePolicy(plan.work.tree_budget, plan.expected)
        self._cached: list[int] = []  # tokens whose rows are in the target's KV cache
        self._phase: Phase = "idle"
        self._draft_lost: str | None = None
        self._meter = stats.MemoryMeter(plan, [target, *drafter.models], runtime_bytes)

    @classmethod
    def load(
        cls,
        plan: Plan,
        target: ModelWeights,
        draft: ModelWeights | None,
        pack: Pack | None = None,
        draft_pack: Pack | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Engine:
        """Read both models into memory as planned.

        Args:
            plan: sizes and placement.
            target: weights of the target.
            draft: weights of the draft; None for plain decoding.
            pack: pack of the target; None reads the checkpoint's own files.
            draft_pack: pack of the draft; None reads the checkpoint's own files.
            warn: receives one-line warnings about refused memory pinning and its cost.

        Raises:
            VocabularyMismatchError: draft and target have different token ids.
            UnsupportedModelError: tree scores differ from plain scores on this architecture.
            CorruptCheckpointError: the files are damaged or truncated.
            AllocationError: planned memory cannot be allocated.
        """
        begin = time.perf_counter()
        runtime_bytes = stats.resident_set_bytes()
        if draft is not None:
            check_pair(target.source, draft.source)
            check_architecture(draft.source)
        check_architecture(target.source)
        with _allocating(plan):
            # Load the drafter first: it has no threads to clean up if the target fails to load.
            drafter: Drafter = NoDrafter() if draft is None else _load_drafter(plan, draft, draft_pack)
            cache_rows = plan.work.ctx + plan.work.tree_budget
            model = load_model(target, plan.work, plan.placement, cache_rows=cache_rows, pack=pack, warn=warn)
        engine = cls(plan, model, drafter, runtime_bytes)
        engine.load_s = time.perf_counter() - begin
        return engine

    def close(self) -> None:
        """Stop threads and close files."""
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

        Caches keep their longest common prefix with the prompt. They stay consistent if the iterator is closed early.

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
            BrokenScoresError: the target computes NaN or infinity.
        """
        context = list(prompt_ids)
        assert context, "the chat layer refuses empty prompts"
        if len(context) >= self.plan.work.ctx:
            raise PromptTooLongError(
                f"the prompt has {len(context)} tokens, but the context holds {self.plan.work.ctx} with the answer",
                hint="shorten the prompt, start a new chat, or set a larger --ctx if the model allows it",
            )
        self._reuse_prefix(context, restore_at)
        limit = len(context) + (max_tokens if max_tokens is not None else self.plan.work.ctx)
        answer = _Answer(
            sampler=Sampler(sampling, self._target.vocab_size, self._target.device),
            stop_ids=stop_ids,
            max_length=min(limit, self.plan.work.ctx),
            length_reason="length" if limit <= self.plan.work.ctx else "context",
            cancel=cancel,
        )
        while True:
            had_lost_draft = self._draft_lost is not None
            try:
                step = self._step(context, answer)
            finally:
                self._phase = "idle"
            if not had_lost_draft:
                step = replace(step, draft_lost=self._draft_lost)
            context += step.token_ids
            yield step
            if step.finish_reason is not None:
                return

    def truncate(self, length: int) -> None:
        """Drop committed tokens beyond `length`; prompt and answer tokens count alike."""
        del self._cached[length:]
        reached = self._target.cache.truncate(len(self._cached))  # also drops uncommitted rows of a failed pass
        del self._cached[reached:]

    def forget(self) -> None:
        """Empty all caches: target and drafter compute the next prompt from its first token."""
        self.truncate(0)
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
        own = self._drafter, self._policy, self._draft_lost
        self._drafter, self._policy, self._draft_lost = drafter, FixedPolicy(self.plan.work.tree_budget), None
        try:
            yield
        finally:
            self._drafter, self._policy, self._draft_lost = own

    @property
    def draft_lost(self) -> str | None:
        """Reason why answers are decoded without the planned draft, in one line; None as long as drafting works."""
        return self._draft_lost

    def memory(self) -> MemoryReport:
        """Return the memory held, next to the prediction of the plan's ledger."""
        return self._meter.report()

    @property
    def activity(self) -> Activity:
        """Current activity of the engine; safe to read from any thread."""
        phase = self._phase
        passing = phase in ("prefill", "verifying")
        return Activity(phase, self._target.layers_done if passing else 0, self.plan.placement.num_layers)

    def _step(self, context: list[int], answer: _Answer) -> Step:
        """Draft a tree, verify the tree, commit the accepted path; return an empty step on cancellation."""
        clock = stats.StepClock(self._target.streamer)
        num_cached = len(self._cached)
        pending = context[num_cached:]
        try:
            self._phase = "drafting"
            with clock.drafting():
                tree = self._grow(context, answer)
            self._phase = "prefill" if len(pending) > 1 else "verifying"
            tree, tokens, path = self._verify(context, tree, answer, clock)
        except PassCancelledError:
            self.truncate(num_cached)
            return clock.step((), "interrupt", 0, num_cached, tree_nodes=0, depth=0)
        first = num_cached + len(pending)
        self._target.cache.keep(first, [first + node for node in path])
        self._cached = context + [tree.tokens[node] for node in path]
        self._drafter.commit(path)
        reason = self._finish_reason(len(context) + len(tokens), tokens[-1], answer)
        offered = DraftTree(tree.tokens, tree.parents, tuple(path)) if len(tree) else None
        depth = max(tree.depths, default=0)
        guesses = tree.by_source(path)
        step = clock.step(tokens, reason, len(pending), num_cached, len(tree), depth, guesses, offered)
        self._policy.record_step(step, tree, path)
        return step

    def _grow(self, context: list[int], answer: _Answer) -> TokenTree:
        """Return the draft's tree; empty once the draft computes NaN or infinity, for as long as the engine lives."""
        if self._draft_lost is None:
            max_depth = answer.max_length - len(context) - 1
            try:
                return self._drafter.grow(context, self._policy, max_depth, answer.sampler, answer.cancel)
            except ScoresNotFiniteError:
                self._draft_lost = (
                    f"the draft {self.plan.draft} computes NaN or infinity in {self.plan.work.dtype}: "
                    "going on without a draft"
                )
        return TokenTree()

    def _verify(
        self, context: list[int], tree: TokenTree, answer: _Answer, clock: stats.StepClock
    ) -> tuple[TokenTree, tuple[int, ...], list[int]]:
        """Run the target's pass and draw its tokens.

        A branch that overflows spoils every row of its pass: attention multiplies masked values by 0, and 0 x NaN is
        NaN. So the pass is repeated without a tree before the answer is given up.

        Returns:
            The tree that was verified, the tokens drawn, and the accepted nodes.

        Raises:
            BrokenScoresError: plain decoding computes NaN or infinity, too.
        """
        pending = context[len(self._cached) :]
        with clock.verifying():
            rows = self._rows_for(context, len(pending), tree)
            hidden = self._target.forward([*pending, *tree.tokens], rows, answer.cancel)
        self._meter.saw_pass(hidden)
        try:
            with clock.sampling():
                return tree, *self._walk(context, tree, hidden[len(pending) - 1 :], answer)
        except ScoresNotFiniteError as error:
            self._target.cache.wipe(len(self._cached))
            if not len(tree):
                raise _broken_scores(self.plan) from error
        return self._verify(context, TokenTree(), answer, clock)

    def _walk(
        self, context: list[int], tree: TokenTree, hidden: Tensor, answer: _Answer
    ) -> tuple[tuple[int, ...], list[int]]:
        """Draw the target's tokens from the root down until a token is not in the tree, or the answer ends.

        Args:
            context: committed tokens; the last token is the root.
            tree: draft tree of N nodes.
            hidden: hidden states [1 + N, hidden]; row 0 is the root's.
            answer: sampler and limits.

        Returns:
            The drawn tokens, and the tree nodes of all drawn tokens but the last.
        """
        scores = _LazyScores(self._target, tree, hidden, self.plan.work.head_rows)
        text, path, node = list(context), list[int](), ROOT
        while True:
            token = answer.sampler.draw(scores.of(node), text)
            text.append(token)
            child = tree.children.get((node, token))
            if child is None or token in answer.stop_ids or len(text) >= answer.max_length:
                return tuple(text[len(context) :]), path
            path.append(child)
            node = child

    def _rows_for(self, context: list[int], num_pending: int, tree: TokenTree) -> RowLayout:
        """Return the layout of a pass: pending tokens in sequence, of which the last is the root, then the tree."""
        device = self._target.device
        begin, root = len(context) - num_pending, len(context) - 1
        positions = [*range(begin, len(context)), *(root + depth for depth in tree.depths)]
        return RowLayout(begin, num_pending, tree.ancestors.to(device), torch.tensor(positions, device=device))

    def _reuse_prefix(self, context: list[int], restore_at: Sequence[int]) -> None:
        """Keep the cached prefix that the new prompt shares; the prompt's last token is always computed again.

        Recurrent layers return only to restore points. So one is saved at the end of the last answer if the new prompt
        continues it, and others while the new prompt is read.
        """
        shared = min(common_prefix(self._cached, context), len(context) - 1)
        if shared == len(self._cached):
            self._target.cache.save()
        self.truncate(shared)
        marks = marks_of_prompt(len(self._cached), len(context), restore_at)
        for model in (self._target, *self._drafter.models):
            model.cache.mark(marks)

    @staticmethod
    def _finish_reason(length: int, last_token: int, answer: _Answer) -> FinishReason | None:
        if last_token in answer.stop_ids:
            return "stop"
        return answer.length_reason if length >= answer.max_length else None


class _LazyScores:
    """The target's scores of visited nodes, computed in blocks of a node and its likeliest descendants."""

    def __init__(self, target: TreeModel, tree: TokenTree, hidden: Tensor, block_rows: int) -> None:
        self._target = target
        self._tree = tree
        self._hidden = hidden
        self._block_rows = block_rows
        self._rows: dict[int, Tensor] = {}

    def of(self, node: int) -> Tensor:
        """Return the scores of the token after `node`, float32 [V]."""
        if node not in self._rows:
            self._rows.clear()  # a walk never goes back, and the ledger counts one block
            block = [node, *self._tree.likely_descendants(node, self._block_rows - 1)]
            index = torch.tensor(block, device=self._hidden.device) + 1  # row 0 is the root's
            self._rows.update(zip(block, self._target.logits(self._hidden[index]), strict=True))
        return self._rows[node]


def _broken_scores(plan: Plan) -> BrokenScoresError:
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


@contextmanager
def _allocating(plan: Plan) -> Iterator[None]:
    """Convert out-of-memory errors of libraries into AllocationError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
    else:
        return
    # Raise outside the handler: the caught error's frames keep earlier allocations alive.
    raise AllocationError(
        f"cannot allocate {format_bytes(plan.device_bytes)} on {plan.work.device}",
        hint="close other programs, or set a smaller --vram or --ctx",
    )


def _load_drafter(plan: Plan, draft: ModelWeights, pack: Pack | None) -> Drafter:
    """Load a draft with all layers resident."""
    work = replace(plan.work, host_embeddings=False)
    num_layers = len(draft.skeleton.layers)
    placement = Placement(num_layers, tuple(range(num_layers)))
    model = load_model(draft, work, placement, cache_rows=work.ctx + work.draft_rows, pack=pack, grows=True)
    return ModelDrafter(model, max_rows=work.draft_rows, max_context=model.max_positions)
