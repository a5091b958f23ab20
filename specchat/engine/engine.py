"""Token ids in, token ids out: draft a tree, verify it in one pass, keep what the target alone would have written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.closing import Closing
from specchat.config import (
    Activity,
    DraftTree,
    FinishReason,
    MemoryReport,
    ModelSource,
    Phase,
    Plan,
    Sampling,
    Step,
)
from specchat.engine import stats
from specchat.engine.attention import RowLayout
from specchat.engine.drafter import Drafter, ModelDrafter, NoDrafter
from specchat.engine.growth import AdaptivePolicy, DraftPolicy, FixedPolicy
from specchat.engine.model import PassCancelledError, TreeModel, load_model
from specchat.engine.sampling import Sampler
from specchat.engine.selfcheck import check_architecture
from specchat.engine.tree import ROOT, TokenTree, common_prefix
from specchat.errors import AllocationError, PromptTooLongError, is_lack_of_memory
from specchat.models.dtypes import TORCH_DTYPE
from specchat.models.pack import Pack
from specchat.models.pairing import check_pair
from specchat.units import format_bytes


@dataclass(frozen=True)
class _Answer:
    """What one call of `generate` was asked for."""

    sampler: Sampler
    stop_ids: frozenset[int]
    max_length: int
    length_reason: FinishReason
    cancel: threading.Event | None


class Engine(Closing):
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
        self._policy: DraftPolicy = FixedPolicy(plan.tree_budget)
        if plan.adaptive and plan.expected is not None:
            self._policy = AdaptivePolicy(plan.tree_budget, plan.expected)
        self._cached: list[int] = []  # the tokens whose rows the target's cache holds
        self._phase: Phase = "idle"
        self._meter = stats.MemoryMeter(plan, [target, *drafter.models], runtime_bytes)

    @classmethod
    def load(
        cls,
        plan: Plan,
        target: ModelSource,
        draft: ModelSource | None,
        pack: Pack | None = None,
        draft_pack: Pack | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Engine:
        """Reads both models into memory as planned.

        Args:
            plan: sizes and places.
            target: the model whose text comes out.
            draft: the model that guesses, or None.
            pack: the target's weights repacked (`models.prepare`), or None to read them from its own files.
            draft_pack: likewise for the draft.
            warn: told in one line of what the system refused and what that costs.

        Raises:
            VocabularyMismatchError: the draft's token ids do not mean the target's.
            UnsupportedModelError: trees on this architecture do not give what plain decoding gives.
            CorruptCheckpointError: the files cannot be what was saved.
            AllocationError: memory that the plan counts on cannot be had.
        """
        begin = time.perf_counter()
        runtime_bytes = stats.resident_set_bytes()
        device, dtype = torch.device(plan.device), TORCH_DTYPE[plan.dtype]
        if draft is not None:
            check_pair(target, draft)
            check_architecture(draft)
        check_architecture(target)
        with _allocating(plan):
            # first, for it has no threads that an error would leave behind
            drafter = _load_drafter(plan, draft, draft_pack, dtype, device)
            target_model = load_model(
                target,
                dtype=dtype,
                device=device,
                resident=plan.resident,
                num_slots=plan.slots,
                in_ram=plan.in_ram,
                host_embeddings=plan.host_embeddings,
                pack=pack,
                quant=plan.quant,
                warn=warn,
                cache_rows=plan.ctx + plan.tree_budget,
                chunk_rows=plan.chunk_rows,
            )
        engine = cls(plan, target_model, drafter, runtime_bytes)
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
        """
        context = list(prompt_ids)
        assert context, "the chat layer refuses empty prompts"
        if len(context) >= self.plan.ctx:
            raise PromptTooLongError(
                f"the prompt has {len(context)} tokens, the context holds {self.plan.ctx} with the answer",
                hint="shorten the prompt, start a new chat, or give a larger --ctx if the model allows it",
            )
        self._reuse_prefix(context)
        limit = len(context) + (max_tokens if max_tokens is not None else self.plan.ctx)
        answer = _Answer(
            sampler=Sampler(sampling, self._target.vocab_size, self._target.device),
            stop_ids=stop_ids,
            max_length=min(limit, self.plan.ctx),
            length_reason="length" if limit <= self.plan.ctx else "context",
            cancel=cancel,
        )
        while True:
            try:
                step = self._step(context, answer)
            finally:
                self._phase = "idle"
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
        own, self._drafter = (self._drafter, self._policy), drafter
        self._policy = FixedPolicy(self.plan.tree_budget)
        try:
            yield
        finally:
            self._drafter, self._policy = own

    def memory(self) -> MemoryReport:
        """What is held, beside what the plan's ledger promised."""
        return self._meter.report()

    @property
    def activity(self) -> Activity:
        """What it is at; may be asked from any thread."""
        phase = self._phase
        passing = phase in ("prefill", "verifying")
        return Activity(phase, self._target.layers_done if passing else 0, self.plan.num_layers)

    def _step(self, context: list[int], answer: _Answer) -> Step:
        """One tree, one pass, the accepted path; on cancellation nothing but an empty step."""
        clock = stats.StepClock(self._target.streamer)
        num_cached = len(self._cached)
        pending = context[num_cached:]
        try:
            self._phase = "drafting"
            with clock.drafting():
                max_depth = answer.max_length - len(context) - 1
                tree = self._drafter.grow(context, self._policy, max_depth, answer.sampler, answer.cancel)
            self._phase = "prefill" if len(pending) > 1 else "verifying"
            with clock.verifying():
                rows = self._rows_for(context, len(pending), tree)
                hidden = self._target.forward([*pending, *tree.tokens], rows, answer.cancel)
        except PassCancelledError:
            self._target.cache.truncate(num_cached)
            return clock.step((), "interrupt", 0, num_cached, tree_nodes=0, depth=0)
        with clock.sampling():
            tokens, path = self._walk(context, tree, hidden[len(pending) - 1 :], answer)
        first = num_cached + len(pending)
        self._target.cache.keep(first, [first + node for node in path])
        self._cached = context + [tree.tokens[node] for node in path]
        self._drafter.commit(path)
        self._meter.saw_pass(hidden)
        reason = self._finish_reason(len(context) + len(tokens), tokens[-1], answer)
        offered = DraftTree(tree.tokens, tree.parents, tuple(path)) if len(tree) else None
        depth = max(tree.depths, default=0)
        guesses = tree.by_source(path)
        step = clock.step(tokens, reason, len(pending), num_cached, len(tree), depth, guesses, offered)
        self._policy.record_step(step, tree, path)
        return step

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
        scores = _LazyScores(self._target, tree, hidden, self.plan.head_rows)
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
        f"{plan.device} does not give the {format_bytes(plan.device_bytes)} that were planned",
        hint="close other programs, or give a smaller --vram or --ctx",
    )


def _load_drafter(
    plan: Plan, draft: ModelSource | None, pack: Pack | None, dtype: torch.dtype, device: torch.device
) -> Drafter:
    if draft is None:
        return NoDrafter()
    model = load_model(
        draft,
        dtype=dtype,
        device=device,
        pack=pack,
        quant=plan.draft_quant,
        cache_rows=plan.ctx + plan.draft_rows,
        chunk_rows=plan.chunk_rows,
    )
    return ModelDrafter(model, max_rows=plan.draft_rows, max_context=model.max_positions)
