"""Check of an architecture before its weights are read: tree scores must equal plain scores.

A tiny random model with the same configuration runs a small tree through specchat's attention, scans and cache, keeps a
path, and reads one more token. It also runs every path of the tree through its own modules without a cache. A change in
transformers or an unusual architecture then leads to an error instead of wrong text.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specchat.engine.attention import RowLayout, tree_attention
from specchat.engine.kv_cache import TreeCache
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import NoStreamer
from specchat.engine.tree import ROOT, TokenTree
from specchat.errors import UnsupportedModelError
from specchat.models.hf.config import load_config, tiny_config
from specchat.models.hf.kv_shapes import record_kv_shapes
from specchat.models.hf.refusals import CANNOT_RUN, CANNOT_SHRINK, HINT, refusing
from specchat.models.hf.skeleton import Skeleton, build_random, build_skeleton
from specchat.records.model import ModelSource

_PROMPT_ROWS = 20  # more than the tiny model's window, so that windows matter
_CHUNK_ROWS = 7
_MOST_PARAMS = 1 << 30  # the tiny Phi 4 Multimodal keeps its encoders
_TOLERANCE = 2e-3  # float32 rounding is near 1e-6 of the largest score; a wrong mask is near 1
_NEXT_TOKEN = 17
_TREE = TokenTree(tokens=(5, 9, 11, 7, 5, 13), parents=(ROOT, ROOT, 0, 0, 2, 4))


def check_architecture(source: ModelSource) -> None:
    """Check tree attention on a tiny model with the configuration of `source`; takes a few tenths of a second.

    Raises:
        UnsupportedModelError: scores or cache shapes differ, or the modules cannot run with tree attention.
    """
    _check(source.path.resolve())


@lru_cache(maxsize=16)
def _check(folder: Path) -> None:
    config = load_config(folder)
    error = _largest_error(config)
    if not error <= _TOLERANCE:
        raise UnsupportedModelError(
            f"'{config.model_type}' scores trees differently from plain text, so specchat would change its answers"
            f" (error {error:.1e} in the check of a tiny model)"
        )


@torch.inference_mode()
def _largest_error(config: Any) -> float:
    """Return the largest difference between tree and plain scores, relative to the largest score."""
    generator = torch.Generator().manual_seed(0)
    with refusing(config.model_type, CANNOT_SHRINK):
        tiny = tiny_config(config)
        _check_is_tiny(tiny)
        skeleton, plain = build_random(tiny, generator, tree_attention)
    prompt = torch.randint(0, skeleton.config.vocab_size, (_PROMPT_ROWS,), generator=generator).tolist()
    paths = [_path(node) for node in (1, 3, len(_TREE) - 1)]
    texts = [prompt + [_TREE.tokens[node] for node in path] for path in paths]
    texts[-1].append(_NEXT_TOKEN)
    with refusing(config.model_type, CANNOT_RUN):
        expected = [plain(torch.tensor(text))[_PROMPT_ROWS - 1 :] for text in texts]
        of_tree, of_next = _tree_scores(skeleton, prompt, paths[-1])
    ours = [of_tree[[0, *(node + 1 for node in path)]] for path in paths]
    ours[-1] = torch.cat([ours[-1], of_next])
    error, scale = 0.0, 1.0
    for scores, theirs in zip(ours, expected, strict=True):
        error, scale = max(error, float((scores - theirs).abs().max())), max(scale, float(theirs.abs().max()))
    return error / scale


def _check_is_tiny(config: Any) -> None:
    """Check the size of a model before its weights take memory: some architectures name their sizes otherwise."""
    model = build_skeleton(config, torch.float32, tree_attention).model
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMS:
        raise UnsupportedModelError(f"'{config.model_type}' {CANNOT_SHRINK}", HINT)


def _tree_scores(skeleton: Skeleton, prompt: list[int], path: list[int]) -> tuple[Tensor, Tensor]:
    """Return the scores of root and nodes, [1 + N, V], from one chunked pass, and of a token after a path, [1, V]."""
    num_rows = len(prompt) + len(_TREE)
    cpu = torch.device("cpu")
    cache = TreeCache(record_kv_shapes(skeleton), num_rows, torch.float32, cpu, tree_rows=len(_TREE))
    model = TreeModel(skeleton, cache, NoStreamer(), (), _CHUNK_ROWS, cpu)
    positions = [*range(len(prompt)), *(len(prompt) - 1 + depth for depth in _TREE.depths)]
    layout = RowLayout(0, len(prompt), _TREE.ancestors, torch.tensor(positions))
    hidden = model.forward([*prompt, *_TREE.tokens], layout)
    cache.keep(len(prompt), [len(prompt) + node for node in path])
    return model.logits(hidden[len(prompt) - 1 :]), model.logits(model.append([_NEXT_TOKEN]))


def _path(node: int) -> list[int]:
    path = []
    while node != ROOT:
        path.append(node)
        node = _TREE.parents[node]
    return path[::-1]
