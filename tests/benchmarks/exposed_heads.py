"""How much of drafting with heads and with retrieval is exposed while layers are read from the disk.

    PYTHONPATH=.:tests python tests/benchmarks/exposed_heads.py [--rounds N] [--tokens N] [--sources LIST]

A model of 3 GB whose layers all stream from the disk answers with drafts of several sources in turn: its draft model,
retrieval, and random heads of its width. A random head guesses nothing right, but its passes take the time of a trained
one. Its scores are stretched until they are as sure of a token as those of a good draft, so that trees grow as deep.
Prints the drafting of a step, and how much of it the step itself counts as exposed. Prompts are left out, whose states
heads read, and printed apart. Needs 4 GB of disk under SPECCHAT_CACHE_DIR and a quiet machine; 30 s a source and round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pre_growing import QUESTIONS, SHAPE, answer, load, token_ids

BUDGET, CTX = 64, 768
# Standard deviation of stretched scores over the vocabulary: the best of 4,096 tokens has 60% on average.
STRETCH = 6.0
SOURCES = ("model", "retrieval", "mtp", "eagle3", "dflash")


class Stretched:
    """A head whose scores are stretched."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def begin(self, *args: Any) -> tuple[Any, int]:
        scores, rows = self._head.begin(*args)
        return _stretched(scores), rows

    def expand(self, *args: Any) -> Any:
        return _stretched(self._head.expand(*args))


def _stretched(scores: Any) -> Any:
    return (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True) * STRETCH


def tensors_of(kind: str, config: Any) -> dict[str, Any]:
    """Random tensors of a head, under the names of published heads."""
    import torch

    from specchat.models.checkpoint.mtp import qwen_name
    from specchat.models.hf.mtp import build_mtp

    width = config.hidden_size
    layer = {
        name: tuple(each.shape)
        for name, each in build_mtp(config, torch.float32, has_experts=False).layers[0].named_parameters()
    }
    norms = {"norm.weight": (width,), "hidden_norm.weight": (width,)}
    if kind == "mtp":
        shapes = {qwen_name(name): shape for name, shape in (layer | {"norm.weight": (width,)}).items()}
    else:
        own = {name: shape for name, shape in layer.items() if not name.startswith(("eh_proj", "enorm", "hnorm"))}
        if kind == "eagle3":
            wide = {name: (shape[0], 2 * width) for name, shape in own.items() if name[10:12] in {"q_", "k_", "v_"}}
            shapes = {f"midlayer.{name}": shape for name, shape in (own | wide).items()}
            shapes |= {"midlayer.hidden_norm.weight": (width,), "norm.weight": (width,)}
            shapes |= {"fc.weight": (width, 3 * width), "lm_head.weight": (config.vocab_size, width)}
        else:
            shapes = {f"layers.{number}.{name}": shape for number in range(2) for name, shape in own.items()}
            shapes |= {"fc.weight": (width, 3 * width), **norms}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }


def save_head(kind: str, config: Any, folder: Path) -> Any:
    """Write the files of a random head; return where it is."""
    from safetensors.torch import save_file

    from specchat.records.model import ModelSource

    values = {**config.to_dict(), "dtype": "float32"}
    if kind == "eagle3":
        values |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config.vocab_size}
    elif kind == "dflash":
        own = {"mask_token_id": 0, "target_layer_ids": [1, 7, 13], "causal": False}
        values |= {"architectures": ["DFlashDraftModel"], "block_size": 8, "dflash_config": own}
        values |= {"num_target_layers": config.num_hidden_layers, "num_hidden_layers": 2, "layer_types": None}
    folder.mkdir()
    save_file(tensors_of(kind, config), folder / "mtp.safetensors" if kind == "mtp" else folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return ModelSource(kind, folder, part=kind)


def with_head(kind: str, engine: Any, folder: Path) -> Any:
    """A drafter with a random head, without the check that such a head fails."""
    from support.heads import load_head_model

    from specchat.engine.drafting.dflash import DFlashHead, DFlashModel
    from specchat.engine.drafting.drafter import TreeDrafter
    from specchat.engine.drafting.eagle3 import Eagle3Head, Eagle3Model
    from specchat.engine.drafting.mtp import MtpHead, MtpModel

    target = engine.target
    model_class, head_class, layers = {
        "mtp": (MtpModel, MtpHead, 1),
        "eagle3": (Eagle3Model, Eagle3Head, 1),
        "dflash": (DFlashModel, DFlashHead, 2),
    }[kind]
    source = save_head(kind, target.skeleton.config, folder / kind)
    model = load_head_model(source, model_class, layers, cache_rows=CTX + 2 * BUDGET, chunk_rows=target.chunk_rows)
    return TreeDrafter(Stretched(head_class(model, target, max_rows=2 * BUDGET, check=None)), ())


def drafters(names: Sequence[str], engine: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield each source by its name."""
    from specchat.engine.drafting.drafter import TreeDrafter, free_sources

    make: dict[str, Callable[[], Any]] = {
        "model": lambda: engine._drafter,
        "retrieval": lambda: TreeDrafter(None, free_sources(1)),
    }
    for name in names:
        yield name, make[name]() if name in make else with_head(name, engine, folder)


def measure(rounds: int, max_tokens: int, names: Sequence[str], folder: Path) -> None:
    model = load(SHAPE, vram="640MiB", ram="1MiB", ctx=CTX, tree_budget=BUDGET)
    engine, own = model._engine, model._engine._drafter
    ways = dict(drafters(names, engine, folder))
    found: dict[str, list[list[Any]]] = {name: [] for name in ways}
    for number in range(rounds):
        prompt = token_ids(model, [{"role": "user", "content": QUESTIONS[number % 2]}])
        for name, drafter in ways.items():
            drafter.reset()
            found[name].append(answer(engine, drafter, prompt, number, max_tokens))
    engine._drafter = own
    for name, answers in found.items():
        report(name, answers)
    model.close()


def report(name: str, answers: Sequence[Sequence[Any]]) -> None:
    """Print the mean step of a source, without the first steps; and the whole answers."""
    later = [step for steps in answers for step in steps[1:]]
    pass_ms, wait_ms, draft_ms, exposed_ms = (
        1e3 * statistics.fmean(getattr(step, field) for step in later)
        for field in ("pass_s", "stream_wait_s", "draft_s", "exposed_draft_s")
    )
    passes = statistics.fmean(sum(each.draft_passes for each in step.guesses) for step in later)
    nodes = statistics.fmean(step.tree_nodes for step in later)
    whole = [step for steps in answers for step in steps]
    share = sum(step.exposed_draft_s for step in whole) / sum(step.pass_s for step in whole)
    print(
        f"{name:9} {len(later)} steps of {pass_ms:6.1f} ms, {nodes:4.1f} nodes in {passes:4.1f} passes, waiting for "
        f"layers {wait_ms:5.1f}, drafting {draft_ms:5.1f}, of it exposed {exposed_ms:5.2f} ({exposed_ms / pass_ms:.2%} "
        f"of a step; with prompts {share:.2%})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--sources", default=",".join(SOURCES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options.rounds, options.tokens, options.sources.split(","), Path(folder))


if __name__ == "__main__":
    main()
