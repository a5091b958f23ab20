"""Proposing sources together: what they propose after a node, weighed by what came true before."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specchat.engine.drafting.calibration import Calibration, Setting, Worth
from specchat.engine.drafting.sources import ProposingSource
from specchat.engine.sequence import TokenSequence
from specchat.records.generation import SourceWork

# Mean of the standard Gumbel distribution: the noise of a token that nothing is known of.
_MEAN_NOISE = 0.5772
_HALF = math.log(0.5)


@dataclass(frozen=True)
class _Claim:
    """A proposal of one source."""

    token: int
    kind: int
    source: int


@dataclass
class _Record:
    """What was proposed after a node.

    Attributes:
        claims: proposals of all sources.
        sources: number of the source that proposed each token first.
        setting: conditions of the last weighing.
        expected: probability of each proposed token.
        weighed: proposals that decided about these probabilities, and learn from what comes.
    """

    claims: list[_Claim]
    sources: dict[int, int]
    setting: Setting
    expected: dict[int, float] = field(default_factory=dict)
    weighed: Sequence[_Claim] = ()


@dataclass(frozen=True)
class Child:
    """A proposed child of a node: its log weight, and the number of the source that proposed it first."""

    token: int
    weight: float
    source: int


class Proposers:
    """Proposing sources, with the calibration, the time and the worth of each.

    Args:
        sources: sources, whose numbers begin at `first`.
        first: number of the first source: 1 after a scoring source, else 0.
        share: share of the proposals' first weights that counts beside the scoring source.
    """

    def __init__(self, sources: Sequence[ProposingSource], first: int, share: float = 1.0) -> None:
        self.sources = tuple(sources)
        self._first = first
        self._calibrations = [Calibration(source.priors, share) for source in sources]
        self._seconds = [0.0] * len(sources)
        self._accepted = [0] * len(sources)
        self._worths = [Worth() for _ in sources]
        self._asked = [True] * len(sources)  # whether each source is asked for the present trees
        self._are_alone = True  # whether no source scores the present trees
        self._records: list[_Record] = []

    def begin(
        self, sequences: Sequence[TokenSequence], tokens_per_s: float = 0.0, *, alone: bool, held_up_s: float = 0.0
    ) -> None:
        """Choose the sources of the next trees, and let them read the sequences' new tokens.

        Args:
            sequences: sequences of the next trees; the records of earlier trees are dropped.
            tokens_per_s: tokens that a second is worth.
            alone: whether no source scores the next trees; then all sources are asked.
            held_up_s: seconds that the last trees took longer because sources were asked.
        """
        if not self._are_alone:
            shared_s = held_up_s / max(sum(self._asked), 1)
            for worth, accepted, seconds in zip(self._worths, self._accepted, self._seconds, strict=True):
                worth.record(accepted, seconds + shared_s, tokens_per_s)
        self._records, self._accepted = [], [0] * len(self.sources)
        self._are_alone, self._asked = alone, [alone or worth.is_asked for worth in self._worths]
        for number, source in enumerate(self.sources):
            begin = time.perf_counter()
            if self._asked[number]:
                source.begin(sequences)
            self._seconds[number] = time.perf_counter() - begin

    @property
    def are_asked(self) -> bool:
        """Whether any source is asked for the present trees."""
        return any(self._asked)

    def reset(self) -> None:
        """Forget all texts; what was learned of the sources' worth stays."""
        for source in self.sources:
            source.reset()

    @property
    def work(self) -> tuple[SourceWork, ...]:
        """Work of each source since `begin`."""
        return tuple(
            SourceWork(source.name, seconds) for source, seconds in zip(self.sources, self._seconds, strict=True)
        )

    def ask(self, sequence: TokenSequence, tail: Sequence[int], luck: Tensor | None = None) -> int:
        """Ask all sources what follows the tail, and return the number of the record.

        Args:
            sequence: sequence of the node.
            tail: last tokens up to the node.
            luck: the sampler's noise below the node [V]; None if it is unknown.
        """
        luck = luck if self._are_alone else None  # a scoring source knows better what is lucky
        claims = list[_Claim]()
        for number, source in enumerate(self.sources):
            if not self._asked[number]:
                continue
            begin = time.perf_counter()
            claims += (_Claim(each.token, each.kind, number) for each in source.propose(sequence.seat, tail, luck))
            self._seconds[number] += time.perf_counter() - begin
        is_sampled = sequence.sampler.noise is not None
        sources = {claim.token: self._first + claim.source for claim in reversed(claims)}
        self._records.append(_Record(claims, sources, Setting(beside_draft=False, is_sampled=is_sampled)))
        return len(self._records) - 1

    def alone(self, number: int, noise: Tensor | None) -> list[Child]:
        """Return the children of a node that no draft scores.

        Args:
            number: number of the node's record.
            noise: the sampler's noise at the children's position [V]; None if the answer is greedy.
        """
        record = self._records[number]
        if not record.claims:
            return []
        odds = self._strongest(record)
        if noise is not None and odds:
            luck = noise[torch.tensor(list(odds), device=noise.device)].tolist()
            odds = {token: each + value - _MEAN_NOISE for (token, each), value in zip(odds.items(), luck, strict=True)}
        most = max((0.0, *odds.values()))
        total = most + math.log(math.exp(-most) + sum(math.exp(each - most) for each in odds.values()))
        record.expected = {token: math.exp(each - total) for token, each in odds.items()}
        return [Child(token, each - total, record.sources[token]) for token, each in odds.items()]

    def beside(self, numbers: Sequence[int], weights: Tensor) -> dict[tuple[int, int], Child]:
        """Add the proposals' weights to a draft's log weights.

        Args:
            numbers: number of each node's record.
            weights: the draft's log weights after each node [n, V]; changed in place.

        Returns:
            The proposed children, by (row, token).
        """
        raised = [
            (row, token, extra)
            for row, number in enumerate(numbers)
            for token, extra in self._extras(self._records[number]).items()
            if token < weights.shape[-1]
        ]
        if not raised:
            return {}
        rows, tokens, extras = (torch.tensor(each, device=weights.device) for each in zip(*raised, strict=True))
        before = weights[rows, tokens]
        after = before + extras
        gained = torch.zeros(len(weights), device=weights.device, dtype=weights.dtype)
        gained.index_add_(0, rows, after.exp() - before.exp())
        weights[rows, tokens] = after
        changed = rows.unique()
        weights[changed] -= gained[changed].log1p()[:, None]
        found = {}
        for (row, token, _), own, merged in zip(raised, before.tolist(), weights[rows, tokens].tolist(), strict=True):
            record = self._records[numbers[row]]
            record.expected[token] = math.exp(merged)
            found[row, token] = Child(token, merged, self._label(record, token, own))
        return found

    def count_accepted(self, source: int) -> None:
        """Count an accepted node of the source with this number, which may be the draft model's."""
        if source >= self._first:
            self._accepted[source - self._first] += 1

    def learn(self, number: int, token: int) -> None:
        """Learn from the token that came after a node."""
        record = self._records[number]
        for claim in record.weighed:
            if claim.token in record.expected:
                calibration, came = self._calibrations[claim.source], claim.token == token
                calibration.learn(record.setting, claim.kind, record.expected[claim.token], came=came)

    def _extras(self, record: _Record) -> dict[int, float]:
        """Return what the proposals add to a draft's log weights, by token."""
        record.setting = Setting(beside_draft=True, is_sampled=record.setting.is_sampled)
        record.expected, record.weighed = {}, record.claims
        return self._sums(record)

    def _strongest(self, record: _Record) -> dict[int, float]:
        """Return the log odds of each proposed token where no draft scores it, from its most certain proposal.

        Proposals of the same token are hardly independent: repeats and recycled tokens come from the same places.
        """
        found: dict[int, tuple[float, _Claim]] = {}
        weights = [calibration.weights(record.setting) for calibration in self._calibrations]
        for claim in record.claims:
            weight = weights[claim.source][claim.kind]
            if weight is not None and (claim.token not in found or weight > found[claim.token][0]):
                found[claim.token] = weight, claim
        record.weighed = [claim for _, claim in found.values()]
        return {token: weight for token, (weight, _) in found.items()}

    def _sums(self, record: _Record) -> dict[int, float]:
        """Return the sums of the proposals' weights by token; a proposal that says nothing counts as 0."""
        sums: dict[int, float] = {}
        weights = [calibration.weights(record.setting) for calibration in self._calibrations]
        for claim in record.claims:
            sums[claim.token] = sums.get(claim.token, 0.0) + (weights[claim.source][claim.kind] or 0.0)
        return sums

    def _label(self, record: _Record, token: int, own: float) -> int:
        """Return the source of a merged child: the draft, unless the proposals made the child likelier than not."""
        return record.sources[token] if own < _HALF + math.log(record.expected[token]) else 0
