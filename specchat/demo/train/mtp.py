"""Train an MTP head for a small target: one more layer that reads the target's states and guesses further tokens.

    python -m specchat.demo.train.mtp --target FOLDER --chats chats.jsonl

The target is any model folder that specchat runs, unchanged. The head learns the target's probabilities on chats of the
kind that the target will write, and on token files, such as text that generate let the target write. It guesses chains
of several tokens, and reads its own outputs for the later ones, as it does in a chat. The result is
FOLDER/mtp.safetensors, which `--draft mtp` finds; --out writes another file.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from specchat.demo.train.optimizers import Optimizers, schedule
from specchat.demo.train.options import parse, resolve_device
from specchat.demo.train.prepare import read_chats
from specchat.engine.drafting.sources import SMALL_DRAFT
from specchat.errors import UsageError
from specchat.models.checkpoint.mtp import qwen_name
from specchat.models.checkpoint.safetensors import MTP_FILE
from specchat.models.hf.attention import cache_for, row_scope
from specchat.models.hf.config import load_config, text_model_class
from specchat.models.hf.mtp import MtpSkeleton, build_mtp, norm_path, without_shared
from specchat.models.hf.skeleton import Skeleton, skeleton_of
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message

LOG_EVERY = 20
# Share of the rows at which chains of several tokens begin, and the weight of each further token of a chain.
_CHAIN_SHARE, _FADE = 1 / 3, 0.8
# Temperature of many answers: half of the divergence is measured there. The target's first choice counts, too, because
# greedy answers take it; the head's temperature for it is that which ranks their trees. In runs of 200 steps, this part
# brought 3% more tokens per step to greedy answers.
_SAMPLED, _GREEDY, _GREEDY_SHARE = 0.7, SMALL_DRAFT.greedy, 0.3


@dataclass(frozen=True)
class MtpOptions:
    """Train an MTP head on chats and on token files that generate wrote."""

    target: Annotated[Path, "folder of the target"]
    chats: Annotated[Path | None, 'file of lines {"messages": [{"role", "content"}, ...]}'] = None
    data: Annotated[str | None, "token files (.npy), joined by commas; batches draw from all files alike"] = None
    out: Annotated[Path | None, "file to write; mtp.safetensors in the target's folder by default"] = None
    steps: Annotated[int, "steps of the whole run; the schedules are relative to it"] = 1400
    rows: Annotated[int, "windows per step"] = 3
    length: Annotated[int, "tokens per window"] = 256
    depth: Annotated[int, "tokens of a chain"] = 5
    lr: Annotated[float, "peak learning rate of the norms"] = 2e-3
    muon_lr: Annotated[float, "peak learning rate of the matrices"] = 0.015
    resume: Annotated[bool, "start from the head in the file"] = False
    bf16: Annotated[bool, "multiply in bfloat16 (the weights stay float32)"] = True
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    seed: Annotated[int, "seed of the weights and the data order"] = 3


class _Rows:
    """A layer's keys and values so far, for a pass that gradients flow through."""

    def __init__(self) -> None:
        self.length = self.capacity = 0
        self._kv: tuple[Tensor, Tensor] | None = None

    def append(self, _layout: None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows [B, H_kv, rows, D], and return all rows."""
        if self._kv is not None:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self._kv, (keys, values), strict=True))
        self._kv, self.length = (keys, values), keys.shape[2]
        return keys, values


def chain_attention(
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


class Head:
    """A trainable MTP head below a frozen target.

    Args:
        folder: folder of the target.
        device: device of both.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = load_config(folder)
        model_class: Any = text_model_class(config)
        model = model_class.from_pretrained(folder, config=config, dtype=torch.float32)
        self._target: Skeleton = skeleton_of(model.to(device).eval().requires_grad_(False))
        layer = next(each for each in reversed(self._target.layers) if hasattr(each, "self_attn"))
        has_experts = any("experts" in name for name, _ in layer.named_parameters())
        whole = build_mtp(config, torch.float32, chain_attention, has_experts=has_experts)
        self._norm = norm_path(whole)
        self.skeleton: MtpSkeleton = without_shared(whole)
        self.skeleton.model.to_empty(device=device)
        self._begin_like(layer)
        self._device = device

    @torch.no_grad()
    def _begin_like(self, layer: Any) -> None:
        """Begin as the target's last layer with attention, which reads the state and little of the token."""
        own, width = self.skeleton.layers[0], self.skeleton.config.hidden_size
        values = layer.state_dict()
        torch.nn.init.kaiming_uniform_(own.eh_proj.weight, a=5**0.5)
        own.eh_proj.weight.mul_(0.3)[:, width:] += torch.eye(width, device=own.eh_proj.weight.device)
        norm = self.skeleton.model.get_submodule(self._norm)
        norm.load_state_dict(self._target.model.get_submodule(self._norm).state_dict())
        for each in (own.enorm, own.hnorm):
            each.weight.zero_()
            if not each(torch.ones(1, width, device=each.weight.device)).any():  # else the norm adds 1 to its weights
                each.weight.fill_(1.0)
        own.load_state_dict({**own.state_dict(), **values})
        for name, buffer in self._target.model.named_buffers():
            if name in dict(self.skeleton.model.named_buffers()):
                _set_buffer(self.skeleton.model, name, copy.deepcopy(buffer))
        self.skeleton.model.requires_grad_(True).train()

    def loss(self, ids: Tensor, depth: int, generator: torch.Generator) -> tuple[Tensor, list[float]]:
        """Return the loss of a batch, and its part for each token of the chains, in nats.

        Args:
            ids: token ids [rows, length].
            depth: tokens of a chain.
            generator: generator of the places at which chains begin (CPU).
        """
        with torch.no_grad():
            states = self._target.decoder(input_ids=ids, use_cache=False).last_hidden_state
            truth = torch.stack([self._target.head(each) for each in states]).float()
        length = ids.shape[1]
        starts = torch.arange(length - 2, device=self._device)
        cache = cache_for([_Rows()])
        seen = starts[:, None] >= starts
        out = self._run(self._embed(ids[:, 1:-1]), states[:, :-2], starts, seen, cache)
        losses = [self._loss(out, truth[:, 1:-1])]
        some = torch.randperm(length - 1 - depth, generator=generator)[: int(length * _CHAIN_SHARE)].sort().values
        some = some.to(self._device)
        out, own = out[:, some], torch.eye(len(some), dtype=torch.bool, device=self._device)
        seen = some[:, None] >= starts
        for level in range(1, depth):
            seen = torch.cat([seen, own], dim=1)
            out = self._run(self._embed(ids[:, some + level + 1]), out, some + level, seen, cache)
            losses.append(self._loss(out, truth[:, some + level + 1]))
        total = torch.stack([_FADE**level * each for level, each in enumerate(losses)]).sum()
        return total, [each.item() for each in losses]

    def scores(self, ids: Tensor) -> Tensor:
        """Return the scores of the token after the next one for each token of a text but the last, [length - 1, V].

        Args:
            ids: token ids [1, length].
        """
        states = self._target.decoder(input_ids=ids, use_cache=False).last_hidden_state
        places = torch.arange(ids.shape[1] - 1, device=self._device)
        seen = places[:, None] >= places
        return self._target.head(
            self._run(self._embed(ids[:, 1:]), states[:, :-1], places, seen, cache_for([_Rows()]))[0]
        )

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self._target.model.get_input_embeddings()(ids)
        return embeddings

    def _run(self, embeddings: Tensor, states: Tensor, positions: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """Compute the outputs of rows [B, rows, hidden] that see the rows of `seen`, bool [rows, keys]."""
        joined = self.skeleton.join(embeddings, states)
        with row_scope(lambda _: seen):
            out = self.skeleton.decoder(
                inputs_embeds=joined,
                position_ids=positions[None].expand(len(joined), -1),
                past_key_values=cache,
                use_cache=True,
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the mean cross entropy with the target's probabilities at two temperatures, and its first choice."""
        guess, truth = self._target.head(outputs.flatten(0, 1)).float(), truth.flatten(0, 1)
        halves = [_cross_entropy(guess / each, truth / each) for each in (1.0, _SAMPLED)]
        first = F.cross_entropy(guess / _GREEDY, truth.argmax(-1))
        return torch.stack(halves).mean() + _GREEDY_SHARE * first

    def tensors(self) -> dict[str, Tensor]:
        """Return the head's tensors by their names in Qwen's layout, in bfloat16."""
        prefix, norm = f"{self.skeleton.layers_name}.0.", f"{self._norm}.weight"
        found = {}
        for name, parameter in self.skeleton.model.named_parameters():
            inner = "norm.weight" if name == norm else name.removeprefix(prefix)
            found[qwen_name(inner)] = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Set the head's weights to tensors of `tensors`."""
        prefix, norm = f"{self.skeleton.layers_name}.0.", f"{self._norm}.weight"
        for name, parameter in self.skeleton.model.named_parameters():
            inner = "norm.weight" if name == norm else name.removeprefix(prefix)
            parameter.data.copy_(tensors[qwen_name(inner)])


def _cross_entropy(guess: Tensor, truth: Tensor) -> Tensor:
    """Return the mean cross entropy of guessed scores [n, V] with the probabilities of true ones."""
    return -(truth.softmax(-1) * guess.log_softmax(-1)).sum(-1).mean()


def _set_buffer(model: Any, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = value


def train(options: MtpOptions) -> list[list[float]]:
    """Train and write the file; return the loss by token of the chain for every step."""
    torch.manual_seed(options.seed)
    device = resolve_device(options.device)
    out = options.out or options.target / MTP_FILE
    head = Head(options.target, device)
    if options.resume:
        head.restore(load_file(out))
    count = sum(parameter.numel() for parameter in head.skeleton.model.parameters())
    print(f"{count:,} weights", flush=True)
    optimizers = Optimizers(head.skeleton.model, options.lr, options.muon_lr)
    texts = _texts(options)
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    history: list[list[float]] = []
    while len(history) < options.steps:
        ids = torch.from_numpy(_windows(texts, options.rows, options.length, rng)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
            loss, by_depth = head.loss(ids, options.depth, generator)
        if not np.isfinite(by_depth).all():
            raise ArithmeticError(f"the loss of step {len(history)} is not finite; try a lower learning rate")
        torch.autograd.backward(loss)
        optimizers.step(schedule(len(history) / options.steps, 0.02, 0.6))
        history.append(by_depth)
        if len(history) % LOG_EVERY == 0:
            means = ", ".join(f"{each:.3f}" for each in np.mean(history[-LOG_EVERY:], axis=0))
            tokens = len(history) * options.rows * options.length
            print(f"step {len(history)}, {tokens:,} tokens, {time.process_time():.0f} s: {means}", flush=True)
            save_file(head.tensors(), out, {"format": "pt"})
    save_file(head.tensors(), out, {"format": "pt"})
    return history


def _texts(options: MtpOptions) -> list[NDArray[Any]]:
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


if __name__ == "__main__":
    train(parse(MtpOptions))
