"""A pretended accelerator: tensors that say that they are on the device "pretend", and are computed on the CPU.

Why it works. Torch keeps one backend free for private devices, PrivateUse1. Here it is given a name, a device module, a
device guard, and one fallback kernel in Python, which every operator without a kernel of its own reaches. A tensor of
the device is an ordinary tensor, with autograd, views and a storage, whose memory is host memory: a DLPack capsule says
where a tensor lives, and changing that one field makes a second tensor over the same memory that lives elsewhere. So
the fallback takes such second tensors on the CPU, runs the operator, and returns the results as the device's. Nothing
is copied, which is why views and operators in place work. Autograd, autocast, generators, optimisers and
``Module.to`` are torch's own, as they are for CUDA. Only the backward pass runs in the caller's thread, because the
engine counts the devices at the first one of a process, which may have come before this device.

What is as on CUDA: where devices mix an operator raises (but 0-dimensional numbers and indices may be on the CPU); a
generator of the CPU is refused; ``numpy()`` is refused; autocast has CUDA's lists of operators, as far as networks
reach them. What waits for a device is counted: values that are read, ``nonzero`` and what uses it (masks as indices),
sizes that depend on values, ``equal``, and copies across devices without ``non_blocking``.

What is not modelled: kernels that CUDA lacks, their rounding, streams, memory that ends, and linear algebra that waits.
"""

from __future__ import annotations

import ctypes
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
ON_CPU, ON_EXTENSION = 1, 12  # DLPack's kDLCPU and kDLExtDev; torch takes the second for PrivateUse1
SOURCE = str(Path(__file__).resolve().parent.parent / "src" / "holdfast")
aten = torch.ops.aten


class _DLTensor(ctypes.Structure):
    """The beginning of a DLManagedTensor: where its memory is, and on which device."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _same_memory(tensor: Tensor, device_type: int) -> Tensor:
    """A tensor over the same memory that says that it is on another device; it keeps the first one alive."""
    capsule = torch._C._to_dlpack(tensor)
    _DLTensor.from_address(_pointer(capsule, b"dltensor")).device_type = device_type
    return torch._C._from_dlpack(capsule)


def on_device(tensor: Tensor) -> Tensor:
    """A host tensor's memory as a tensor of the device."""
    return _same_memory(tensor, ON_EXTENSION)


def on_host(tensor: Tensor) -> Tensor:
    """A device tensor's memory as a tensor of the host. Counts no synchronisation: for the fallback and for tests."""
    return _same_memory(tensor.detach(), ON_CPU)


# --- where devices mix, and what waits --------------------------------------------------------------------------------

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
NUMBERS_MAY_BE_ON_CPU = {aten.fill_, aten.masked_fill, aten.masked_fill_, *INDEXING}
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive,
}  # fmt: skip

_waits: Counter[str] | None = None
_nothing: AbstractContextManager = nullcontext()


def _is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _refuse_mixed(op: torch._ops.OpOverload, args: tuple, leaves: list) -> None:
    packet = op.overloadpacket
    host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
    if packet in INDEXING and _is_on_device(args[0]):
        host = [value for value in args[2:3] if isinstance(value, Tensor) and value.device.type == "cpu"]
    if host and _About.of(op).numbers_may_be_on_cpu:
        host = [tensor for tensor in host if tensor.ndim]
    if host and any(map(_is_on_device, leaves)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} got one on {NAME}:0 and one on the CPU, "
            f"of shape {tuple(host[0].shape)}"
        )
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf._cdata not in DeviceGenerator.addresses:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _waits_for_values(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether the host must wait for the device before this operator can return."""
    packet = op.overloadpacket
    if packet in INDEXING:
        given = [index for index in args[1] if index is not None]
        if any(index.device.type == "cpu" for index in given):  # they are copied first
            return True
        is_number = len(args) > 2 and len(given) == 1 and args[2].ndim == 0  # CUDA fills: x[mask] = 0.0
        return not is_number and any(index.dtype in (torch.bool, torch.uint8) for index in given)
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return packet in WAITING


def _note_wait(what: str) -> None:
    if _waits is not None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(SOURCE)]
        where = f"{Path(frames[-1].filename).relative_to(SOURCE)}:{frames[-1].lineno}" if frames else "elsewhere"
        _waits[f"{where} {what}"] += 1


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Counts what waits for the device inside, by the line of holdfast and the operator: ``.total()`` is their number.

    On CUDA torch's own warnings are counted, line by line.
    """
    global _waits
    before, _waits = _waits, Counter()
    try:
        with _cuda_warnings(_waits) if torch.cuda.is_available() and is_real() else _nothing:
            yield _waits
    finally:
        _waits = before


@contextmanager
def _cuda_warnings(counter: Counter[str]) -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            counter[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


# --- the kernels ------------------------------------------------------------------------------------------------------


def _fallback(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Any operator: on the CPU, over the same memory."""
    leaves = list(_flat((*args, *kwargs.values())))
    _refuse_mixed(op, args, leaves)
    if _waits_for_values(op, args, kwargs):
        _note_wait(str(op))
    about, pairs = _About.of(op), []

    def to_host(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu") if leaf.type == NAME else leaf
        if not _is_on_device(leaf):
            return leaf
        if leaf.numel() == 0 and about.mutable:  # may be resized, which borrowed memory cannot be
            host = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
        else:
            host = on_host(leaf)
        pairs.append((leaf, host))
        return host

    host_args = [_mapped(to_host, value) for value in args]
    host_kwargs = {name: _mapped(to_host, value) for name, value in kwargs.items()}
    random = about.random and not any(isinstance(leaf, torch.Generator) for leaf in leaves)
    with _from_own_generator() if random else _nothing:
        out = about.overload_for(host_args)(*host_args, **host_kwargs)
    if about.mutable:
        for leaf, host in pairs:
            if not _same_place(leaf, host):  # out= was resized, or squeeze_ and the like
                leaf.data = on_device(host)
    given = {id(host): leaf for leaf, host in pairs}

    def to_device(x: Any) -> Any:
        return given[id(x)] if id(x) in given else on_device(x) if isinstance(x, Tensor) else x

    if about.view and not args[0].is_inference():  # as on any device, in inference mode too
        with torch.inference_mode(False):
            return _mapped(to_device, out)
    return _mapped(to_device, out)


class _About:
    """What the fallback asks of an operator."""

    def __init__(self, op: torch._ops.OpOverload) -> None:
        self.op = op
        self.mutable = op._schema.is_mutable
        self.view = not self.mutable and any(returned.alias_info for returned in op._schema.returns)
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.numbers_may_be_on_cpu = torch.Tag.pointwise in op.tags or op.overloadpacket in NUMBERS_MAY_BE_ON_CPU
        arguments = enumerate(op._schema.arguments)
        self.tensors = [i for i, argument in arguments if isinstance(argument.type, torch._C.TensorType)]

    @staticmethod
    @cache
    def of(op: torch._ops.OpOverload) -> _About:
        return _About(op)

    def overload_for(self, args: list) -> Callable[..., Any]:
        """The operator, or where a tensor arrives as the number that it was, its overload that takes a number."""
        numbers = any(isinstance(args[i], (int, float)) for i in self.tensors if i < len(args))
        return self.op.overloadpacket if numbers else self.op


def _flat(values: Iterable) -> Iterator:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, part) for part in value)
    return change(value)


def _same_place(first: Tensor, second: Tensor) -> bool:
    same = first.shape == second.shape and first.stride() == second.stride()
    return same and (first.numel() == 0 or first.data_ptr() == second.data_ptr())


def _copy_from(src: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    """``dst.copy_(src)``, and what is made of it: ``to``, ``cpu``, ``clone``, ``contiguous``."""
    if src.device != dst.device and not non_blocking:
        _note_wait(f"a copy to {dst.device.type}")
    ends = [on_host(tensor) if _is_on_device(tensor) else tensor for tensor in (src, dst)]
    ends[1].copy_(ends[0])
    return dst


def _of_their_own() -> Iterator[str]:
    """Operators with a kernel for all devices, to which the fallback is given all the same.

    Convolutions know their devices by name. The others are many: each would be two calls, to make room and to compute.
    """
    yield from ("convolution", "convolution_backward")
    for name in torch._C._dispatch_get_all_op_names():
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutogradNonFunctional"):
            namespace, _, operator = name.partition("::")
            if namespace == "aten":
                yield operator


def _under_autocast(op: torch._ops.OpOverload, dtype: torch.dtype | None):
    """An operator whose floating tensors are first converted: to this type, or to that of the autocast."""
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            wanted = dtype or torch.get_autocast_dtype(NAME)

            def converted(x: Any) -> Any:
                ours = _is_on_device(x) and x.is_floating_point() and x.dtype != torch.float64
                return x.to(wanted) if ours else x

            return op(*_mapped(converted, args), **{name: _mapped(converted, value) for name, value in kwargs.items()})

    return run


BFLOAT16 = (
    "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose2d.input", "prelu", "addmm", "addmv",
    "addr", "matmul", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "scaled_dot_product_attention",
)  # fmt: skip
FLOAT32 = (
    "exp", "expm1", "log", "log1p", "log10", "log2", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "reciprocal", "rsqrt", "softplus", "softmax.int", "log_softmax.int", "nll_loss", "cross_entropy_loss", "mse_loss",
    "l1_loss", "smooth_l1_loss", "kl_div", "layer_norm", "group_norm", "norm.ScalarOpt_dim", "cosine_similarity",
    "cdist", "cumsum", "cumprod", "sum", "sum.dim_IntList", "prod", "acos", "asin", "tan", "cosh", "sinh",
)  # fmt: skip


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


# --- the device's module and generator --------------------------------------------------------------------------------


class DeviceGenerator(torch.Generator):
    """A generator of the device. (Torch has no way to make one for a backend in Python by its device's name.)

    The fallback gets another Python object for the same generator, so they are known by their address.
    """

    device = property(lambda self: torch.device(NAME, 0))  # type: ignore[assignment]
    addresses: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.addresses.add(self._cdata)

    def __del__(self) -> None:
        self.addresses.discard(self._cdata)


class _Module:
    """What torch, its autocast and fork_rng ask of ``torch.pretend``."""

    default_generator = DeviceGenerator()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        self.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.default_generator.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> Tensor:
        return self.default_generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        self.default_generator.set_state(state)


@contextmanager
def _from_own_generator() -> Iterator[None]:
    """The device's generator in the place of the CPU's: not every random operator takes one as an argument."""
    cpu, own = torch.default_generator.get_state(), _Module.default_generator
    torch.default_generator.set_state(own.get_state())
    try:
        yield
    finally:
        own.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(cpu)


_backward = torch.autograd._engine_run_backward


def _backward_in_this_thread(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autograd.set_multithreading_enabled(False):
        return _backward(outputs, *args, **kwargs)


_deepcopy_by_storage = Tensor.__deepcopy__


def _deepcopy(tensor: Tensor, memo: dict) -> Tensor:
    """As for other tensors; but those copy their storage, and a backend in Python has no allocator of storages."""
    if not _is_on_device(tensor):
        return _deepcopy_by_storage(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


COLLECTIVES = ("allreduce_", "broadcast_", "allgather_", "_allgather_base_", "reduce_", "gather_", "barrier")


def _collective(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Over gloo, in the same memory: what is on the device is reached through tensors of the host."""
    found: dict[int, Tensor] = {}

    def to_host(x: Any) -> Any:
        if not _is_on_device(x):
            return x
        host = on_host(x)
        found[id(host)] = x
        return host

    out = op(*[_mapped(to_host, arg) for arg in args])
    return _mapped(lambda x: found.get(id(x), x), out)


@cache
def install() -> torch.device:
    """Register the backend, once in a process, and return its device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    everything, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_fallback, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ours.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in _of_their_own():
        ours.impl(name, partial(_fallback, _overload(name)), "PrivateUse1")
    for names, dtype in ((BFLOAT16, None), (FLOAT32, torch.float32)):
        for name in names:
            ours.impl(name, _under_autocast(_overload(name), dtype), "AutocastPrivateUse1")
    torch.autograd._engine_run_backward = _backward_in_this_thread
    Tensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign]
    install.libraries = everything, ours  # type: ignore[attr-defined]  # they end when they are collected
    return torch.device(NAME)


@cache
def install_groups() -> None:
    """Let processes exchange tensors of the device. Torch warns that kernels are replaced: for a process of its own."""
    groups = install_groups.library = torch.library.Library("c10d", "IMPL")  # type: ignore[attr-defined]
    for name in COLLECTIVES:
        groups.impl(name, partial(_collective, getattr(torch.ops.c10d, name).default), "PrivateUse1")


def is_real() -> bool:
    """Whether the tests of the device run on a real one: HOLDFAST_DEVICE=cuda names it."""
    return "HOLDFAST_DEVICE" in os.environ


def under_test() -> torch.device:
    """The device of the tests: the pretended one, or the real one that HOLDFAST_DEVICE names."""
    return torch.device(os.environ["HOLDFAST_DEVICE"]) if is_real() else install()
