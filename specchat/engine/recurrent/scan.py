"""Scans of recurrent layers over rows that form a tree.

Gated delta nets, Kimi Delta Attention and Mamba2 are one recurrence, with a state S [D, D_v] per head:

    S_i = exp(g_i) S_parent(i) + k_i u_i^T        o_i = q_i^T S_i
    Mamba2:         u_i = beta_i v_i
    the delta rule: u_i = beta_i (v_i - (exp(g_i) S_parent(i))^T k_i)

G_i is the sum of g over the path from the root to row i, and S_0 is the state before the rows:

    o_i = exp(G_i) q_i^T S_0 + sum of exp(G_i - G_j) (q_i . k_j) u_j over the ancestors j of i, and i itself
    (I + L) U = beta (V - exp(G) K S_0)  with  L_ij = beta_i exp(G_i - G_j) (k_i . k_j)  over strict ancestors j

Parents come before their children, so L is triangular, and one triangular solve gives the updates of all branches. For
chains, this is the chunked form of the delta rule (arXiv 2412.06464). STree (arXiv 2505.14969) does the same for the
trees of Mamba2.

States, keys and updates are float32. Sums of decays are float64, because differences of large sums are exponents.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from specchat.records.limits import SCAN_BLOCK_ROWS, SCAN_CHANNEL_ROWS


@dataclass(frozen=True)
class ScanRows:
    """What a layer computes for its rows, float32.

    Attributes:
        k: keys [H_k, n, D].
        v: values [H, n, D_v].
        g: logarithms of the decays [H, n], or [H, n, D] if every channel of the keys has its own.
        beta: strengths of the updates [H, n].
    """

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def __len__(self) -> int:
        return self.v.shape[1]

    def cut(self, begin: int, end: int) -> ScanRows:
        """Return rows begin..end."""
        return ScanRows(*(getattr(self, field.name)[:, begin:end] for field in fields(self)))


@dataclass(frozen=True)
class Seen:
    """Rows that come before a block and may be its ancestors.

    Attributes:
        k: keys [H_k, r, D], float32.
        sums: sums of the logarithms of decays, [H, r] or [H, r, D], float64.
        u: updates [H, r, D_v], float32.
    """

    k: Tensor
    sums: Tensor
    u: Tensor

    def __len__(self) -> int:
        return self.u.shape[1]


def scan_sequence(q: Tensor, rows: ScanRows, state: Tensor, delta: bool) -> Tensor:
    """Return the outputs [H, n, D_v] of rows in sequence, and advance `state` in place.

    Args:
        q: queries [H_k, n, D], float32.
        rows: keys, values, decays and strengths.
        state: state [H, D, D_v] before the rows.
        delta: whether updates follow the delta rule.
    """
    out = torch.empty_like(rows.v)
    for begin in range(0, len(rows), SCAN_BLOCK_ROWS):
        end = min(begin + SCAN_BLOCK_ROWS, len(rows))
        block = rows.cut(begin, end)
        sums = block.g.double().cumsum(1)
        u = _updates(block, sums, state, delta)
        scores = _scores(q[:, begin:end], block.k, sums, sums)
        out[:, begin:end] = _read(q[:, begin:end], sums, state) + scores @ u
        _fold(block.k, sums, u, state)
    return out


def advance(rows: ScanRows, state: Tensor, delta: bool) -> None:
    """Advance `state` [H, D, D_v] in place by rows in sequence."""
    for begin in range(0, len(rows), SCAN_BLOCK_ROWS):
        block = rows.cut(begin, begin + SCAN_BLOCK_ROWS)
        sums = block.g.double().cumsum(1)
        _fold(block.k, sums, _updates(block, sums, state, delta), state)


def scan_tree(
    q: Tensor, rows: ScanRows, sums: Tensor, state: Tensor, ancestors: Tensor, seen: Seen, delta: bool
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the updates, both [H, n, D_v], of new tree rows; `state` stays.

    Args:
        q: queries [H_k, n, D], float32.
        rows: keys, values, decays and strengths of the new rows; at most `SCAN_BLOCK_ROWS`.
        sums: sums of the logarithms of decays from the root to each new row, float64.
        state: state [H, D, D_v] before the tree.
        ancestors: rows that each new row sees, itself included, bool [n, r + n] for r rows before.
        seen: tree rows before the new rows.
        delta: whether updates follow the delta rule.
    """
    u = _updates(rows, sums, state, delta, ancestors, seen)
    out = _read(q, sums, state)
    out += _scores(q, seen.k, sums, seen.sums, ancestors[:, : len(seen)]) @ seen.u
    out += _scores(q, rows.k, sums, sums, ancestors[:, len(seen) :]) @ u
    return out, u


def path_sums(g: Tensor, ancestors: Tensor) -> Tensor:
    """Return the sums of `g` over the path to each row, float64.

    Args:
        g: logarithms of the decays of all tree rows, [H, m] or [H, m, D].
        ancestors: rows that each new row sees, itself included, bool [n, m].

    Returns:
        Sums [H, n] or [H, n, D].
    """
    weights, values = ancestors.double(), g.double()
    return weights @ values if g.ndim == 3 else (weights @ values.unsqueeze(-1)).squeeze(-1)


def _updates(
    rows: ScanRows,
    sums: Tensor,
    state: Tensor,
    delta: bool,
    ancestors: Tensor | None = None,
    seen: Seen | None = None,
) -> Tensor:
    """Return the updates u [H, n, D_v] of a block; arguments as in `scan_tree`, or rows in sequence without them."""
    if not delta:
        return rows.v * rows.beta.unsqueeze(-1)
    known = _read(rows.k, sums, state)
    if ancestors is not None and seen is not None:
        known += _scores(rows.k, seen.k, sums, seen.sums, ancestors[:, : len(seen)]) @ seen.u
        ancestors = ancestors[:, len(seen) :]
    strengths = rows.beta.unsqueeze(-1)
    system = _scores(rows.k, rows.k, sums, sums, ancestors) * strengths
    # A series for the inverse would blow up where keys repeat; substitution does not.
    wanted = (rows.v - known) * strengths
    u: Tensor = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    return u


def _scores(a: Tensor, k: Tensor, sums: Tensor, key_sums: Tensor, ancestors: Tensor | None = None) -> Tensor:
    """Return exp(G_i - G_j) (a_i . k_j) for the ancestors j of each row i, and 0 elsewhere: [H, n, m].

    Args:
        a: queries or keys [H_k, n, D] of the rows.
        k: keys [H_k, m, D] of the columns.
        sums: sums of decays of the rows, G_i.
        key_sums: sums of decays of the columns, G_j.
        ancestors: columns that each row sees, bool [n, m]; None for rows in sequence, which are their own columns.
    """
    if sums.ndim == 3:
        a, k = (_per_head(x, sums.shape[0]) for x in (a, k))
        if ancestors is None:
            return _chain_scores_by_channel(a, k, sums)
        return _tree_scores_by_channel(a, k, sums, key_sums, ancestors)
    if ancestors is None:
        ancestors = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool, device=a.device).tril()
    exponents = (sums.unsqueeze(-1) - key_sums.unsqueeze(-2)).masked_fill_(~ancestors, -torch.inf)
    decays = exponents.float().exp_().unflatten(0, (k.shape[0], -1))
    scores: Tensor = (decays * (a @ k.mT).unsqueeze(1)).flatten(0, 1)
    return scores


def _chain_scores_by_channel(a: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """Return `_scores` of rows in sequence where every channel decays by itself: [H, n, n].

    The decays stay inside the product, so blocks of rows split them at the block's first row r: exp(G_i - G_r) goes
    to the rows and exp(G_r - G_j) to the columns before. Neither exponent is positive.
    """
    num_rows = a.shape[1]
    out = a.new_zeros(a.shape[0], num_rows, num_rows)
    for begin in range(0, num_rows, SCAN_CHANNEL_ROWS):
        rows = slice(begin, min(begin + SCAN_CHANNEL_ROWS, num_rows))
        reference = sums[:, begin : begin + 1]
        decayed = a[:, rows] * (sums[:, rows] - reference).exp().float()
        columns = k[:, :begin] * (reference - sums[:, :begin]).exp().float()
        out[:, rows, :begin] = decayed @ columns.mT
        exponents = sums[:, rows].unsqueeze(2) - sums[:, rows].unsqueeze(1)
        later = torch.ones(exponents.shape[1:3], dtype=torch.bool, device=a.device).triu(1)
        decays = exponents.masked_fill_(later.unsqueeze(-1), -torch.inf).float().exp_()
        out[:, rows, rows] = (decays.mul_(k[:, rows].unsqueeze(1)) @ a[:, rows].unsqueeze(-1)).squeeze(-1)
    return out


def _tree_scores_by_channel(a: Tensor, k: Tensor, sums: Tensor, key_sums: Tensor, ancestors: Tensor) -> Tensor:
    """Return `_scores` of tree rows where every channel decays by itself: [H, n, m].

    No row splits the decays of a block here, because branches decay differently. So each row gathers its ancestors,
    which are few.
    """
    out = a.new_zeros(a.shape[0], *ancestors.shape)
    width = int(ancestors.sum(1).max()) if ancestors.numel() else 0
    order = ancestors.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # ancestors first
    is_ancestor = ancestors.gather(1, order)
    for begin in range(0, ancestors.shape[0] if width else 0, SCAN_CHANNEL_ROWS):
        rows = slice(begin, begin + SCAN_CHANNEL_ROWS)
        columns = order[rows]
        exponents = sums[:, rows].unsqueeze(2) - key_sums[:, columns]
        decays = exponents.masked_fill_(~is_ancestor[rows].unsqueeze(-1), -torch.inf).float().exp_()
        scores = (decays.mul_(k[:, columns]) @ a[:, rows].unsqueeze(-1)).squeeze(-1)
        out[:, rows].scatter_(2, columns.expand(a.shape[0], -1, -1), scores)
    return out


def _read(a: Tensor, sums: Tensor, state: Tensor) -> Tensor:
    """Return exp(G_i) a_i^T S_0 for rows a [H_k, n, D]: [H, n, D_v]."""
    heads = state.shape[0]
    if sums.ndim == 3:
        return (_per_head(a, heads) * sums.exp().float()) @ state
    groups = state.unflatten(0, (a.shape[0], -1))
    read: Tensor = (a.unsqueeze(1) @ groups).flatten(0, 1)
    return read * sums.exp().float().unsqueeze(-1)


def _fold(k: Tensor, sums: Tensor, u: Tensor, state: Tensor) -> None:
    """Advance a state in place by rows in sequence, given their updates."""
    remaining = (sums[:, -1:] - sums).exp().float()
    keys = _per_head(k, state.shape[0])
    if sums.ndim == 3:
        state *= sums[:, -1].exp().float().unsqueeze(-1)
        state += (keys * remaining).mT @ u
    else:
        state *= sums[:, -1].exp().float()[:, None, None]
        state += keys.mT @ (u * remaining.unsqueeze(-1))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat the key heads of x [H_k, ...] for the heads that they serve."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)
