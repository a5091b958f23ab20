"""Measure a pair on chats that it was not trained on.

    python -m specchat.demo.train.evaluate --target run/target --draft run/draft --chats held_out.jsonl

Every token is predicted from the true text before it. Perplexity measures how well each model predicts the text. The
agreement figures, on reply tokens only, measure how well the draft predicts the target.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from specchat.demo.train.checkpoint import load
from specchat.demo.train.model import Llama
from specchat.demo.train.options import parse, resolve_device
from specchat.demo.train.prepare import read_chats
from specchat.demo.train.tokenizer import ChatTokenizer, Message
from specchat.errors import UsageError

WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure perplexity and agreement of a target and a draft."""

    target: Annotated[Path, "folder of the target"]
    draft: Annotated[Path, "folder of the draft"]
    chats: Annotated[Path, 'file of lines {"messages": [{"role", "content"}, ...]}, not used in training']
    device: Annotated[str, "auto, cpu or cuda"] = "auto"


def evaluate(options: EvaluateOptions) -> dict[str, float]:
    """Return token counts, perplexities, and shares between 0 and 1.

    `agreement` is the share of positions where both models choose the same token. `mass_in_top_k` is the target's
    probability (temperature 1) inside the draft's k likeliest tokens. `choice_in_top_k` is the share of positions where
    these k tokens contain the target's choice.

    Raises:
        UsageError: the chats contain no reply.
    """
    device = resolve_device(options.device)
    tokenizer = ChatTokenizer(options.target)
    target, draft = load(options.target, device), load(options.draft, device)
    totals: dict[str, float] = defaultdict(float)
    for chat in read_chats(options.chats):
        for name, value in measure_chat(tokenizer, target, draft, chat).items():
            totals[name] += value
    if not totals["reply_tokens"]:
        raise UsageError(f"{options.chats} has no replies", hint="a reply has the role assistant")
    return _averages(totals)


@torch.inference_mode()
def measure_chat(tokenizer: ChatTokenizer, target: Llama, draft: Llama, messages: list[Message]) -> dict[str, float]:
    """Return sums over one chat, cut to the model's positions. The caller adds and averages them."""
    encoded = tokenizer.encode_chat(messages)
    ids, is_reply = (torch.tensor(each[: target.shape.max_position_embeddings]) for each in encoded)
    ids, is_reply = ids.to(target.cos.device), is_reply[1:].to(target.cos.device)
    logs = {name: model(ids[None, :-1])[0].log_softmax(-1) for name, model in (("target", target), ("draft", draft))}
    sums: dict[str, float] = {"tokens": len(ids) - 1, "reply_tokens": int(is_reply.sum())}
    for name, log in logs.items():
        losses = -log.gather(1, ids[1:, None])[:, 0]
        sums[f"{name}_loss"] = losses.sum().item()
        sums[f"{name}_reply_loss"] = losses[is_reply].sum().item()
    return sums | _agreement(logs["target"][is_reply], logs["draft"][is_reply])


def _agreement(target_log: Tensor, draft_log: Tensor) -> dict[str, float]:
    """Return sums over positions; both inputs are log probabilities, float32 [positions, vocabulary]."""
    guesses = draft_log.topk(max(WIDTHS), dim=-1).indices
    mass = target_log.exp().gather(1, guesses)
    hits = guesses == target_log.argmax(-1, keepdim=True)
    sums = {"agreement": hits[:, 0].sum().item()}
    for width in WIDTHS:
        sums[f"mass_in_top_{width}"] = mass[:, :width].sum().item()
        sums[f"choice_in_top_{width}"] = hits[:, :width].sum().item()
    return sums


def _averages(totals: dict[str, float]) -> dict[str, float]:
    counts = {name: int(totals.pop(name)) for name in ("tokens", "reply_tokens")}
    numbers: dict[str, float] = {**counts}
    for name in ("target", "draft"):
        numbers[f"{name}_perplexity"] = math.exp(totals.pop(f"{name}_loss") / counts["tokens"])
        numbers[f"{name}_reply_perplexity"] = math.exp(totals.pop(f"{name}_reply_loss") / counts["reply_tokens"])
    return numbers | {name: total / counts["reply_tokens"] for name, total in totals.items()}


if __name__ == "__main__":
    print(json.dumps({name: round(value, 4) for name, value in evaluate(parse(EvaluateOptions)).items()}, indent=1))
