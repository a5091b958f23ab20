"""Train an MTP head for a small target: one more layer that reads the target's states and guesses further tokens.

    python -m specchat.demo.train.mtp --target FOLDER --chats chats.jsonl

The target is any model folder that specchat runs, unchanged. The head learns the target's probabilities on chats of the
kind that the target will write, and on token files, such as text that generate let the target write. It guesses chains
of several tokens, and reads its own outputs for the later ones, as it does in a chat. The result is
FOLDER/mtp.safetensors, which `--draft mtp` finds; --out writes another file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specchat.demo.train.heads import (
    HeadOptions,
    Rows,
    copy_buffers,
    fit,
    load_target,
    masked_attention,
    row_losses,
    run,
)
from specchat.demo.train.options import parse, resolve_device
from specchat.models.checkpoint.mtp import qwen_name
from specchat.models.checkpoint.safetensors import MTP_FILE
from specchat.models.hf.attention import cache_for
from specchat.models.hf.mtp import MtpSkeleton, build_mtp, norm_path, without_shared

# Share of the rows at which chains of several tokens begin, and the weight of each further token of a chain.
_CHAIN_SHARE, _FADE = 1 / 3, 0.8


@dataclass(frozen=True)
class MtpOptions(HeadOptions):
    """Train an MTP head on chats and on token files that generate wrote."""

    out: Annotated[Path | None, "file to write; mtp.safetensors in the target's folder by default"] = None
    depth: Annotated[int, "tokens of a chain"] = 5


class Head:
    """A trainable MTP head below a frozen target.

    Args:
        folder: folder of the target.
        device: device of both.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._target = load_target(folder, device)
        layer = next(each for each in reversed(self._target.layers) if hasattr(each, "self_attn"))
        has_experts = any("experts" in name for name, _ in layer.named_parameters())
        whole = build_mtp(self._target.config, torch.float32, masked_attention, has_experts=has_experts)
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
        copy_buffers(self._target.model, self.skeleton.model)
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
        cache = cache_for([Rows()])
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
            self._run(self._embed(ids[:, 1:]), states[:, :-1], places, seen, cache_for([Rows()]))[0]
        )

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self._target.model.get_input_embeddings()(ids)
        return embeddings

    def _run(self, embeddings: Tensor, states: Tensor, positions: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """Compute the outputs of rows [B, rows, hidden] that see the rows of `seen`, bool [rows, keys]."""
        return run(self.skeleton.decoder, self.skeleton.join(embeddings, states), positions, seen, cache)

    def _loss(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """Return the mean loss of outputs [B, rows, hidden], given the target's scores [B, rows, V]."""
        return row_losses(self._target.head(outputs.flatten(0, 1)).float(), truth.flatten(0, 1)).mean()

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


def train(options: MtpOptions) -> list[list[float]]:
    """Train and write the file; return the loss by token of the chain for every step."""
    torch.manual_seed(options.seed)
    out = options.out or options.target / MTP_FILE
    head = Head(options.target, resolve_device(options.device))
    if options.resume:
        head.restore(load_file(out))
    generator = torch.Generator().manual_seed(options.seed)
    return fit(
        options,
        head.skeleton.model,
        lambda ids: head.loss(ids, options.depth, generator),
        lambda: save_file(head.tensors(), out, {"format": "pt"}),
    )


if __name__ == "__main__":
    train(parse(MtpOptions))
