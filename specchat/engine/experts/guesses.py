"""Experts that are read before their router has been computed, because it will probably choose them.

Guesses lie in shared slots that the layer in progress does not use. They change no bit: an expert is computed only
after its router has named it and the last read into its slot has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specchat.engine.experts.batch import ReadBatch


@dataclass(frozen=True, eq=False)
class Guess:
    """Experts of a layer that are read together.

    Attributes:
        position: position of the layer.
        slots: slots that they are read into, int64 [n].
        batch: the reads.
    """

    position: int
    slots: Any
    batch: ReadBatch


class Guesses:
    """Guesses that their layer has not used yet, and wrong ones whose reads have not ended.

    Args:
        num_slots: number of slots of the pool.

    Attributes:
        is_taken: whether each slot belongs to a guess, or to a wrong one whose read has not ended, bool [slots].
        useful: number of guesses that their layer used.
        useless: number of guesses that were read for nothing.
    """

    def __init__(self, num_slots: int) -> None:
        self.is_taken: Any = np.zeros(num_slots, dtype=bool)
        self.useful = self.useless = 0
        self._guesses: list[Guess] = []
        self._ending: list[Guess] = []

    @property
    def any(self) -> bool:
        """Whether there are guesses, or wrong ones whose reads have not ended."""
        return bool(self._guesses or self._ending)

    def add(self, guess: Guess) -> None:
        """Add experts that are being read."""
        self.is_taken[guess.slots] = True
        self._guesses.append(guess)

    def take(self, position: int, used: Any) -> list[Guess]:
        """Take what a layer uses out of its guesses, and return it in the order of the reads.

        Args:
            position: position of the layer.
            used: slots that the layer uses, of all kinds, int64 [n].
        """
        if not self._guesses:
            return []
        is_used = np.zeros(len(self.is_taken), dtype=bool)
        is_used[used] = True
        found = []
        for guess in self._guesses:
            slots = guess.slots[is_used[guess.slots] & self.is_taken[guess.slots]]
            if guess.position == position and len(slots):
                self.is_taken[slots] = False
                self.useful += len(slots)
                found.append(Guess(position, slots, guess.batch))
        return found

    def withdraw(self, position: int) -> Any:
        """Take back the reads for a layer that have not begun and that it does not wait for, and return their slots."""
        kept: list[Guess] = []
        freed: list[Guess] = []
        for guess in self._guesses:
            is_wrong = guess.position == position and self.is_taken[guess.slots].all()
            (freed if is_wrong and guess.batch.withdraw() else kept).append(guess)
        self._guesses = kept
        self._free(freed)
        return _slots_of(freed)

    def release(self, but: int | None = None) -> Any:
        """Release what layers have not used, and return the slots; those whose reads go on stay taken until later.

        Args:
            but: position of a layer whose guesses stay; None for no layer.
        """
        released = [guess for guess in self._guesses if guess.position != but]
        self._guesses = [guess for guess in self._guesses if guess.position == but]
        unused = []
        for guess in released:
            left = guess.slots[self.is_taken[guess.slots]]
            is_used = len(left) < len(guess.slots)  # so that the layer in progress may wait for these reads
            if is_used or not guess.batch.withdraw():
                self.useless += len(left)
            unused.append(Guess(guess.position, left, guess.batch))
        self._ending += unused
        self.settle()
        return _slots_of(unused)

    def settle(self, *, wait: bool = False) -> None:
        """Free the slots of wrong guesses whose reads have ended.

        Args:
            wait: whether to wait for all of these reads.
        """
        if wait:
            for guess in self._ending:
                guess.batch.wait_until_over()
        over = [guess for guess in self._ending if guess.batch.is_over]
        if over:
            self._ending = [guess for guess in self._ending if guess not in over]
            self._free(over)

    def _free(self, guesses: list[Guess]) -> None:
        for guess in guesses:
            self.is_taken[guess.slots] = False


def _slots_of(guesses: list[Guess]) -> Any:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(guess.slots for guess in guesses)])
