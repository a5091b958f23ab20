"""Visibility of rows, and attention: both against loops over single rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specchat.engine.attention import PassMask, RowMask, tree_attention
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.tree import ROOT, TokenTree
from specchat.records.limits import padded_rows

WINDOW = 4


def full(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def sliding(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k > q - WINDOW)


def chunked(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k // WINDOW == q // WINDOW)


@dataclass
class Case:
    """A pass over rows in sequence and then nodes, or over nodes alone, with `num_earlier` tree rows cached already."""

    prefix: int
    num_linear: int
    num_earlier: int
    tree: TokenTree

    @property
    def num_new(self) -> int:
        return self.num_linear + len(self.tree) - self.num_earlier

    @property
    def layout(self) -> RowLayout:
        positions = [self.position(row) for row in range(self.prefix, self.prefix + self.num_linear + len(self.tree))]
        ancestors = self.tree.ancestors[self.num_earlier :]
        return RowLayout(self.prefix, self.num_linear, ancestors, torch.tensor(positions, dtype=torch.int64))

    def node(self, row: int) -> int:
        """Return the node of a cache row; negative for rows that are no nodes."""
        return row - self.prefix - self.num_linear

    def position(self, row: int) -> int:
        node = self.node(row)
        return row if node < 0 else self.prefix + self.num_linear - 1 + self.tree.depths[node]

    def cache_row(self, new_row: int) -> int:
        return self.prefix + self.num_earlier + new_row

    def seen_by(self, row: int) -> set[int]:
        """Return the visible cache rows by walking up the tree, before the architecture's own rule."""
        node = self.node(row)
        if node < 0:
            return set(range(row + 1))
        seen = set(range(self.prefix + self.num_linear))
        while node != ROOT:
            seen.add(self.prefix + self.num_linear + node)
            node = self.tree.parents[node]
        return seen


@st.composite
def cases(draw: st.DrawFn) -> Case:
    prefix = draw(st.integers(0, 20))
    num_nodes = draw(st.integers(0, 14))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(num_nodes))
    tree = TokenTree(tuple(range(num_nodes)), parents)
    num_earlier = draw(st.integers(0, max(num_nodes - 1, 0)))
    num_linear = 0 if num_earlier else draw(st.integers(0 if num_nodes else 1, 10))
    return Case(prefix if num_linear else max(prefix, 1), num_linear, num_earlier, tree)


def chunks_of(num_rows: int, size: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]


@given(case=cases(), chunk_rows=st.integers(1, 30))
@settings(deadline=None, max_examples=120)
def test_rows_and_positions_equal_brute_force(case: Case, chunk_rows: int):
    layout = case.layout
    assert layout.num_rows == case.num_new and layout.num_earlier == case.num_earlier
    for begin, end in chunks_of(case.num_new, chunk_rows):
        layout.chunk = (begin, end)
        rows = [case.cache_row(new) for new in range(begin, end)]
        length = case.cache_row(end)
        for kv_length in (length, padded_rows(length)):
            visible = layout.visible(kv_length)
            assert visible.shape == (end - begin, kv_length)
            assert [set(row.nonzero()[:, 0].tolist()) for row in visible] == [case.seen_by(row) for row in rows]
            assert layout.query_positions().tolist() == [case.position(row) for row in rows]
            keys = layout.key_positions(kv_length)
            assert keys.shape == (kv_length,)
            assert keys[:length].tolist() == [case.position(row) for row in range(length)]


@given(case=cases(), chunk_rows=st.integers(1, 30), rule=st.sampled_from([full, sliding, chunked]))
@settings(deadline=None, max_examples=60)
def test_mask_adds_the_architectures_rule_on_logical_positions(case: Case, chunk_rows: int, rule):
    layout = case.layout
    mask = RowMask(layout, rule)
    for begin, end in chunks_of(case.num_new, chunk_rows):
        layout.chunk = (begin, end)
        kv_length = padded_rows(case.cache_row(end))
        expected = brute_force_mask(case, begin, end, kv_length, rule)
        for _ in range(2):  # the second layer of the kind gets the same tensor
            assert torch.equal(mask.additive(kv_length, torch.float32, torch.device("cpu"))[0, 0], expected)


def test_mask_follows_the_models_dtype():
    mask = RowMask(RowLayout(0, 2, torch.zeros(0, 0, dtype=torch.bool), torch.tensor([0, 1]), (0, 2)), full)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert mask.additive(16, dtype, torch.device("cpu")).dtype == dtype


def brute_force_mask(case: Case, begin: int, end: int, kv_length: int, rule) -> Tensor:
    out = torch.full((end - begin, kv_length), -math.inf)
    for i, new_row in enumerate(range(begin, end)):
        row = case.cache_row(new_row)
        for key in case.seen_by(row):
            q, k = torch.tensor(case.position(row)), torch.tensor(case.position(key))
            if rule(None, None, q, k):
                out[i, key] = 0.0
    return out


# --- the product -----------------------------------------------------------------------------------------------------


def slow_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute attention one head and one row at a time, over the visible rows: [1, rows, H, D_v]."""
    num_heads, num_rows = query.shape[1:3]
    group = num_heads // key.shape[1]
    out = torch.zeros(1, num_rows, num_heads, value.shape[3], dtype=torch.float64)
    for head in range(num_heads):
        for row in range(num_rows):
            seen = (mask[row] == 0).nonzero()[:, 0].tolist()
            scores = [float(query[0, head, row].double() @ key[0, head // group, k].double()) * scaling for k in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            powers = [math.exp(score) for score in scores]
            total = sum(powers) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
            for k, power in zip(seen, powers, strict=True):
                out[0, row, head] += power / total * value[0, head // group, k].double()
    return out


@given(
    case=cases(),
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    dims=st.sampled_from([(8, 8), (8, 4), (4, 16)]),
    scaling=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    rule=st.sampled_from([full, sliding]),
)
@settings(deadline=None, max_examples=80)
def test_attention_equals_a_loop_over_rows(case: Case, seed, heads, dims, scaling, softcap, has_sinks, rule):
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (dim, value_dim) = heads, dims
    layout, whole = case.layout, PassLayout.single(case.layout)
    layout = whole.parts[0].layout
    whole.select(case.num_new // 3, case.num_new)
    num_rows, length = case.num_new - layout.chunk[0], case.cache_row(case.num_new)
    kv_length = padded_rows(length)
    query = torch.randn(1, num_heads, num_rows, dim, generator=generator)
    # rows past the end hold what an earlier, longer pass left there
    key = torch.randn(1, num_kv_heads, kv_length, dim, generator=generator) * 3
    value = torch.randn(1, num_kv_heads, kv_length, value_dim, generator=generator) * 3
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    mask = PassMask(whole, kv_length, rule)
    out, weights = tree_attention(
        torch.nn.Identity(), query, key, value, mask, scaling=scaling, softcap=softcap, s_aux=sinks, dropout=0.0
    )
    assert weights is None and out.shape == (1, num_rows, num_heads, value_dim) and out.is_contiguous()
    own_rule = brute_force_mask(case, *layout.chunk, kv_length, rule)
    expected = slow_attention(query, key, value, own_rule, scaling or dim**-0.5, softcap, sinks)
    assert torch.allclose(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_siblings_do_not_see_each_other():
    """Build a mask by hand: a root, two nodes for one position, and a child of each."""
    tree = TokenTree((7, 8, 9, 10), (ROOT, ROOT, 0, 1))
    layout = RowLayout(1, 1, tree.ancestors, torch.tensor([1, 2, 2, 3, 3]))
    layout.chunk = (0, 5)
    assert layout.visible(6).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_only_itself_gets_its_own_value(dtype: torch.dtype):
    layout = PassLayout.single(RowLayout(0, 1, torch.zeros(0, 0, dtype=torch.bool), torch.tensor([0])))
    layout.select(0, 1)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(1, 2, 16, 8, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(1, 4, 1, 8, generator=generator).to(dtype)
    out, _ = tree_attention(torch.nn.Identity(), query, key, value, PassMask(layout, 16, full))
    assert torch.equal(out[0, 0], value[0, :, 0].repeat_interleave(2, dim=0)) and out.dtype == dtype


@given(
    cases=st.lists(cases(), min_size=1, max_size=3),
    chunk_rows=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    softcap=st.sampled_from([None, 2.0]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_parts_attend_as_if_alone(cases: list[Case], chunk_rows: int, seed: int, softcap: float | None, data):
    """Each sequence's output in a joint pass, in chunks that end anywhere, equals that of a pass of its own."""
    generator = torch.Generator().manual_seed(seed)
    capacity, num_seats = 64, 4
    cases = [case for case in cases if case.num_new] or [Case(0, 1, 0, TokenTree())]
    seats = data.draw(st.permutations(range(num_seats)))[: len(cases)]
    key, value = (torch.randn(1, 2, num_seats * capacity, 8, generator=generator) for _ in range(2))
    query = torch.randn(1, 4, sum(case.num_new for case in cases), 8, generator=generator)
    layout = PassLayout(zip(seats, (case.layout for case in cases), strict=True))
    mask, begin_of_keys = PassMask(layout, capacity, full), min(seats) * capacity
    outs = []
    for begin, end in chunks_of(layout.num_rows, chunk_rows):
        layout.select(begin, end)
        keys, values = key[:, :, begin_of_keys:], value[:, :, begin_of_keys:]
        out, _ = tree_attention(torch.nn.Identity(), query[:, :, begin:end], keys, values, mask, softcap=softcap)
        outs.append(out)
    first = 0
    for seat, case in zip(seats, cases, strict=True):
        alone, rows = PassLayout.single(case.layout), slice(first, first + case.num_new)
        alone.select(0, case.num_new)
        first += case.num_new
        region = slice(seat * capacity, (seat + 1) * capacity)
        expected, _ = tree_attention(
            torch.nn.Identity(),
            query[:, :, rows],
            key[:, :, region],
            value[:, :, region],
            PassMask(alone, capacity, full),
            softcap=softcap,
        )
        assert torch.allclose(torch.cat(outs, dim=1)[:, rows], expected, atol=1e-5)
