"""What the training of every head shares: the frozen target, its texts, the loss, and the loop of steps."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from specchat.demo.train.optimizers import Optimizers, schedule
from specchat.demo.train.prepare import read_chats
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.errors import UsageError
from specchat.models.hf.attention import row_scope
from specchat.models.hf.config import load_config, text_model_class
from specchat.models.hf.skeleton import Skeleton, skeleton_of
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message

LOG_EVERY = 20
# Temperature of many answers: half of the divergence is measured there. The target's first choice counts, too, because
# greedy answers take it; the head's temperature for it is that which ranks their trees. In runs of 200 steps, this part
# brought 3% more tokens per step to greedy answers.
_SAMPLED, _GREEDY, _GREEDY_SHARE = 0.7, SMALL_DRAFT.greedy, 0.3


@dataclass(frozen=True)
class HeadOptions:
    """Options of every head's training."""

    target: Annotated[Path, "folder of the target"]
    chats: Annotated[Path | None, 'file of lines {"messages": [{"role", "content"}, ...]}'] = None
    data: Annotated[str | None, "token files (.npy), joined by commas; batches draw from all files alike"] = None
    steps: Annotated[int, "steps of the whole run; the schedules are relative to it"] = 1400
    rows: Annotated[int, "windows per step"] = 3
    length: Annotated[int, "tokens per window"] = 256
    lr: Annotated[float, "peak learning rate of the norms"] = 2e-3
    muon_lr: Annotated[float, "peak learning rate of the matrices"] = 0.015
    resume: Annotated[bool, "start from the head in the file"] = False
    bf16: Annotated[bool, "multiply in bfloat16 (the weights stay float32)"] = True
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    seed: Annotated[int, "seed of the weights and the data order"] = 3


class Rows:
    """A layer's keys and values so far, for a pass that gradients flow through.

    Args:
        kv: keys and values [B, H_kv, rows, D] to begin with; None for no rows.
    """

    def __init__(self, kv: tuple[Tensor, Tensor] | None = None) -> None:
        self.capacity = 0
        self.length = 0 if kv is None else kv[0].shape[2]
        self._kv = kv

    def append(self, _layout: None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows [B, H_kv, rows, D], and return all rows."""
        if self._kv is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self._kv, (keys, values), strict=True))
        self._kv, self.length = (keys, values), keys.shape[2]
        return keys, values


def masked_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention under a mask, bool [rows, keys], with the signature that transformers expects."""
    groups = query.shape[1] // key.shape[1]
    k, v = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    out = F.scaled_dot_product_attention(query, k, v, attn_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2), None


def load_target(folder: Path, device: torch.device) -> Skeleton:
    """Load a target in float32, without gradients."""
    config = load_config(folder)
    model_class: Any = text_model_class(config)
    model = model_class.from_pretrained(folder, config=config, dtype=torch.float32)
    return skeleton_of(model.to(device).eval().requires_grad_(False))


def run(decoder: Any, rows: Tensor, positions: Tensor, seen: Tensor, layers: Any) -> Tensor:
    """Compute the outputs of rows [B, rows, hidden].

    Args:
        decoder: decoder of the head.
        rows: input rows, in place of embeddings of tokens.
        positions: positions of the rows.
        seen: keys that each row sees, bool [rows, keys].
        layers: cache of the head's layers, by `cache_for`.
    """
    with row_scope(lambda _: seen):
        out = decoder(
            inputs_embeds=rows,
            position_ids=positions[None].expand(len(rows), -1),
            past_key_values=layers,
            use_cache=True,
        )
    hidden: Tensor = out.last_hidden_state
    return hidden


def row_losses(guess: Tensor, truth: Tensor) -> Tensor:
    """Return how far guessed scores are from the target's, both [n, V]: one loss for each row, in nats.

    It joins the cross entropies with the target's probabilities at two temperatures, and with its first choice.
    """
    halves = [cross_entropy(guess / each, truth / each) for each in (1.0, _SAMPLED)]
    first = F.cross_entropy(guess / _GREEDY, truth.argmax(-1), reduction="none")
    return torch.stack(halves).mean(0) + _GREEDY_SHARE * first


def cross_entropy(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the cross entropy of guessed scores with the probabilities of true ones, both [n, V], for each row."""
    return -(truth.softmax(-1) * guess.log_softmax(-1)).sum(-1)


def copy_buffers(target: Any, model: Any) -> None:
    """Set the buffers of a head, such as frequencies of positions, to the target's of the same names."""
    own = dict(model.named_buffers())
    for name, buffer in target.named_buffers():
        if name in own:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = copy.deepcopy(buffer)


def fit(
    options: HeadOptions, model: Any, loss: Callable[[Tensor], tuple[Tensor, list[float]]], save: Callable[[], None]
) -> list[list[float]]:
    """Train a head, and write it every few steps and at the end.

    Args:
        options: options of the run.
        model: modules of the head.
        loss: function from token ids [rows, length] to the loss and its parts.
        save: function that writes the head.

    Returns:
        Parts of the loss of every step.
    """
    parameters = list(model.parameters())
    print(f"{sum(each.numel() for each in parameters):,} weights", flush=True)
    device = parameters[0].device
    optimizers, texts = Optimizers(model, options.lr, options.muon_lr), _texts(options)
    rng = np.random.default_rng(options.seed)
    history: list[list[float]] = []
    while len(history) < options.steps:
        ids = torch.from_numpy(_windows(texts, options.rows, options.length, rng)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
            total, parts = loss(ids)
        if not np.isfinite(parts).all():
            raise ArithmeticError(f"the loss of step {len(history)} is not finite; try a lower learning rate")
        torch.autograd.backward(total)
        optimizers.step(schedule(len(history) / options.steps, 0.02, 0.6))
        history.append(parts)
        if len(history) % LOG_EVERY == 0:
            means = ", ".join(f"{each:.3f}" for each in np.mean(history[-LOG_EVERY:], axis=0))
            tokens = len(history) * options.rows * options.length
            print(f"step {len(history)}, {tokens:,} tokens, {time.process_time():.0f} s: {means}", flush=True)
            save()
    save()
    return history


def _texts(options: HeadOptions) -> list[NDArray[Any]]:
    """Return the token ids of the chats, with the target's own tokenizer and template, and of each token file.

    Raises:
        UsageError: neither is given.
    """
    names = options.data.split(",") if options.data else []
    texts: list[NDArray[Any]] = [np.load(Path(name), mmap_mode="r", allow_pickle=False) for name in names]
    if options.chats is not None:
        tokenizer = load_tokenizer(options.target)
        chats = [[_message(**message) for message in chat] for chat in read_chats(options.chats)]
        rendered = (tokenizer.render(chat, ending="none") for chat in chats)
        texts.append(np.concatenate([np.asarray(tokenizer.encode(text)) for text in rendered]))
    if not texts:
        raise UsageError("there is no text to learn from", hint="name a file of chats with --chats")
    return texts


def _message(role: str, content: str) -> Message:
    match role:
        case "system" | "user" | "assistant":
            return Message(role, content)
    raise UsageError(f"a chat has a message of the role '{role}'", hint="roles are system, user and assistant")


def _windows(texts: list[NDArray[Any]], count: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return random windows of the texts, int64 [count, length]."""
    rows = []
    for _ in range(count):
        ids = texts[rng.integers(len(texts))]
        if len(ids) < length:
            raise UsageError(f"a text has only {len(ids)} tokens", hint=f"a window needs {length} tokens")
        begin = int(rng.integers(len(ids) - length + 1))
        rows.append(ids[begin : begin + length].astype(np.int64))
    return np.stack(rows)
