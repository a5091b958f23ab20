"""Check of an architecture before its weights are read: tree scores must equal plain scores.

A tiny random model with the same configuration runs a small tree through specchat's attention, scans and cache, in a
pass with another sequence before it. Then it keeps a path and reads one more token. It also runs every path of the
tree, and the other sequence, through its own modules without a cache. A change in transformers or an unusual
architecture then leads to an error instead of wrong text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specchat.engine.attention import tree_attention
from specchat.engine.kv_cache import TreeCache
from specchat.engine.layout import PassLayout, RowLayout, linear_layout
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import NoStreamer
from specchat.engine.tree import ROOT, TokenTree
from specchat.errors import UnsupportedModelError
from specchat.models.hf.config import load_config, tiny_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.kv_shapes import record_kv_shapes
from specchat.models.hf.refusals import CANNOT_RUN, CANNOT_SHRINK, HINT, refusing
from specchat.models.hf.skeleton import Skeleton, build_random, build_skeleton
from specchat.records.model import ModelSource

_PROMPT_ROWS = 20  # more than the tiny model's window, so that windows matter
_OTHER_ROWS = 9  # rows of the other sequence: chunks end within both
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
    config = load_config(source.path)
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
        try:
            tiny = tiny_config(config)
            _check_is_tiny(tiny)
            skeleton, plain = build_random(tiny, generator, tree_attention)
        except Exception:
            _check_is_built(config)  # a better reason
            raise
    paths = [_path(node) for node in (1, 3, len(_TREE) - 1)]
    with refusing(config.model_type, CANNOT_RUN):
        prompt, other = (
            torch.randint(0, skeleton.config.vocab_size, (rows,), generator=generator).tolist()
            for rows in (_PROMPT_ROWS, _OTHER_ROWS)
        )
        texts = [prompt + [_TREE.tokens[node] for node in path] for path in paths]
        texts[-1].append(_NEXT_TOKEN)
        expected = [*(plain(torch.tensor(text))[_PROMPT_ROWS - 1 :] for text in texts), plain(torch.tensor(other))]
        scores = _scores(skeleton, other, prompt, paths[-1])
        others, ours, of_next = scores.split([_OTHER_ROWS, 1 + len(_TREE), 1])
    found = [*(ours[[0, *(n + 1 for n in path)]] for path in paths), others]
    found[-2] = torch.cat([found[-2], of_next])
    error = max(float((each - theirs).abs().max()) for each, theirs in zip(found, expected, strict=True))
    return error / max(1.0, *(float(theirs.abs().max()) for theirs in expected))


def _check_is_built(config: Any) -> None:
    """Check that transformers can build the modules of the whole model, without weights."""
    with refusing(config.model_type, why_not_built(config)):
        build_skeleton(config, torch.float32, tree_attention)


def _check_is_tiny(config: Any) -> None:
    """Check the size of a model before its weights take memory: some architectures name their sizes otherwise."""
    model = build_skeleton(config, torch.float32, tree_attention).model
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMS:
        raise UnsupportedModelError(f"'{config.model_type}' {CANNOT_SHRINK}", HINT)


def _scores(skeleton: Skeleton, other: list[int], prompt: list[int], path: list[int]) -> Tensor:
    """Return the scores of another sequence, of the root and of all nodes, [others + 1 + N, V], from one pass.

    The last row, [1, V], is that of a token after a path that is kept.
    """
    cpu, num_nodes = torch.device("cpu"), len(_TREE)
    cache = TreeCache(
        record_kv_shapes(skeleton), len(prompt) + num_nodes, torch.float32, cpu, seats=2, tree_rows=num_nodes
    )
    model = TreeModel(skeleton, cache, NoStreamer(), (), _CHUNK_ROWS, cpu)
    positions = [*range(len(prompt)), *(len(prompt) - 1 + depth for depth in _TREE.depths)]
    tree_rows = RowLayout(0, len(prompt), _TREE.ancestors, torch.tensor(positions))
    layout = PassLayout([(1, linear_layout(0, len(other), cpu)), (0, tree_rows)])
    hidden = model.forward([*other, *prompt, *_TREE.tokens], layout)
    cache.keep(0, len(prompt), [len(prompt) + node for node in path])
    following = model.append([_NEXT_TOKEN])
    return model.logits(torch.cat([hidden[: len(other)], hidden[len(other) + len(prompt) - 1 :], following]))


def _path(node: int) -> list[int]:
    path = []
    while node != ROOT:
        path.append(node)
        node = _TREE.parents[node]
    return path[::-1]
