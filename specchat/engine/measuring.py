"""Access to an engine for measurements; callers decide how to measure."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specchat.engine.device import wait_for
from specchat.engine.drafting.drafter import NoDrafter
from specchat.engine.engine import Engine
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.sampling import Sampler
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Sampling


@dataclass(frozen=True)
class PassTime:
    """Times of one target pass without drafting.

    Attributes:
        pass_s: seconds from the first read request to the last computed row.
        wait_s: seconds within pass_s spent waiting for streamed layers.
        streamed_bytes: bytes moved over the link.
    """

    pass_s: float
    wait_s: float
    streamed_bytes: int


class GenerationMemory(TorchDispatchMode):
    """Measures the memory of generation inside a `with` block: caches, and live tensors that operations created.

    Args:
        engine: engine that generates inside the block, in this thread.

    Attributes:
        peak_bytes: peak memory in bytes, without weights.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._living: int = engine.generation_bytes
        self._counted: set[int] = set()
        self.peak_bytes: int = self._living

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._counted:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._counted.add(key)
        self._living += nbytes
        self.peak_bytes = max(self.peak_bytes, self._living)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self._living -= nbytes


def num_threads() -> int:
    """Return the number of threads that compute on a CPU."""
    return torch.get_num_threads()


def without_draft(engine: Engine) -> AbstractContextManager[None]:
    """Return a context in which the engine decodes without a draft, with unchanged weights and placement."""
    return engine.drafting_with(NoDrafter())


def drop_prefetched(engine: Engine) -> None:
    """Discard the layers that were read ahead for the next pass, and start reading them again at once."""
    engine.target.streamer.restart()


def measure_pass(engine: Engine, num_rows: int, seed: int = 0) -> PassTime:
    """Time one pass over random tokens: one committed token and a binary tree below it, with nothing read ahead.

    Recurrent layers of an engine without trees have no room for nodes. Then all tokens are committed ones.

    Args:
        engine: engine whose target runs the pass; its caches are emptied.
        num_rows: rows of the pass, root included.
        seed: seed of the random tokens.
    """
    engine.forget()
    engine.stages.fit(num_rows)
    target = engine.target
    tokens = torch.randint(0, target.vocab_size, (num_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    num_nodes = num_rows - 1 if num_rows - 1 <= target.cache.max_tree_rows else 0
    num_linear = num_rows - num_nodes
    tree = TokenTree(tuple(tokens[num_linear:]), tuple(ROOT if i < 2 else i // 2 - 1 for i in range(num_nodes)))
    positions = [*range(num_linear), *(num_linear - 1 + depth for depth in tree.depths)]
    layout = RowLayout(0, num_linear, tree.ancestors, torch.tensor(positions))
    before = target.streamer.counters()
    begin = time.perf_counter()
    target.streamer.restart()
    target.forward(tokens, PassLayout.single(layout))
    wait_for(target.device)
    pass_s = time.perf_counter() - begin
    after = target.streamer.counters()
    engine.forget()
    return PassTime(pass_s, after.wait_s - before.wait_s, after.num_bytes - before.num_bytes)


@dataclass(frozen=True)
class Margin:
    """Margin between the best and the second token's score, and the largest absolute score."""

    margin: float
    scale: float


@torch.inference_mode()
def margin_after(engine: Engine, context: Sequence[int], sampling: Sampling) -> Margin:
    """Return the margin by which the target's next token wins; with sampling, the margin includes the noise."""
    engine.forget()
    engine.stages.fit(len(context))
    target = engine.target
    logits = target.logits(target.append(list(context))[-1:])[0]
    engine.forget()
    sampler = Sampler(sampling, target.vocab_size, target.device)
    best = sampler.scores(logits, context).topk(2).values
    return Margin(float(best[0] - best[1]), float(logits.abs().max()))
