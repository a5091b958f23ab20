"""Train the target and, on the same batches, the draft.

    python -m specchat.demo.train.train --data data --out run --steps 2300

The target learns from the text. The draft learns from the text and, mostly, from the target's distribution. Training
starts with a mix of plain text and chats, followed by chats only; near the end, windows are twice as long.
OUT/target and OUT/draft are model folders. OUT/state.safetensors is the state that --resume loads.

    python -m specchat.demo.train.train --data data --out run --steps 500 --draft-only --written data/written.npy

trains only the draft against the finished OUT/target; half of each batch are chats that the target wrote.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specchat.demo.train.batches import Batches, Mixture
from specchat.demo.train.checkpoint import export, load, load_state, save_state
from specchat.demo.train.model import Llama, Shape
from specchat.demo.train.optimizers import Optimizers, schedule
from specchat.demo.train.options import parse, resolve_device
from specchat.demo.train.tokenizer import ChatTokenizer

LOG_EVERY = 20


@dataclass(frozen=True)
class TrainOptions:
    """Train a target and a draft on the files that prepare wrote."""

    data: Annotated[Path, "folder that prepare wrote"]
    out: Annotated[Path, "folder to write"]
    steps: Annotated[int, "steps of the whole run; the schedules are relative to it"]
    batch_tokens: Annotated[int, "tokens per step"] = 8192
    length: Annotated[int, "tokens per window"] = 512
    text_share: Annotated[float, "share of plain text in the first phase"] = 0.35
    chats_from: Annotated[float, "share of the run after which only chats are used"] = 0.65
    long_from: Annotated[float, "share of the run after which windows are twice as long"] = 0.85
    distillation: Annotated[float, "weight of the target's distribution in the draft's loss, 0 to 1"] = 0.75
    lr: Annotated[float, "peak learning rate of embedding and norms"] = 3e-3
    muon_lr: Annotated[float, "peak learning rate of the matrices"] = 0.02
    hidden: Annotated[int, "width of the target, a multiple of 64"] = 256
    layers: Annotated[int, "blocks of the target"] = 8
    draft_hidden: Annotated[int, "width of the draft, a multiple of 64"] = 128
    draft_layers: Annotated[int, "blocks of the draft"] = 2
    draft_only: Annotated[bool, "train only the draft"] = False
    written: Annotated[Path | None, "tokens that generate wrote, for half of each batch"] = None
    save_every: Annotated[int, "steps between saves"] = 200
    resume: Annotated[bool, "continue from the last save"] = False
    compile: Annotated[bool, "compile the step: about twice as fast, but takes minutes to start"] = False
    bf16: Annotated[bool, "multiply in bfloat16 (the weights stay float32)"] = True
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    seed: Annotated[int, "seed of the weights and the data order"] = 7


class Losses(NamedTuple):
    """The losses of one batch in nats per token: both cross entropies and KL(target || draft)."""

    target: Tensor
    draft: Tensor
    divergence: Tensor


def pair_losses(target: Llama, draft: Llama, windows: Tensor) -> Losses:
    """Compute the losses of both models on the same windows; the divergence gives the target no gradient.

    Args:
        target: model that learns from the text.
        draft: model that learns from the text and the target.
        windows: token ids, int64 [rows, length + 1].
    """
    inputs, labels = windows[:, :-1], windows[:, 1:].flatten()
    target_logits, draft_logits = (model(inputs).float().flatten(0, 1) for model in (target, draft))
    target_log, draft_log = target_logits.detach().log_softmax(-1), draft_logits.log_softmax(-1)
    divergence = (target_log.exp() * (target_log - draft_log)).sum(-1).mean()
    return Losses(F.cross_entropy(target_logits, labels), F.nll_loss(draft_log, labels), divergence)


class Trainer:
    """One training run: both models, their optimizers, and the number of finished steps (`step`)."""

    def __init__(self, options: TrainOptions) -> None:
        torch.manual_seed(options.seed)
        self.options, self.step = options, 0
        self._device = resolve_device(options.device)
        self._batches = Batches(options.data, options.written, options.batch_tokens, options.seed)
        self.target, self.draft = self._models()
        self._losses = torch.compile(pair_losses, dynamic=False) if options.compile else pair_losses
        # A finished draft needs only small changes. While both train, the small draft tolerates a higher rate.
        factor, muon_factor = (0.3, 0.3) if options.draft_only else (1.3, 1.0)
        draft_optimizers = Optimizers(self.draft, factor * options.lr, muon_factor * options.muon_lr)
        self._trained = {"draft": (self.draft, draft_optimizers)}
        if not options.draft_only:
            self._trained["target"] = (self.target, Optimizers(self.target, options.lr, options.muon_lr))
        self._state_path = options.out / ("draft_state.safetensors" if options.draft_only else "state.safetensors")
        if options.resume:
            self._restore()

    def advance(self) -> list[float]:
        """Do one step and return its losses, in the order of `Losses`.

        Raises:
            ArithmeticError: a loss is not finite.
        """
        options = self.options
        windows = self._batches.draw(self.step, self._mixture()).to(self._device)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=options.bf16):
            losses = self._losses(self.target, self.draft, windows)
        values = torch.stack(losses).tolist()
        if not np.isfinite(values).all():
            raise ArithmeticError(f"the loss of step {self.step} is not finite; try a lower learning rate")
        draft_loss = torch.lerp(losses.draft, losses.divergence, options.distillation)
        torch.autograd.backward(draft_loss if options.draft_only else draft_loss + losses.target)
        warm_up, decay = (0.01, 0.9) if options.draft_only else (0.02, 0.35)
        for _, optimizers in self._trained.values():
            optimizers.step(schedule(self.step / options.steps, warm_up, decay))
        self.step += 1
        return values

    def save(self) -> None:
        """Export the trained models, and save the state that `--resume` needs."""
        tensors: dict[str, Tensor] = {}
        for name, (model, optimizers) in self._trained.items():
            export(model, self.options.data / "tokenizer", self.options.out / name)
            tensors |= {f"{name}/weights/{key}": value for key, value in model.state_dict().items()}
            tensors |= {f"{name}/optimizers/{key}": value for key, value in optimizers.state().items()}
        save_state(self._state_path, tensors, self.step)

    def _models(self) -> tuple[Llama, Llama]:
        options = self.options
        if options.draft_only:
            target, draft = (load(options.out / name, self._device) for name in ("target", "draft"))
            return target.requires_grad_(False), draft
        vocab_size = ChatTokenizer(options.data / "tokenizer").vocab_size
        target = Llama(Shape.of_width(options.hidden, options.layers, vocab_size))
        draft = Llama(Shape.of_width(options.draft_hidden, options.draft_layers, vocab_size))
        return target.to(self._device), draft.to(self._device)

    def _mixture(self) -> Mixture:
        options, done = self.options, self.step / self.options.steps
        length = options.length * (2 if done >= options.long_from else 1)
        only_chats = options.draft_only or done >= options.chats_from
        return Mixture(
            length=min(length, self.target.shape.max_position_embeddings),
            text_share=0.0 if only_chats else options.text_share,
        )

    def _restore(self) -> None:
        tensors, self.step = load_state(self._state_path)
        for name, (model, optimizers) in self._trained.items():
            model.load_state_dict(_below(f"{name}/weights/", tensors))
            optimizers.restore(_below(f"{name}/optimizers/", tensors))


def train(options: TrainOptions) -> list[list[float]]:
    """Train to the end and save; return the losses of every step, in the order of `Losses`."""
    trainer = Trainer(options)
    history: list[list[float]] = []
    started = time.monotonic()
    while trainer.step < options.steps:
        history.append(trainer.advance())
        if trainer.step % LOG_EVERY == 0:
            target, draft, divergence = np.mean(history[-LOG_EVERY:], axis=0)
            pace = len(history) * options.batch_tokens / (time.monotonic() - started)
            losses = f"target {target:.3f}, draft {draft:.3f}, divergence {divergence:.3f}"
            print(f"step {trainer.step}: {losses}, {pace:.0f} tokens/s", flush=True)
        if trainer.step % options.save_every == 0:
            trainer.save()
    trainer.save()
    return history


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


if __name__ == "__main__":
    train(parse(TrainOptions))
