"""Token ids in, token ids out: draft a tree, verify it in one pass, keep what the target alone would have written."""

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
    """What one call of `generate` was asked for."""

    sampler: Sampler
    stop_ids: frozenset[int]
    max_length: int
    length_reason: FinishReason
    cancel: threading.Event | None


class Engine(Closeable):
    """A target, its drafter, and the tokens committed so far.

    Args:
        plan: sizes and places, settled beforehand.
        target: the model whose text comes out.
        drafter: guesses for it.
        runtime_bytes: what the process held before any weight was read.
    """

    def __init__(self, plan: Plan, target: TreeModel, drafter: Drafter, runtime_bytes: int = 0) -> None:
        self.plan = plan
        self.load_s = 0.0
        self._target = target
        self._drafter = drafter
        self._policy: DraftPolicy = FixedPolicy(plan.work.tree_budget)
        if plan.adaptive and plan.expected is not None:
            self._policy = AdaptivePolicy(plan.work.tree_budget, plan.expected)
        self._cached: list[int] = []  # the tokens whose rows the target's cache holds
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
            plan: sizes and places.
            target: weights of the model that writes the text.
            draft: weights of the model that guesses, or None.
            pack: repacked weights of the target, or None to read its own files.
            draft_pack: repacked weights of the draft, or None.
            warn: receives one line about what the system refused and what that costs.

        Raises:
            VocabularyMismatchError: the draft's token ids do not mean the target's.
            UnsupportedModelError: trees on this architecture do not give what plain decoding gives.
            CorruptCheckpointError: the files cannot be what was saved.
            AllocationError: memory that the plan counts on cannot be allocated.
        """
        begin = time.perf_counter()
        runtime_bytes = stats.resident_set_bytes()
        if draft is not None:
            check_pair(target.source, draft.source)
            check_architecture(draft.source)
        check_architecture(target.source)
        with _allocating(plan):
            # The drafter first: it has no threads that an error would leave behind.
            drafter: Drafter = NoDrafter() if draft is None else _load_drafter(plan, draft, draft_pack)
            cache_rows = plan.work.ctx + plan.work.tree_budget
            model = load_model(target, plan.work, plan.placement, cache_rows=cache_rows, pack=pack, warn=warn)
        engine = cls(plan, model, drafter, runtime_bytes)
        engine.load_s = time.perf_counter() - begin
        return engine

    def close(self) -> None:
        """Ends threads and lets go of files."""
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
    ) -> Iterator[Step]:
        """What the target alone would write after `prompt_ids`, a pass at a time.

        The caches' longest common prefix with the prompt is reused. Closing the iterator early leaves them consistent.

        Args:
            prompt_ids: all tokens so far, at least one.
            sampling: how tokens are drawn.
            stop_ids: tokens that end the answer and are its last.
            max_tokens: longest answer, None for no limit but the context.
            cancel: when set, the pass under way stops between two layers and its work is forgotten.

        Yields:
            Steps; the last has a finish_reason. An interrupted one has no tokens.

        Raises:
            PromptTooLongError: no room for even one token.
            BrokenScoresError: the target computes NaN or infinity.
        """
        context = list(prompt_ids)
        assert context, "the chat layer refuses empty prompts"
        if len(context) >= self.plan.work.ctx:
            raise PromptTooLongError(
                f"the prompt has {len(context)} tokens, the context holds {self.plan.work.ctx} with the answer",
                hint="shorten the prompt, start a new chat, or give a larger --ctx if the model allows it",
            )
        self._reuse_prefix(context)
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
        """Forgets committed tokens beyond `length`, prompt and answers counted together."""
        del self._cached[length:]
        self._target.cache.truncate(len(self._cached))  # also rows of a pass that an exception left uncommitted

    def forget(self) -> None:
        """Empties all caches: the next prompt is computed from its first token on, by the drafter, too."""
        self.truncate(0)
        self._drafter.reset()

    @property
    def generation_bytes(self) -> int:
        """What is held for generating, beside weights: caches, and what is dequantized at a time."""
        return sum(model.generation_bytes for model in (self._target, *self._drafter.models))

    @property
    def target(self) -> TreeModel:
        """The model whose text comes out; who computes with it by itself calls `forget` before and after."""
        return self._target

    @contextmanager
    def drafting_with(self, drafter: Drafter) -> Iterator[None]:
        """Another drafter while it lasts, with trees as large as planned; closing it is the caller's."""
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
        """What is held, beside what the plan's ledger promised."""
        return self._meter.report()

    @property
    def activity(self) -> Activity:
        """What it is at; may be asked from any thread."""
        phase = self._phase
        passing = phase in ("prefill", "verifying")
        return Activity(phase, self._target.layers_done if passing else 0, self.plan.placement.num_layers)

    def _step(self, context: list[int], answer: _Answer) -> Step:
        """One tree, one pass, the accepted path; on cancellation nothing but an empty step."""
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
            self._target.cache.truncate(num_cached)
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
        """Draws the target's tokens from the root down, for as long as they are in the tree.

        Args:
            context: committed tokens; the last is the root.
            tree: N nodes.
            hidden: [1 + N, hidden], the root's first.
            answer: sampler and limits.

        Returns:
            The tokens drawn, and the nodes among them: all but the last token.
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
        """Pending tokens in sequence (the root is the last), then the tree."""
        device = self._target.device
        begin, root = len(context) - num_pending, len(context) - 1
        positions = [*range(begin, len(context)), *(root + depth for depth in tree.depths)]
        return RowLayout(begin, num_pending, tree.ancestors.to(device), torch.tensor(positions, device=device))

    def _reuse_prefix(self, context: list[int]) -> None:
        """Keeps what the cache and the new prompt have in common; the last token is always computed anew."""
        self.truncate(min(common_prefix(self._cached, context), len(context) - 1))

    @staticmethod
    def _finish_reason(length: int, last_token: int, answer: _Answer) -> FinishReason | None:
        if last_token in answer.stop_ids:
            return "stop"
        return answer.length_reason if length >= answer.max_length else None


class _LazyScores:
    """The target's scores of visited nodes, computed in small blocks of a node and its likeliest descendants."""

    def __init__(self, target: TreeModel, tree: TokenTree, hidden: Tensor, block_rows: int) -> None:
        self._target = target
        self._tree = tree
        self._hidden = hidden
        self._block_rows = block_rows
        self._rows: dict[int, Tensor] = {}

    def of(self, node: int) -> Tensor:
        """Scores float32 [V] behind `node`."""
        if node not in self._rows:
            self._rows.clear()  # a walk never goes back, and one block is all that the ledger has room for
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
    """Turns what libraries say about memory that cannot be had into our own error."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
    else:
        return
    # outside of the handler: the error's frames hold on to what was allocated until then
    raise AllocationError(
        f"{plan.work.device} does not give the {format_bytes(plan.device_bytes)} that were planned",
        hint="close other programs, or give a smaller --vram or --ctx",
    )


def _load_drafter(plan: Plan, draft: ModelWeights, pack: Pack | None) -> Drafter:
    """Load a draft, all of whose layers are resident."""
    work = replace(plan.work, host_embeddings=False)
    num_layers = len(draft.skeleton.layers)
    placement = Placement(num_layers, tuple(range(num_layers)))
    model = load_model(draft, work, placement, cache_rows=work.ctx + work.draft_rows, pack=pack)
    return ModelDrafter(model, max_rows=work.draft_rows, max_context=model.max_positions)
