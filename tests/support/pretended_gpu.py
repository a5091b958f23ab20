"""A GPU that is only pretended: torch's CPU computes, but every tensor knows on which device it would be.

Storages carry the device that they pretend to be on. `Tensor.device`, `Tensor.to`, factories and `torch.cuda` follow
it, so code takes its CUDA paths. An operation that CUDA refuses, because its tensors are on two devices, raises here,
too. What would cost time on a GPU is counted by phase of a step: kernels, copies over the link, waits of the host.

Only the thread that enters the block may compute. Times, the order of streams, and operations that CUDA lacks for a
dtype are not modelled; test_cuda_order.py checks the order, test_cuda.py a real GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers.activations  # noqa: F401 - imports what looks at torch.cuda, which must be the real one
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specchat.engine.stats import StepClock
from specchat.models.quant import autotune
from specchat.models.quant.formats import nf4
from specchat.models.quant.kernels import grouped, triton
from specchat.models.quant.kernels.bnb import bnb, dynamic_map
from support import tiles
from support.pretended_graphs import CaptureError, PretendedGraph, recording
from support.pretended_runtime import PretendedRuntime

CPU = torch.device("cpu")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that compute nothing: they view memory, or take memory.
VIEWS = _names(
    """view _unsafe_view reshape _reshape_alias expand permute transpose t slice select unsqueeze squeeze split
    split_with_sizes unbind alias detach as_strided unfold diagonal lift_fresh empty empty_like new_empty empty_strided
    new_empty_strided chunk unflatten detach_ resize_ set_ squeeze_ unsqueeze_ is_same_size view_as_real
    view_as_complex _local_scalar_dense"""
)
# Kernels of operations that start more than one; from profiles of torch 2.x, roughly.
KERNELS = {"topk": 3, "sort": 4, "argsort": 4, "nonzero": 4, "cumsum": 2, "bincount": 3, "repeat_interleave": 3}
# Operations after which the host waits for a value, or for the size of the result.
WAITS = _names(
    """_local_scalar_dense nonzero equal is_nonzero masked_select unique _unique2 unique_consecutive unique_dim
    bincount"""
)
# Operations whose index may be on the CPU: torch copies it to the device.
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
# Operations that take no number from the CPU in place of a tensor.
STRICT = frozenset({"cat", "stack", "index_select", "gather", "embedding", "mm", "addmm", "bmm"})
_FILLED = _names("zeros ones full arange eye rand randn randint linspace tril_indices")
_NUMBERS = _names("item __bool__ __int__ __float__ __index__")
_FROM_HOST = frozenset({"tensor", "as_tensor", "from_numpy"})


class WrongDeviceError(RuntimeError):
    """An operation that CUDA refuses."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: "kernel", "view", "h2d", "d2h", "hop" from one GPU to another, or "wait" of the host; a copy that the host
            waits for is two events.
        name: operation.
        nbytes: bytes of a copy.
        phase: "drafting", "verifying", "sampling", or "rest" outside of these.
        stream: stream of the work.
    """

    kind: str
    name: str
    nbytes: int
    phase: str
    stream: str


def home(tensor: Tensor) -> torch.device | None:
    """The GPU that a tensor pretends to be on; None on the CPU or on meta."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return getattr(tensor.untyped_storage(), "pretended", None)


def move_in(tensor: Tensor, device: torch.device | None) -> None:
    """Let a tensor's memory pretend to be on a device; None and the CPU end the pretence."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return
    storage = tensor.untyped_storage()
    if device is not None and device.type == "cuda":
        storage.pretended = torch.device("cuda", device.index or 0)
    elif hasattr(storage, "pretended"):
        del storage.pretended


def tensors_of(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class PretendedGpu:
    """A `with` block in which this process believes that it has NVIDIA GPUs.

    Args:
        capability: compute capability.
        num_devices: number of GPUs.
        kernels: names of quantized kernels, the fastest first; where a format offers none of them, its first is.

    Attributes:
        events: everything that happened so far; tests may clear it.
        runtime: streams, events and pinned memory.
        phase: phase of the step.
        recording: graph that is being recorded; None at other times.
    """

    def __init__(self, capability: tuple[int, int] = (8, 9), num_devices: int = 1, kernels: Sequence[str] = ()) -> None:
        self.events: list[Event] = []
        self.phase = "rest"
        self.is_silent = False
        self.recording: PretendedGraph | None = None
        self.runtime = PretendedRuntime(self.note, capability, num_devices)
        self._kernels = kernels
        self._stack = ExitStack()

    def __enter__(self) -> PretendedGpu:
        import transformers.generation  # noqa: F401  what asks for a GPU when it is imported must not see this one

        bnb()
        enter = self._stack.enter_context
        for name, value in self.runtime.functions().items():
            enter(mock.patch.object(torch.cuda, name, value))
        enter(mock.patch.object(torch.cuda, "CUDAGraph", lambda: PretendedGraph(self.note, self.silent)))
        enter(mock.patch.object(torch.cuda, "graph", partial(recording, self)))
        enter(mock.patch.object(torch.cuda, "graph_pool_handle", object))
        for name in ("drafting", "verifying", "sampling"):
            enter(mock.patch.object(StepClock, name, self._in_phase(name, getattr(StepClock, name))))
        enter(mock.patch.object(nf4, "fused_product", lambda: self._fused_product))
        enter(mock.patch.object(triton, "_kernels", SimpleNamespace))
        enter(mock.patch.object(triton, "_block_kernels", lambda: None))
        enter(mock.patch.object(triton, "dequantize_by_triton", self._dequantize))
        enter(mock.patch.object(triton, "multiply_by_triton", self._multiply))
        experts = SimpleNamespace(multiply=self._multiply_experts)
        enter(mock.patch.object(grouped, "_kernels", lambda: experts))
        enter(mock.patch.object(grouped, "_values", cache(grouped._values.__wrapped__)))  # of this device only
        enter(mock.patch.object(autotune, "_measured", self._chosen))
        # Choices of this block alone, neither read from files nor written to any.
        enter(mock.patch.object(autotune.autotuner(), "_known", {}))
        enter(mock.patch.object(autotune.Autotuner, "_known_on", lambda own, device: own._known.setdefault(device, {})))
        enter(mock.patch.object(autotune.Autotuner, "_save", lambda *_: None))
        enter(_Functions(self))
        enter(_Kernels(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def note(self, kind: str, name: str, nbytes: int = 0, stream: str | None = None, count: int = 1) -> None:
        if self.recording is not None and kind in ("h2d", "d2h", "hop", "wait"):
            raise CaptureError(f"operation not permitted when stream is capturing: {name}")
        if not self.is_silent and self.recording is None:
            event = Event(kind, name, nbytes, self.phase, stream or self.runtime.current.name)
            self.events.extend([event] * count)

    def counts(self, *phases: str) -> Counter[str]:
        """Number of events by kind, of some phases or of all."""
        return Counter(event.kind for event in self.events if not phases or event.phase in phases)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Count nothing and refuse nothing."""
        before, self.is_silent = self.is_silent, True
        try:
            yield
        finally:
            self.is_silent = before

    def _in_phase(self, name: str, original: Callable[[StepClock], Any]) -> Callable[[StepClock], Any]:
        @contextmanager
        def within(clock: StepClock) -> Iterator[None]:
            self.phase = name
            try:
                with original(clock):
                    yield
            finally:
                self.phase = "rest"

        return within

    # --- kernels that only a GPU has ----------------------------------------------------------------------------------

    def one_kernel(self, name: str, given: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """Compute something that is one kernel on a GPU, whatever torch takes for it."""
        homes = {home(tensor) for tensor in given}
        if None in homes or len(homes) > 1:
            raise WrongDeviceError(f"{name}: tensors on {sorted(map(str, homes))}")
        with self.silent():
            out = compute()
        move_in(out, homes.pop())
        self.note("kernel", name)
        return out

    def _fused_product(
        self,
        x: Tensor,
        codes: Tensor,
        shape: tuple[int, int],
        absmax: Tensor,
        block: int,
        kind: str,
        bias: Tensor | None = None,
        nested: Tensor | None = None,
        table: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        def compute() -> Tensor:
            scales = absmax
            if nested is not None:
                assert offset is not None
                scales = bnb().dequantize_blockwise(nested, absmax, dynamic_map(CPU), 256, torch.float32) + offset
            weight = bnb().dequantize_4bit(codes, scales, block, kind, tuple(shape), x.dtype)
            return torch.nn.functional.linear(x, weight, bias)

        return self.one_kernel("gemm_4bit", tensors_of((x, codes, absmax, bias, nested, table, offset)), compute)

    def _dequantize(
        self, eager: Any, bits: int, group: Any, rounds: bool, segments: Any, begin: int, end: int, out: Tensor
    ) -> Tensor:
        given = [*segments.values(), out]
        return self.one_kernel("triton_affine", given, lambda: eager(segments, begin, end, out))

    def _multiply(self, eager: Any, *given: Any) -> Tensor:
        x, segments, shape, _, bias = given[-5:]

        def compute() -> Tensor:
            memory = torch.empty(shape, dtype=x.dtype, device=x.device)
            return torch.nn.functional.linear(x, eager(segments, 0, shape[0], memory))

        out = self.one_kernel("triton_product", [x, *segments.values()], compute)
        return out if bias is None else out.add_(bias)

    def _multiply_experts(self, *given: Any) -> bool:
        def compute() -> Tensor:
            assert tiles.multiply(*given)
            return given[5]

        self.one_kernel("experts", tensors_of(given[:6]), compute)
        return True

    def dequantize_4bit(self, given: Sequence[Any], out: Tensor) -> None:
        codes, absmax, block, kind, shape, dtype = given[:6]
        assert tuple(out.shape) == tuple(shape) and out.dtype == dtype and out.is_contiguous()
        assert codes.data_ptr() % 16 == 0, "the kernel loads 16 bytes at a time"

        def compute() -> Tensor:
            return out.copy_(bnb().dequantize_4bit(codes, absmax, block, kind, shape, dtype))

        self.one_kernel("dequantize_4bit", (codes, absmax, out), compute)

    def _chosen(self, product: str, calls: dict[str, Any], device: torch.device) -> autotune.KernelChoice:
        """Choose a kernel by name instead of measuring."""
        name = next(each for each in (*self._kernels, *calls) if each in calls)
        return autotune.KernelChoice(product, name, dict.fromkeys(calls, 0.0))


class _Functions(TorchFunctionMode):
    """torch's functions as Python calls them: what concerns devices."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(func, args, kwargs)
        if kwargs.get("device") is not None:
            return self._made(func, name, args, kwargs)
        there = home(args[0]) if args and isinstance(args[0], Tensor) else None
        if there is None:
            return func(*args, **kwargs)
        if name == "get_device":
            return there.index
        if name == "numpy":
            raise TypeError(f"can't convert {there} device type tensor to numpy")
        if name == "tolist":
            self._gpu.note("d2h", name, args[0].nbytes)
            self._gpu.note("wait", name)
            with self._gpu.silent():
                return func(*args, **kwargs)
        if name in _NUMBERS:  # in inference mode, torch does not hand these to dispatch modes
            self._gpu.note("wait", name)
            with self._gpu.silent():
                return func(*args, **kwargs)
        if name == "new_tensor":
            return self._made(func, name, args, {**kwargs, "device": there})
        if name in ("scaled_dot_product_attention", "linear", "rms_norm"):
            return self._gpu.one_kernel(name, tensors_of((args, kwargs)), lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        there = home(tensor)
        if there is not None:
            if func == torch.Tensor.device.__get__:
                return there
            if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
                return func == torch.Tensor.is_cuda.__get__
        return func(tensor)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Move a tensor to a device, or cast it, or both."""
        tensor, device, dtype, waits = args[0], None, None, not kwargs.pop("non_blocking", False)
        copy = kwargs.pop("copy", False)
        if func is torch.Tensor.to:
            like = kwargs.get("other", args[1] if len(args) > 1 else None)
            if isinstance(like, Tensor):
                device, dtype = home(like) or like.device, like.dtype
            else:
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        else:
            device = CPU if func is torch.Tensor.cpu else torch.device("cuda", 0)
        here = home(tensor)
        if device is None or "meta" in (device.type, tensor.device.type) or _same(here, device):
            to = {} if device is None or here is not None else {"device": device}
            if tensor.is_meta and device is not None and device.type == "cuda":
                raise NotImplementedError("Cannot copy out of meta tensor; no data!")
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy, **to)
        with self._gpu.silent():
            out = tensor.detach().to(dtype or tensor.dtype, copy=True)
        move_in(out, device)
        to_device = device.type == "cuda"
        kind = "d2h" if not to_device else "h2d" if here is None else "hop"
        self._gpu.note(kind, "to" if kind != "hop" else f"to {device}", tensor.nbytes)
        if not to_device and waits:
            self._gpu.note("wait", "to")
        if out.dtype != tensor.dtype:
            self._gpu.note("kernel", "to")
        return out

    def _made(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that makes tensors on a device."""
        device = torch.device(kwargs.pop("device"))
        if device.type != "cuda":
            return func(*args, **kwargs, device=device)
        self._gpu.runtime.check(device)
        make = partial(func, *args, **kwargs, device="cpu")
        with self._gpu.silent():
            out = make()
        for tensor in tensors_of(out):
            move_in(tensor, device)
        if self._gpu.recording is not None:
            self._gpu.recording.add_made(make, out)
        if name in _FROM_HOST or name == "new_tensor":
            self._gpu.note("h2d", name, sum(tensor.nbytes for tensor in tensors_of(out)))
        elif name in _FILLED or name.removeprefix("new_").removesuffix("_like") in _FILLED:
            self._gpu.note("kernel", name)
        return out


def _same(here: torch.device | None, device: torch.device) -> bool:
    """Whether a tensor is on a device already."""
    if here is None:
        return device.type != "cuda"
    return device.type == "cuda" and (device.index is None or device.index == here.index)


class _Kernels(TorchDispatchMode):
    """torch's operations as devices get them: what is computed where."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = tensors_of((args, kwargs))
        homes = [home(tensor) for tensor in given]
        there = next((each for each in homes if each is not None), None)
        if there is None:
            return func(*args, **kwargs)
        recorded = self._gpu.recording
        if recorded is not None:
            recorded.keep(func, args, kwargs)
        if name == "dequantize_4bit" and func._overloadname == "out":
            self._gpu.dequantize_4bit(args, kwargs.get("out", args[-1]))
            if recorded is not None:
                recorded.add(func, args, kwargs, None)
            return None
        if name == "histc" and not args[0].is_floating_point():  # the CPU has no histogram of integers
            out = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            if not self._gpu.is_silent:
                self._check(name, args, given, homes)
            out = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in given if tensor.layout is torch.strided}
        for tensor in tensors_of(out):
            if tensor.layout is torch.strided and tensor.untyped_storage()._cdata not in known:
                move_in(tensor, there)
        if recorded is not None:
            recorded.add(func, args, kwargs, out)
        self._count(func, name, args, homes)
        return out

    def _count(self, func: Any, name: str, args: Any, homes: Sequence[torch.device | None]) -> None:
        note = self._gpu.note
        if name in ("copy_", "_copy_from") and len(homes) == 2 and None not in homes and homes[0] != homes[1]:
            note("hop", name, args[0].nbytes)
            return
        if name in ("copy_", "_copy_from") and None in homes[:2]:
            if homes[0] is None:
                note("d2h", name, args[0].nbytes)
                note("wait", name)
            elif args[1].dim() == 0:  # a number is an argument of the kernel
                note("kernel", name)
            else:
                pinned = self._gpu.runtime.is_pinned(args[1])
                note("h2d", "copy_ of pinned" if pinned else name, args[0].nbytes)
            return
        masks = [each for each in tensors_of(args[1:2]) if each.dtype == torch.bool] if name in INDEXED else []
        sized_by_values = name == "repeat_interleave" and func._overloadname != "self_int"
        if name in WAITS or masks or sized_by_values:
            note("wait", name)
        if name in VIEWS:
            note("view", name)
        else:
            note("kernel", name, count=KERNELS.get(name, 1))

    def _check(self, name: str, args: Any, given: Sequence[Tensor], homes: Sequence[torch.device | None]) -> None:
        """Refuse what CUDA refuses."""
        pairs = list(zip(given, homes, strict=True))
        strange = [tensor for tensor, there in pairs if there is None and not tensor.is_meta]
        devices = {there for there in homes if there is not None}
        if name in ("copy_", "_copy_from") or (not strange and len(devices) == 1):
            return
        if len(devices) == 1 and name not in STRICT and all(tensor.dim() == 0 for tensor in strange):
            return
        if name in INDEXED and len(devices) == 1 and home(args[0]) is not None:
            values = tensors_of(args[2:3])
            if not values or home(values[0]) is not None or values[0].dim() == 0:
                self._gpu.note("h2d", f"{name} by an index on the CPU")
                return
        where = ", ".join(f"{tuple(tensor.shape)} on {there or 'cpu'}" for tensor, there in pairs)
        raise WrongDeviceError(f"{name}: expected all tensors to be on the same device: {where}")
