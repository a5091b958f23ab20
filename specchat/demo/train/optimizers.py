"""Optimizers: Muon for the matrices of the blocks, AdamW for embeddings, codebooks and all that is no matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING_DECAY = 0.05
MATRIX_DECAY = 0.01


def schedule(done: float, warm_up: float, decay: float) -> float:
    """Return the share of the peak learning rate: warm-up, constant, then decay to 2 %.

    Args:
        done: finished share of the run, 0 to 1.
        warm_up: share of the run for the warm-up.
        decay: share of the run for the decay.
    """
    if done < warm_up:
        return max(done / warm_up, 0.02)
    return min(1.0, 0.02 + 0.98 * (1 - done) / decay)


class Optimizers:
    """Both optimizers of one model, with one `step`.

    Args:
        model: model to train; each step reads and drops its gradients.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
    """

    def __init__(self, model: nn.Module, lr: float, muon_lr: float) -> None:
        self._weights: dict[str, Tensor] = dict(model.named_parameters())
        tables = {name for name in self._weights if "embed" in name or "codebook" in name}
        embeddings = [weight for name, weight in self._weights.items() if name in tables]
        norms = [weight for weight in self._weights.values() if weight.dim() != 2]
        matrices = [weight for name, weight in self._weights.items() if weight.dim() == 2 and name not in tables]
        decayed = {"params": embeddings, "weight_decay": EMBEDDING_DECAY}
        plain = {"params": norms, "weight_decay": 0.0}
        self._clipped = embeddings + norms  # Muon's update does not depend on the size of the gradient
        self._adam = torch.optim.AdamW([decayed, plain], lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self._muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=MATRIX_DECAY)
        self._peaks = {self._adam: lr, self._muon: muon_lr}

    def step(self, scale: float) -> None:
        """Update the weights at `scale` times the peak learning rates, and drop the gradients."""
        nn.utils.clip_grad_norm_(self._clipped, 1.0)
        for optimizer, peak in self._peaks.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return the state of both optimizers, as `<weight's name>:<kind>` -> tensor."""
        remembered = {name: self._memory(weight) for name, weight in self._weights.items()}
        return {f"{name}:{kind}": value for name, kinds in remembered.items() for kind, value in kinds.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for key, value in state.items():
            name, kind = key.rsplit(":", 1)
            weight = self._weights[name]
            self._memory(weight)[kind] = value.to(weight.device)

    def _memory(self, weight: Tensor) -> dict[str, Any]:
        is_adams = any(weight is other for other in self._clipped)
        memory: dict[str, Any] = (self._adam if is_adams else self._muon).state[weight]
        return memory
