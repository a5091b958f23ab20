"""Layer taps: states between layers equal transformers', streamed or resident, in chunks and after failed passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engines import random_prompt
from support.loading import load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.taps import LayerTaps
from specchat.records.model import ModelSource

LAYERS = (0, 2, 3)
TOLERANCE = 2e-5
Saved = tuple[Any, ModelSource]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    root, made = tmp_path_factory.mktemp("taps"), dict[str, Saved]()

    def get(architecture: str) -> Saved:
        if architecture not in made:
            model = random_model(make_config(architecture))
            made[architecture] = model, save(model, root / architecture)
        return made[architecture]

    return get


def side_by_side(layers: tuple[int, ...], width: int, chunk_rows: int = 512) -> LayerTaps:
    """Taps that keep the states of all layers, one beside the other."""

    def project(part: int, rows: torch.Tensor) -> torch.Tensor:
        out = rows.new_zeros(len(rows), len(layers) * width)
        out[:, part * width : (part + 1) * width] = rows
        return out

    return LayerTaps(layers, len(layers) * width, project, chunk_rows)


@torch.no_grad()
def theirs(model: Any, tokens: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    """transformers' states that enter layers, [rows, layers * hidden]; the last ones are not normed."""
    last = list[torch.Tensor]()
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _given, out: last.append(out))
    states = model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    hook.remove()
    out = last[0][0] if isinstance(last[0], tuple) else last[0]
    entering = [*states[:-1], out]
    return torch.cat([entering[layer][0] for layer in layers], -1)


def check_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))


def loaded(source: ModelSource, num_layers: int, streaming: str, **sizes: int) -> TreeModel:
    resident = {"resident": None, "streamed": range(0, num_layers, 2)}[streaming]
    return load_model(source, cache_rows=96, resident=resident, num_slots=0 if resident is None else 1, **sizes)


@pytest.mark.parametrize("streaming", ["resident", "streamed"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_states_equal_transformers(saved: Callable[[str], Saved], architecture: str, streaming: str):
    model, source = saved(architecture)
    num_layers, width = model.config.num_hidden_layers, model.config.hidden_size
    layers = (*LAYERS, num_layers)
    with_chunks = loaded(source, num_layers, streaming, chunk_rows=8)
    prompt = random_prompt(30, VOCAB)
    taps = side_by_side(layers, width, chunk_rows=7)
    expected = theirs(model, prompt, layers)
    for begin, end in ((0, 19), (19, 30)):  # the second pass reads what the first has cached
        layout = PassLayout.single(RowLayout(begin, end - begin, torch.zeros(0, 0).bool(), torch.arange(begin, end)))
        with_chunks.forward(prompt[begin:end], layout, taps=taps)
        check_close(taps.take(), expected[begin:end])
    with_chunks.close()


def test_rows_of_a_tree_are_those_of_their_paths(saved: Callable[[str], Saved]):
    model, source = saved("qwen3")
    ours, taps = loaded(source, 4, "resident"), side_by_side(LAYERS, model.config.hidden_size)
    prompt, nodes = random_prompt(12, VOCAB), [5, 9, 7]  # 9 and 7 follow 5
    ours.append(prompt[:-1])
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    ours.forward(
        [prompt[-1], *nodes], PassLayout.single(RowLayout(11, 1, seen, torch.tensor([11, 12, 13, 13]))), taps=taps
    )
    rows = taps.take()
    for node, path in ((1, [5, 9]), (2, [5, 7])):
        check_close(rows[[0, 1, 1 + node]], theirs(model, [*prompt, *path], LAYERS)[11:])


class CancelledAt(threading.Event):
    """An event that is set from some question on."""

    def __init__(self, question: int) -> None:
        super().__init__()
        self._left = question

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_a_cancelled_pass_leaves_nothing(saved: Callable[[str], Saved]):
    model, source = saved("qwen3")
    ours, taps = loaded(source, 4, "streamed"), side_by_side(LAYERS, model.config.hidden_size)
    prompt = random_prompt(16, VOCAB)
    layout = PassLayout.single(RowLayout(0, 16, torch.zeros(0, 0).bool(), torch.arange(16)))
    with pytest.raises(PassCancelledError):
        ours.forward([7] * 16, layout, CancelledAt(3), taps)  # after the parts of two layers
    with pytest.raises(AssertionError, match="whole pass"):
        taps.take()
    ours.forward(prompt, layout, taps=taps)
    check_close(taps.take(), theirs(model, prompt, LAYERS))
    ours.close()
