"""What int8, int4 and int3 cost in quality: next-token KL and perplexity against full precision.

    PYTHONPATH=. python tests/benchmarks/quant_quality.py CHATS.jsonl [MODEL_FOLDER]

CHATS has lines {"messages": [{"role", "content"}, ...]}, as MT-Bench's answers or the demo's held-out chats have; every
token is predicted from the true text before it, in float32. MODEL_FOLDER is the demo target if it is not given.
KL is that of the quantized model's predictions from full precision's, in thousandths of a nat, averaged over tokens.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from support.loading import load_model
from torch import Tensor
from torch.nn import functional as F

from specchat.engine.model import TreeModel
from specchat.models.catalog.ref import demo_source
from specchat.models.hf.tokenizer import Tokenizer, load_tokenizer
from specchat.records.chat import Message
from specchat.records.model import QUANTS, ModelSource

CTX = 1024


def texts(tokenizer: Tokenizer, chats: Path) -> Iterator[list[int]]:
    for line in chats.read_text(encoding="utf-8").splitlines():
        messages = [Message(message["role"], message["content"]) for message in json.loads(line)["messages"]]
        yield tokenizer.encode(tokenizer.render(messages))[:CTX]


def log_probabilities(model: TreeModel, ids: list[int]) -> Tensor:
    """Of all tokens behind each prefix: float32 [S, V]."""
    model.cache.truncate(0, 0)
    return model.logits(model.append(ids)).log_softmax(-1)


def load(source: ModelSource, quant: str) -> TreeModel:
    return load_model(
        source, dtype=torch.float32, device=torch.device("cpu"), cache_rows=CTX, chunk_rows=512, quant=quant
    )


def main() -> None:
    source = ModelSource("model", Path(sys.argv[2])) if len(sys.argv) > 2 else demo_source("target")
    models = {quant: load(source, quant) for quant in QUANTS}
    loss, divergence, agreed = (
        defaultdict[str, float](float),
        defaultdict[str, float](float),
        defaultdict[str, int](int),
    )
    num_tokens = 0
    for ids in texts(load_tokenizer(source.path), Path(sys.argv[1])):
        following = torch.tensor(ids[1:])
        scores = {quant: log_probabilities(model, ids)[:-1] for quant, model in models.items()}
        num_tokens += len(following)
        full = scores["none"]
        for quant, log_p in scores.items():
            loss[quant] += F.nll_loss(log_p, following, reduction="sum").item()
            divergence[quant] += F.kl_div(log_p, full, log_target=True, reduction="sum").item()
            agreed[quant] += int((log_p.argmax(-1) == full.argmax(-1)).sum())
    print(f"{num_tokens:,} tokens\n\n| weights | perplexity | change | KL, 1/1000 nat | same first choice |")
    print("|---|---|---|---|---|")
    for quant in QUANTS:
        ratio = math.exp((loss[quant] - loss["none"]) / num_tokens) - 1
        print(
            f"| {quant} | {math.exp(loss[quant] / num_tokens):.3f} | {ratio:+.2%} | "
            f"{1e3 * divergence[quant] / num_tokens:.3f} | {agreed[quant] / num_tokens:.2%} |"
        )


if __name__ == "__main__":
    main()
