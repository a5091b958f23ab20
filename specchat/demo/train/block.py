"""Train a block drafter for a small target: a DFlash2 head, which guesses all tokens of a block in one pass.

    python -m specchat.demo.train.block --target FOLDER --chats chats.jsonl

The target is a model folder whose layers have plain queries, keys and values, such as Llama's and Qwen 3's; the head's
layers begin as copies of its last ones. Blocks begin at random tokens of the windows, and see the target's states of
the text before. Texts and options are those of `mtp`. The result is a folder beside the target's, FOLDER-dflash, which
`--draft ./FOLDER-dflash` takes; --out names another one.
"""

import json
import math
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
    cross_entropy,
    fit,
    load_target,
    masked_attention,
    row_losses,
    run,
)
from specchat.demo.train.options import parse, resolve_device
from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.dflash import DFlashConfig, SecondConfig
from specchat.models.hf.attention import cache_for
from specchat.models.hf.dflash import DFlashSkeleton, as_dflash
from specchat.models.hf.mtp import few_layers
from specchat.models.hf.skeleton import Skeleton, build_skeleton

_FILE = "model.safetensors"
_MOST_TAPS = 4
# Tokens of a level whose scores depend on the token before them, rows that a convolution reads, and columns that share
# its coefficients.
_CANDIDATES, _CONVOLVED, _GROUP = 32, 2, 16
# A tree needs the first levels most: the weight of a level is exp(-level / fade).
_FADE = 4.0
# Weight of the scores without the token before, which choose the candidates of a level.
_PLAIN_SHARE = 0.5


@dataclass(frozen=True)
class BlockOptions(HeadOptions):
    """Train a block drafter on chats and on token files that generate wrote."""

    out: Annotated[Path | None, "folder to write; the target's with -dflash at its end by default"] = None
    layers: Annotated[int, "layers of the head"] = 2
    block: Annotated[int, "rows of a block: the last token, and the tokens to guess"] = 8
    rank: Annotated[int, "width of the codebooks that score pairs of tokens"] = 32
    blocks: Annotated[int, "blocks per window"] = 48


class BlockHead:
    """A trainable block drafter beside a frozen target.

    Args:
        options: options of the run.
        device: device of both.

    Raises:
        UnsupportedModelError: a target whose layers such a head cannot have.
    """

    def __init__(self, options: BlockOptions, device: torch.device) -> None:
        self._target = load_target(options.target, device)
        config, num_layers = self._target.config, len(self._target.layers)
        self.settings = DFlashConfig(
            layers=_taps(num_layers),
            target_size=config.hidden_size,
            mask_token=_mask_token(config),
            block_size=options.block,
            target_layers=num_layers,
            sliding_is_causal=False,
            second=SecondConfig(_CONVOLVED, _GROUP, options.rank, _CANDIDATES, 1.0, 1.0, 0.0),
        )
        self._config = few_layers(config, options.layers, has_experts=False)
        self._config.tie_word_embeddings = False
        whole = build_skeleton(self._config, torch.float32, masked_attention)
        self.skeleton: DFlashSkeleton = as_dflash(whole, self.settings)
        self.skeleton.model.to_empty(device=device)
        copy_buffers(self._target.model, self.skeleton.model)
        self._begin_like(self._target)
        self.skeleton.use_blocks(options.block)
        self._num_blocks = options.blocks
        self._device = device

    @torch.no_grad()
    def _begin_like(self, target: Skeleton) -> None:
        """Begin as the target's last layers, which read what enters the first of them; convolutions change nothing."""
        decoder, count = self.skeleton.decoder, len(self.skeleton.layers)
        for own, layer in zip(self.skeleton.layers, target.layers[-count:], strict=True):
            values, names = layer.state_dict(), own.state_dict().keys()
            if not values.keys() <= names:
                raise UnsupportedModelError(f"'{target.config.model_type}' has layers that a block drafter cannot have")
            own.load_state_dict(values, strict=False)
            for convolution in (own.attention_conv, own.mlp_conv):
                torch.nn.init.zeros_(convolution.kernel_projection.weight)
                torch.nn.init.zeros_(convolution.base_kernel)[:, 0] = 1.0
        decoder.norm.load_state_dict(target.decoder.norm.state_dict())
        decoder.hidden_norm.load_state_dict(self.skeleton.layers[0].input_layernorm.state_dict())
        width, entered = self.settings.target_size, len(target.layers) - count - 1
        near = min(range(len(self.settings.layers)), key=lambda part: abs(self.settings.layers[part] - entered))
        torch.nn.init.kaiming_uniform_(decoder.fc.weight, a=5**0.5).mul_(0.3)
        decoder.fc.weight[:, near * width : (near + 1) * width] += torch.eye(width, device=decoder.fc.weight.device)
        selector = decoder.candidate_selector
        torch.nn.init.kaiming_uniform_(selector.hidden_projection.weight, a=5**0.5)
        embeddings = target.model.get_input_embeddings().weight
        for codebook, scale in ((selector.predecessor_codebook, 1.0), (selector.successor_codebook, 0.05)):
            # Tokens with like embeddings begin with like rows.
            mixed = embeddings @ torch.randn(width, codebook.shape[1], device=embeddings.device)
            codebook.copy_(scale * mixed / mixed.std())
        self.skeleton.model.requires_grad_(True).train()

    def loss(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, list[float]]:
        """Return the loss of a batch, and its part for each level of the blocks, in nats.

        Args:
            ids: token ids [rows, length].
            generator: generator of the places at which blocks begin (CPU).
        """
        size, selector = self.settings.block_size, self.skeleton.decoder.candidate_selector
        begins = 1 + torch.randperm(ids.shape[1] - size, generator=generator)[: self._num_blocks].sort().values
        begins = begins.to(self._device)
        before = begins[:, None] + torch.arange(size - 1, device=self._device)  # the token before each guessed one
        tapped, final = self._read(ids)
        with torch.no_grad():
            truth = self._target.head(final[:, before].flatten(0, 2)).float()
        states = self._blocks(ids, tapped, begins).flatten(0, 2)
        plain = self._target.head(states).float()
        left = selector.predecessor_codebook[ids[:, before].flatten()] * selector.hidden_projection(states)
        guess = plain + (left @ selector.successor_codebook.T).float()
        by_level = row_losses(guess, truth).unflatten(0, (-1, size - 1)).mean(0)
        plain_by_level = cross_entropy(plain, truth).unflatten(0, (-1, size - 1)).mean(0)
        weights = torch.exp(-torch.arange(size - 1, device=self._device) / _FADE)
        total = ((by_level + _PLAIN_SHARE * plain_by_level) * weights).sum() / weights.sum()
        return total, by_level.tolist()

    @torch.no_grad()
    def scores(self, ids: Tensor, begin: int) -> Tensor:
        """Return the scores of the tokens behind a token of a text, [levels, V], below the text's own tokens.

        Args:
            ids: token ids [1, length].
            begin: place of the token.
        """
        tapped, _ = self._read(ids)
        (states,) = self._blocks(ids, tapped, torch.tensor([begin], device=self._device)).flatten(0, 1)
        return self.skeleton.scores(self._target.head(states), states, ids[0, begin : begin + len(states)])

    @torch.no_grad()
    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the tapped layers side by side, [B, length, taps * hidden], and the final states."""
        outputs: dict[int, Tensor] = {}

        def keep(index: int) -> Any:
            return lambda _module, _args, out: outputs.update({index: out[0] if isinstance(out, tuple) else out})

        layers = self.settings.layers
        hooks = [self._target.layers[index].register_forward_hook(keep(index)) for index in layers]
        try:
            final: Tensor = self._target.decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([outputs[index] for index in layers], dim=-1), final

    def _blocks(self, ids: Tensor, tapped: Tensor, begins: Tensor) -> Tensor:
        """Return the states [B, blocks, levels, hidden] that guess the tokens behind those at `begins`."""
        size, places = self.settings.block_size, torch.arange(ids.shape[1], device=self._device)
        joined = self.skeleton.decoder.fc(tapped)
        texts = [self.skeleton.keys_and_values(each, places) for each in joined]
        context = [
            Rows((torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer])))
            for layer in zip(*texts, strict=True)
        ]
        tokens = torch.full((len(ids), len(begins), size), self.settings.mask_token, device=self._device)
        tokens[:, :, 0] = ids[:, begins]
        embed = self._target.model.get_input_embeddings()
        block = torch.arange(len(begins), device=self._device).repeat_interleave(size)
        seen = torch.cat([places < begins[block, None], block[:, None] == block], dim=1)
        positions = (begins[:, None] + torch.arange(size, device=self._device)).flatten()
        out = run(self.skeleton.decoder, embed(tokens.flatten(1)), positions, seen, cache_for(context))
        states: Tensor = out.unflatten(1, (-1, size))[:, :, 1:]
        return states

    def save(self, folder: Path) -> None:
        """Write the head's folder, in bfloat16 and in the layout of published heads."""
        folder.mkdir(parents=True, exist_ok=True)
        second = self.settings.second
        assert second is not None
        config = self._config.to_dict()
        config.pop("_name_or_path", None)  # a path on this machine
        values = {
            **config,
            "architectures": ["DFlash2DraftModel"],
            "dtype": "bfloat16",
            "block_size": self.settings.block_size,
            "num_target_layers": self.settings.target_layers,
            "conv_kernel_size": second.taps,
            "conv_group_size": second.group_size,
            "selector_rank": second.rank,
            "selector_top_k": second.num_candidates,
            "dflash_config": {
                "mask_token_id": self.settings.mask_token,
                "target_layer_ids": list(self.settings.layers),
                "causal": False,
            },
        }
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        parameters = self.skeleton.decoder.named_parameters()
        tensors = {name: each.detach().to("cpu", torch.bfloat16).contiguous() for name, each in parameters}
        save_file(tensors, folder / _FILE, {"format": "pt"})

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Set the head's weights to those of a folder that `save` wrote."""
        tensors = load_file(folder / _FILE)
        for name, parameter in self.skeleton.decoder.named_parameters():
            parameter.copy_(tensors[name])


def _taps(num_layers: int) -> tuple[int, ...]:
    """Return the layers whose outputs the head reads: a few, evenly spread, and the last one."""
    count = min(_MOST_TAPS, num_layers)
    return tuple(math.ceil((part + 1) * num_layers / count) - 1 for part in range(count))


def _mask_token(config: Any) -> int:
    """Return the token of the places to guess: that of the padding, which no text has, or the vocabulary's last one."""
    padding = getattr(config, "pad_token_id", None)
    return padding if isinstance(padding, int) else config.vocab_size - 1


def train(options: BlockOptions) -> list[list[float]]:
    """Train and write the folder; return the loss by level of the blocks for every step."""
    torch.manual_seed(options.seed)
    target = options.target.absolute()
    out = options.out or target.with_name(f"{target.name}-dflash")
    head = BlockHead(options, resolve_device(options.device))
    if options.resume:
        head.restore(out)
    generator = torch.Generator().manual_seed(options.seed)
    return fit(options, head.skeleton.model, lambda ids: head.loss(ids, generator), lambda: head.save(out))


if __name__ == "__main__":
    train(parse(BlockOptions))
