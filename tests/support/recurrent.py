"""Recurrent layers the slow way: one row at a time along its path from the first row, in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.recurrent.cache import LayerStates, RecurrentCache
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.model import StateShape

CPU = torch.device("cpu")
# What the families of models look like: gated delta nets, Kimi Delta Attention, Mamba 2 and 1, convolutions alone.
SHAPES = {
    "gdn": StateShape(channels=10, taps=4, key_heads=2, heads=4, key_dim=5, value_dim=3),
    "kda": StateShape(channels=6, taps=4, key_heads=2, heads=2, key_dim=4, value_dim=6, decays=4),
    "mamba2": StateShape(channels=7, taps=3, key_heads=1, heads=3, key_dim=4, value_dim=2),
    "mamba1": StateShape(channels=5, taps=4, key_heads=1, heads=5, key_dim=3, value_dim=1, rates=3),
    "conv": StateShape(channels=8, taps=3),
}
DELTA = {"gdn": True, "kda": True, "mamba2": False, "mamba1": False, "conv": False}


@dataclass(frozen=True)
class Row:
    """What one layer is given for one row: an input of the convolution, and queries, keys, values, decay, strength."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Layer:
    """A layer with random weights of its convolution, and random rates of decay."""

    shape: StateShape
    delta: bool
    weight: Tensor
    bias: Tensor | None
    rates: Tensor

    def step(self, past: Past, row: Row) -> tuple[Past, Tensor, Tensor]:
        """Return the past behind a row, and the row's outputs of convolution and recurrence."""
        window = torch.cat([past.window, row.x.double()[None]])
        convolved = (window * self.weight.double().T).sum(0)
        if self.bias is not None:
            convolved = convolved + self.bias.double()
        q, k, v, g, beta = (x.double() for x in (row.q, row.k, row.v, row.g, row.beta))
        if self.delta:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
            q = q * q.shape[-1] ** -0.5
        memory, out = past.memory.clone(), []
        for head in range(self.shape.heads):
            group = head * self.shape.key_heads // self.shape.heads
            decay = beta[head] * self.rates[head].double() if self.shape.rates else g[head]
            state = memory[head] * (decay.exp()[:, None] if decay.ndim == 1 else decay.exp())
            wanted = v[head] - state.T @ k[group] if self.delta else v[head]
            memory[head] = state + torch.outer(k[group], beta[head] * wanted)
            out.append(memory[head].T @ q[group])
        return Past(window[1:], memory), convolved, torch.stack(out) if out else torch.zeros(0, 0).double()


@dataclass(frozen=True)
class Past:
    """A state in float64."""

    window: Tensor
    memory: Tensor

    @classmethod
    def empty(cls, shape: StateShape) -> Past:
        memory = torch.zeros(shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float64)
        return cls(torch.zeros(shape.taps - 1, shape.channels, dtype=torch.float64), memory)


def make_layer(kind: str, seed: int) -> Layer:
    generator, shape = torch.Generator().manual_seed(seed), SHAPES[kind]
    weight = torch.randn(shape.channels, shape.taps, generator=generator)
    bias = torch.randn(shape.channels, generator=generator) if kind in ("mamba2", "conv") else None
    rates = -torch.randn(shape.heads, shape.rates, generator=generator).exp()
    return Layer(shape, DELTA[kind], weight, bias, rates)


def make_row(shape: StateShape, generator: torch.Generator) -> Row:
    """Random inputs of one row; decays are anything from none to nearly all."""

    def random_numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    decays = (shape.heads,) if shape.decays == 1 else (shape.heads, shape.decays)
    return Row(
        x=random_numbers(shape.channels),
        q=random_numbers(shape.key_heads, shape.key_dim),
        k=random_numbers(shape.key_heads, shape.key_dim),
        v=random_numbers(shape.heads, shape.value_dim),
        g=-(random_numbers(*decays).mul(2).exp()),
        beta=2 * random_numbers(shape.heads).sigmoid(),
    )


def random_parents(num_nodes: int, rng: random.Random) -> tuple[int, ...]:
    """Parents of a tree with long chains, siblings, and some children of the root."""
    parents = []
    for node in range(num_nodes):
        kind = rng.random()
        parents.append(ROOT if not node or kind < 0.1 else node - 1 if kind < 0.6 else rng.randrange(node))
    return tuple(parents)


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Nodes from the root's child down to a node."""
    return [] if node == ROOT else [*path_to(parents, parents[node]), node]


def layout_of(prefix: int, num_linear: int, parents: Sequence[int], num_earlier: int = 0) -> PassLayout:
    """Layout of a pass over rows in sequence and a tree, whose first `num_earlier` nodes are there already."""
    return PassLayout.single(row_layout(prefix, num_linear, parents, num_earlier))


def row_layout(prefix: int, num_linear: int, parents: Sequence[int], num_earlier: int = 0) -> RowLayout:
    """Layout of one sequence's rows."""
    tree = TokenTree(tuple(range(len(parents))), tuple(parents))
    depths = [prefix + num_linear - 1 + depth for depth in tree.depths]
    positions = torch.tensor([*range(prefix, prefix + num_linear), *depths])
    return RowLayout(prefix, num_linear, tree.ancestors[num_earlier:], positions)


def run_layer(state: LayerStates, layer: Layer, layout: PassLayout, rows: Sequence[Row], chunk_rows: int):
    """Outputs of a pass over one layer, in chunks: convolved [n, C], scanned [n, H, D_v]."""
    convolved, scanned = [], []
    for begin in range(0, len(rows), chunk_rows):
        chunk = rows[begin : begin + chunk_rows]
        layout.select(begin, begin + len(chunk))
        x, q, k, v, g, beta = (
            torch.stack([getattr(row, name) for row in chunk]) for name in ("x", "q", "k", "v", "g", "beta")
        )
        convolved.append(state.convolve(x, layer.weight, layer.bias))
        if layer.shape.rates:
            scanned.append(state.scan_channels(q[:, 0], k[:, 0], v[..., 0], beta, layer.rates).unsqueeze(-1))
        elif layer.shape.heads:
            scanned.append(state.scan(q, k, v, g, beta, delta=layer.delta))
    return torch.cat(convolved), torch.cat(scanned) if scanned else torch.zeros(len(rows), 0, 0)


def check_pass(layer: Layer, found: tuple[Tensor, Tensor], before: Sequence[Row], linear: Sequence[Row], tree, parents):
    """Compare the outputs of a pass with one row at a time; `before` are the rows before the pass.

    Args:
        tree: rows of all nodes, of which the pass has computed the last ones.
    """
    past = Past.empty(layer.shape)
    expected = []
    for row in before:
        past, *_ = layer.step(past, row)
    for row in linear:
        past, *out = layer.step(past, row)
        expected.append(out)
    pasts = {ROOT: past}
    for node, (row, parent) in enumerate(zip(tree, parents, strict=True)):
        pasts[node], *out = layer.step(pasts[parent], row)
        expected.append(out)
    for name, ours, theirs in zip(("convolved", "scanned"), found, zip(*expected, strict=True), strict=True):
        wanted = torch.stack(theirs)[-len(ours) :]
        if wanted.numel():
            error = float((ours - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            assert error < 1e-5, f"{name}: {error}"


def make_cache(
    kinds: Sequence[str], *, tree_rows: int = 40, seats: int = 1, grows: bool = False, num_points: int = 4
) -> RecurrentCache:
    shapes = [SHAPES[kind] for kind in kinds]
    return RecurrentCache(
        shapes,
        tree_rows,
        seats=seats,
        grows=grows,
        num_points=num_points,
        dtype=torch.float32,
        devices=[CPU] * len(kinds),
    )
