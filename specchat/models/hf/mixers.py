"""The recurrent mixers of hybrid models: delta nets, Mamba 1 and 2, lightning attention, and short convolutions.

transformers' mixers call a convolution and a scan by global names. Each mixer gets a copy of its class's forward whose
globals hold specchat's functions instead, bound to the state of the mixer's layer. Nothing outside of these modules
changes, so unmodified models can run in the same process.

transformers has two forms of each scan: by chunks for prompts, and one token at a time. They differ by rounding, and
in 16 bits by more than that (Mamba2's second form computes its update in 16 bits). specchat has one form for all rows,
float32 inside like the first: the prompt, the nodes of a tree, and a single token.
"""

import inspect
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

# MiniMax's mixers compute their scan in their forward, and have no convolution.
_LIGHTNING = "MiniMaxLightningAttention"


class LayerScans(Protocol):
    """The convolution and the recurrence of one layer, with the layer's state."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """Convolve inputs [rows, C] with weights [C, taps], and return float32 [rows, C]."""

    def scan(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, /, *, delta: bool) -> Tensor:
        """Run the recurrence over queries, keys [rows, H_k, D] and values [rows, H, D_v]; return the outputs."""

    def scan_channels(self, q: Tensor, k: Tensor, v: Tensor, steps: Tensor, rates: Tensor, /) -> Tensor:
        """Run the recurrence of Mamba 1 over queries, keys [rows, D] and values [rows, H]; return the outputs."""


def bind_mixers(layers: Sequence[Any], scans: Sequence[LayerScans | None]) -> None:
    """Let the mixer of each recurrent layer call the layer's own convolution and scan.

    Args:
        layers: decoder layers.
        scans: convolution and recurrence of each layer; None for layers without a state.
    """
    for layer, own in zip(layers, scans, strict=True):
        mixers = mixers_of(layer)
        assert len(mixers) == (own is not None), f"{type(layer).__name__} has {len(mixers)} recurrent mixers"
        for mixer in mixers:
            if type(mixer).__name__ == _LIGHTNING and own is not None:
                mixer.forward = partial(_lightning_attention, mixer, own)
            else:
                mixer.forward = _forward_with(mixer, {name: partial(call, own) for name, call in _CALLS.items()})


def release_mixers(layers: Sequence[Any]) -> None:
    """Give the mixers the forward of their classes again."""
    for layer in layers:
        for mixer in mixers_of(layer):
            vars(mixer).pop("forward", None)


def mixers_of(layer: Any) -> list[Any]:
    """Return the recurrent mixers of a layer: modules with a convolution, which know its index, or MiniMax's."""
    return [module for module in layer.modules() if _is_mixer(module)]


# transformers' form by chunks clamps the time steps of Nemotron-H and Zamba 2 to at least `time_step_min`, a bound of
# their initialization (0.001). Its form for one token does not clamp. The published `time_step_limit` of Nemotron-H is
# (0, inf), which vLLM follows in all rows; Zamba 2 has none. So specchat's reference clamps no row. `generate` of
# transformers may differ where a time step of the prompt is below the bound.
def unclamp_time_steps(model: Any) -> None:
    """Let the mixers of Nemotron-H and Zamba 2 take time steps of the published range, which has no lower bound.

    The form of transformers that decodes one token does so, and is the reference.
    """
    for module in model.modules():
        if type(module).__name__ in ("NemotronHMamba2Mixer", "Zamba2MambaMixer"):
            module.time_step_limit = tuple(getattr(model.config, "time_step_limit", None) or (0.0, float("inf")))


def _is_mixer(module: Any) -> bool:
    has_convolution = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    return (has_convolution and hasattr(module, "layer_idx")) or type(module).__name__ == _LIGHTNING


def _forward_with(mixer: Any, calls: dict[str, Callable[..., Any]]) -> Any:
    """Return a copy of a mixer's forward in which the functions of the given names are replaced."""
    forward = inspect.unwrap(type(mixer).forward)
    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, **calls},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(own, mixer)


# --- transformers' functions, computed by a layer's scans ---------------------------------------------------------


def _convolution(
    scans: LayerScans,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """Compute `causal_conv1d_fn`: inputs and outputs [1, C, rows]."""
    from transformers.activations import ACT2FN

    out = scans.convolve(hidden_states[0].T, weight, bias).to(weight.dtype)
    if activation is not None:
        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype).T[None]


def _delta_rule(
    scans: LayerScans,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `chunk_gated_delta_rule` and `chunk_kda`: keys [1, rows, H_k, D], values [1, rows, H, D_v]."""
    assert use_qk_l2norm_in_kernel, "specchat's delta rule normalizes queries and keys"
    out = scans.scan(query[0], key[0], value[0], g[0], beta[0], delta=True)
    return out[None].to(query.dtype).contiguous(), out.new_empty(0)


def _mamba2_scan(
    scans: LayerScans,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `mamba_chunk_scan_combined`: inputs [1, rows, H, D_v], time steps [1, rows, H], b and c per group."""
    dt = _time_steps(dt, dt_bias, softplus=dt_softplus).clamp(*dt_limit)[0].float()
    out = scans.scan(c[0], b[0], x[0], dt * a.float(), dt, delta=False)
    if (skip := others.get("D")) is not None:
        out = out + skip.float()[:, None] * x[0].float()
    out = out[None].contiguous()
    return (out, out.new_empty(0)) if return_final_states else out


def _mamba1_scan(
    scans: LayerScans,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    z: Tensor | None = None,
    return_last_state: bool = False,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_scan_fn`: inputs, time steps and gates [1, C, rows], rates a [C, D], b and c [1, D, rows]."""
    dt = _time_steps(dt, None if delta_bias is None else delta_bias[:, None], softplus=delta_softplus)
    out = scans.scan_channels(c[0].T, b[0].T, x[0].T, dt[0].T.float(), a.float()).T[None]
    if (skip := others.get("D")) is not None:
        out = out + skip.float()[:, None] * x.float()
    if z is not None:
        out = out * torch.nn.functional.silu(z)
    return (out, out.new_empty(0)) if return_last_state else out


def _lightning_attention(
    mixer: Any, scans: LayerScans, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Compute the forward of MiniMax's lightning attention: a scan whose heads decay at constant rates."""
    rows, heads = hidden_states.shape[1], mixer.num_attention_heads
    # Without channels: the call alone tells the state which rows of a tree its scan will keep.
    scans.convolve(hidden_states.new_empty(rows, 0), hidden_states.new_empty(0, 1), None)
    mixed = mixer.act_fn(mixer.qkv_proj(hidden_states))[0].unflatten(-1, (heads, 3 * mixer.head_dim))
    q, k, v = mixed.split(mixer.head_dim, dim=-1)
    decays = -mixer.slope_rate.float().reshape(1, heads).to(q.device).expand(rows, heads)
    out = scans.scan(q, k, v, decays, torch.ones_like(decays), delta=False)
    out = mixer.norm(out.to(hidden_states.dtype).reshape(1, rows, -1))
    return mixer.out_proj(torch.sigmoid(mixer.output_gate(hidden_states)) * out), None


def _time_steps(dt: Tensor, bias: Tensor | None, *, softplus: bool) -> Tensor:
    """Return the time steps of Mamba from their logits, in the dtype of `dt`."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return torch.nn.functional.softplus(dt) if softplus else dt


_CALLS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba_selective_scan": _mamba1_scan,
}
