"""What a measurement asks of an engine and a chat never does; no measuring method is decided here."""

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

from specchat.engine.attention import RowLayout
from specchat.engine.drafting.drafter import NoDrafter
from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.generation import Sampling


@dataclass(frozen=True)
class PassTime:
    """One pass of the target by itself.

    Attributes:
        pass_s: from the first byte asked for to the last row computed.
        wait_s: the part of it spent waiting for layers.
        streamed_bytes: moved over the link for it.
    """

    pass_s: float
    wait_s: float
    streamed_bytes: int


class GenerationMemory(TorchDispatchMode):
    """Counts what generating holds while it lasts, beside weights: caches, and living tensors that operations made.

    Args:
        engine: generates meanwhile, in this thread.

    Attributes:
        peak_bytes: the most at any time.
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


def without_draft(engine: Engine) -> AbstractContextManager[None]:
    """Plain decoding while it lasts, on the same weights in the same places."""
    return engine.drafting_with(NoDrafter())


def drop_prefetched(engine: Engine) -> None:
    """Throws away the layers that were fetched ahead for the next pass, which begins to fetch them again at once."""
    engine.target.streamer.restart()


def measure_pass(engine: Engine, num_rows: int, seed: int = 0) -> PassTime:
    """Times one pass over random tokens: one committed token and a binary tree below it, nothing fetched ahead.

    Args:
        engine: its target's cache is emptied.
        num_rows: rows of the pass, root included.
        seed: of the tokens.
    """
    engine.forget()
    target = engine.target
    tokens = torch.randint(0, target.vocab_size, (num_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    tree = TokenTree(tuple(tokens[1:]), tuple(ROOT if i < 2 else i // 2 - 1 for i in range(num_rows - 1)))
    layout = RowLayout(0, 1, tree.ancestors.to(target.device), torch.tensor((0, *tree.depths), device=target.device))
    before = target.streamer.counters()
    begin = time.perf_counter()
    target.streamer.restart()
    target.forward(tokens, layout)
    if target.device.type == "cuda":
        torch.cuda.current_stream(target.device).synchronize()
    pass_s = time.perf_counter() - begin
    after = target.streamer.counters()
    engine.forget()
    return PassTime(pass_s, after.wait_s - before.wait_s, after.num_bytes - before.num_bytes)


@dataclass(frozen=True)
class Margin:
    """How far the best token is ahead of the second, and the size of the scores that the two come from."""

    margin: float
    scale: float


@torch.inference_mode()
def margin_after(engine: Engine, context: Sequence[int], sampling: Sampling) -> Margin:
    """The margin by which the target's next token wins; with sampling, the race's margin, noise included."""
    engine.forget()
    target = engine.target
    logits = target.logits(target.append(list(context))[-1:])[0]
    engine.forget()
    sampler = Sampler(sampling, target.vocab_size, target.device)
    best = sampler.scores(logits, context).topk(2).values
    return Margin(float(best[0] - best[1]), float(logits.abs().max()))
