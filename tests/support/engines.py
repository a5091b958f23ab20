"""Engines over tiny models, planned by hand so that a test says what streams."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from specchat.engine.drafting.drafter import Drafter
from specchat.engine.drafting.policy import DraftPolicy
from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler
from specchat.engine.sequence import TokenSequence
from specchat.engine.tree import TokenTree
from specchat.records.generation import Sampling, Step
from specchat.records.limits import MOST_RESTORE_POINTS
from specchat.records.model import ModelSource
from specchat.records.plan import Placement, Plan, Workload

NOTHING: frozenset[int] = frozenset()


def make_plan(
    target: ModelSource,
    draft: ModelSource | None,
    *,
    num_layers: int,
    resident: Iterable[int] | None = None,
    ctx: int = 256,
    tree_budget: int = 16,
    slots: int = 2,
    chunk_rows: int = 512,
    seats: int = 1,
    retrieval: bool = False,
    most_points: int = MOST_RESTORE_POINTS,
) -> Plan:
    stays = tuple(range(num_layers) if resident is None else resident)
    return Plan(
        target=target.name,
        draft=draft.name if draft else None,
        quant="none",
        work=Workload(
            device="cpu",
            dtype="fp32",
            ctx=ctx,
            tree_budget=tree_budget if draft or retrieval else 0,
            draft_rows=2 * tree_budget if draft else 0,
            chunk_rows=chunk_rows,
            seats=seats,
            most_points=most_points,
        ),
        placement=Placement(num_layers, stays, (), slots if len(stays) < num_layers else 0),
        ledger=(),
        vram_bytes=0,
        host_bytes=0,
        streamed_bytes_per_step=0,
        retrieval=retrieval,
    )


def write(
    engine: Engine, prompt: list[int], sampling: Sampling, num_tokens: int, stop_ids: frozenset[int] = NOTHING
) -> tuple[list[int], list[Step]]:
    steps = list(engine.generate(prompt, sampling, stop_ids=stop_ids, max_tokens=num_tokens))
    return [token for step in steps for token in step.token_ids], steps


def random_prompt(length: int, vocab: int, seed: int = 11) -> list[int]:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sequence_of(tokens: Sequence[int], sampler: Sampler, max_depth: int = 50, seat: int = 0) -> TokenSequence:
    """A sequence whose trees may have so many levels."""
    return TokenSequence(
        seat, seat, list(tokens), len(tokens) - 1, sampler, NOTHING, len(tokens) + 1 + max_depth, "length"
    )


def grow(
    drafter: Drafter,
    context: Sequence[int],
    policy: DraftPolicy,
    max_depth: int,
    sampler: Sampler,
    cancel: threading.Event | None = None,
) -> TokenTree:
    """The tree of a single sequence."""
    (tree,) = drafter.grow([sequence_of(context, sampler, max_depth)], policy, cancel)
    return tree
