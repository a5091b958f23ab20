"""Batches of token windows, drawn from texts and chats.

The windows of a step depend only on the seed and the step, so a resumed run needs no record of what it has read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specchat.demo.train.tokenizer import BOS_ID
from specchat.errors import UsageError


class TokenFile:
    """A file of documents, stored as token ids one after another.

    Args:
        path: .npy file of uint16 ids; each document starts with the begin token.

    Raises:
        UsageError: the file does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="run specchat.demo.train.prepare first")
        self._path = path
        self._ids: NDArray[np.uint16] = np.load(path, mmap_mode="r", allow_pickle=False)
        self._documents = np.flatnonzero(self._ids == BOS_ID)

    def windows(self, count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return random windows, int64 [count, length]; a window moves to a document's beginning if one is near."""
        starts = rng.integers(0, self._room(length), count)
        places = np.searchsorted(self._documents, starts).clip(max=len(self._documents) - 1)
        begins = self._documents[places]
        # The models learn a chat best from its first line.
        near = (begins >= starts) & (begins - starts <= length // 2) & (begins < self._room(length))
        return self._read(np.where(near, begins, starts), length)

    def beginnings(self, count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the first tokens of random documents, int64 [count, length]."""
        fitting = self._documents[self._documents < self._room(length)]
        return self._read(rng.choice(fitting, count), length)

    def _room(self, length: int) -> int:
        if len(self._ids) < length:
            raise UsageError(f"{self._path} has only {len(self._ids)} tokens", hint=f"a window needs {length} tokens")
        return len(self._ids) - length + 1

    def _read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        windows: NDArray[np.int64] = self._ids[starts[:, None] + np.arange(length)].astype(np.int64)
        return windows


@dataclass(frozen=True)
class Mixture:
    """The data of one phase of a run.

    Args:
        length: tokens per window.
        text_share: share of plain text in a mix of texts and chats.
    """

    length: int
    text_share: float


class Batches:
    """The batches of a run.

    Args:
        data: folder that `prepare` wrote, with texts, chats or both.
        written: file of tokens that the target wrote, which fill half of every batch; or None.
        batch_tokens: approximate number of tokens per batch.
        seed: seed of the random draws.
    """

    def __init__(self, data: Path, written: Path | None, batch_tokens: int, seed: int) -> None:
        names = [name for name in ("texts", "chats") if (data / f"{name}.npy").is_file()] or ["texts"]
        self._files = {name: TokenFile(data / f"{name}.npy") for name in names}
        if written:
            self._files["written"] = TokenFile(written)
        self._batch_tokens, self._seed = batch_tokens, seed

    def draw(self, step: int, mixture: Mixture) -> Tensor:
        """Draw the windows of a step, int64 [rows, length + 1]; the last token of a row is only a label."""
        rng = np.random.default_rng((self._seed, step))
        counts = self._counts(max(1, self._batch_tokens // mixture.length), mixture.text_share, rng)
        parts = [self._files[name].windows(count, mixture.length + 1, rng) for name, count in counts.items() if count]
        return torch.from_numpy(np.concatenate(parts))

    def _counts(self, rows: int, text_share: float, rng: np.random.Generator) -> Mapping[str, int]:
        written = rows // 2 if "written" in self._files else 0
        rest = rows - written
        if "chats" not in self._files:
            texts = rest
        else:
            texts = int(rng.binomial(rest, text_share)) if "texts" in self._files else 0
        return {"texts": texts, "chats": rest - texts, "written": written}
