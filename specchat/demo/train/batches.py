"""Windows out of token files, mixed from texts and chats.

What a step reads depends on the seed and the step alone, so that a resumed run needs no memory of what it has read.
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
    """Documents of token ids, one after another.

    Args:
        path: A .npy of uint16 ids; each document is led by the begin token.

    Raises:
        UsageError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="run specchat.demo.train.prepare first")
        self._path = path
        self._ids: NDArray[np.uint16] = np.load(path, mmap_mode="r", allow_pickle=False)
        self._documents = np.flatnonzero(self._ids == BOS_ID)

    def windows(self, count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Windows from anywhere, int64 [count, length], led by a document's begin where one is near."""
        starts = rng.integers(0, self._room(length), count)
        places = np.searchsorted(self._documents, starts).clip(max=len(self._documents) - 1)
        begins = self._documents[places]
        # A chat is best learnt from its first line on.
        near = (begins >= starts) & (begins - starts <= length // 2) & (begins < self._room(length))
        return self._read(np.where(near, begins, starts), length)

    def beginnings(self, count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first tokens of documents drawn at random, int64 [count, length]."""
        fitting = self._documents[self._documents < self._room(length)]
        return self._read(rng.choice(fitting, count), length)

    def _room(self, length: int) -> int:
        if len(self._ids) < length:
            raise UsageError(f"{self._path} has only {len(self._ids)} tokens", hint=f"a window takes {length}")
        return len(self._ids) - length + 1

    def _read(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        windows: NDArray[np.int64] = self._ids[starts[:, None] + np.arange(length)].astype(np.int64)
        return windows


@dataclass(frozen=True)
class Mixture:
    """What a stretch of a run reads.

    Args:
        length: Tokens per window.
        text_share: Share of plain text among texts and chats, where there are both.
    """

    length: int
    text_share: float


class Batches:
    """Draws the batches of a run.

    Args:
        data: Folder that prepare wrote: texts, chats or both.
        written: Tokens that the target wrote, half of every batch then; None for none.
        batch_tokens: Tokens per batch, roughly.
        seed: Of all chance in it.
    """

    def __init__(self, data: Path, written: Path | None, batch_tokens: int, seed: int) -> None:
        names = [name for name in ("texts", "chats") if (data / f"{name}.npy").is_file()] or ["texts"]
        self._files = {name: TokenFile(data / f"{name}.npy") for name in names}
        if written:
            self._files["written"] = TokenFile(written)
        self._batch_tokens, self._seed = batch_tokens, seed

    def draw(self, step: int, mixture: Mixture) -> Tensor:
        """The windows of a step, int64 [rows, length + 1]: the one token more is the last one's label."""
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
