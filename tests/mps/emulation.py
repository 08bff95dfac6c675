"""An Apple GPU made of CPU tensors, so that the MPS path can be watched on machines that have none.

`MpsTensor` says it lives on `mps` and holds its values in a CPU tensor. Inside `emulated()` every operator that touches
one arrives at `Emulation`, which takes torch's composites apart (what has to exist is their parts), refuses what MPS
lacks or gets wrong, notes the operator's name, and computes it on the CPU. So the runtime takes its real MPS branches,
a tensor left on the wrong device is found, and work on the host is told from work on the device.

Where torch itself branches on MPS in code that only its macOS build has, `_BRANCHES` does so by hand. What no emulation
shows: speed, memory, results of Apple's kernels, and trouble that only full-size shapes bring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from qruntime.ops.reference import hadamard

MPS = torch.device("mps", 0)
CPU = torch.device("cpu")
MEMORY_BYTES = 16 * 10**9
COMPOSITES = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
_COMPOSITE_KEY = torch._C.DispatchKey.CompositeImplicitAutograd

FORBIDDEN_TYPES = {
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and (dtype.is_complex or dtype == torch.float64 or "float8" in str(dtype))
}
FORBIDDEN_OPERATORS = {"aten::_int_mm", "aten::pin_memory", "aten::_pin_memory", "aten::record_stream"}
CROSSING = {"aten::copy_", "aten::_to_copy"}  # may see tensors of two devices

_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::linear", "aten::_mps_convolution"}
_LONGEST_SUM = 32766  # PyTorch issue 195163: on M1 and M2 longer products read past their operands


class Forbidden(AssertionError):
    """The MPS path did what MPS cannot do, or does wrongly."""


# What MPS has, by torch's own account


@functools.cache
def _declared() -> dict[str, dict[str, Any]]:
    """torch's table of its operators, which every build carries."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(table.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {f"aten::{entry['func'].partition('(')[0]}": entry for entry in entries}


@functools.cache
def kernels(name: str) -> frozenset[str]:
    """The dispatch keys an operator has kernels for; a structured one has those of its `out` form."""
    entry = _declared().get(name)
    if entry is None:
        return frozenset()
    keys = {key.strip() for several in entry.get("dispatch", {}) for key in several.split(",")}
    if "structured_delegate" in entry:
        keys |= kernels(f"aten::{entry['structured_delegate']}")
    return frozenset(keys or {"CompositeImplicitAutograd"})


def mps_has(name: str) -> bool:
    """Whether an operator runs on MPS: by a kernel of its own, or by one that torch writes for every device."""
    return "MPS" in kernels(name) or bool(COMPOSITES & kernels(name))


# The device


class MpsTensor(Tensor):
    """A tensor that says it is on `mps`; `held` has its values, shape and strides on the CPU.

    The methods are those that torch's Python bindings do not leave to the dispatcher: they look for a device guard
    first, which builds without MPS lack.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> MpsTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=MPS
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func.name()} on an emulated tensor outside `emulated()`")

    def __repr__(self, **_: Any) -> str:
        return f"MpsTensor({self.held!r})"

    def __getitem__(self, index: Any) -> Any:
        with _emulation().inside():
            return MpsTensor(self.held[_held(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        with _emulation().inside():
            self.held[_held(index)] = _held(value)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.ops.aten.contiguous.default(self, memory_format=memory_format)

    def __bool__(self) -> bool:
        return bool(torch.ops.aten._local_scalar_dense.default(self))


def _mapped(change: Callable[[Any], Any], values: Any) -> Any:
    """An operator's arguments or results with every leaf changed; torch's pytrees would take most of the time."""
    if isinstance(values, tuple | list):
        return type(values)([_mapped(change, value) for value in values])
    if isinstance(values, dict):
        return {key: _mapped(change, value) for key, value in values.items()}
    return change(values)


def _leaves(*values: Any) -> list[Any]:
    leaves: list[Any] = []
    _mapped(leaves.append, values)
    return leaves


def _held(values: Any) -> Any:
    return _mapped(lambda leaf: leaf.held if isinstance(leaf, MpsTensor) else leaf, values)


class Emulation(TorchDispatchMode):
    """Runs operators on `MpsTensor`s.

    `operators` are the names seen, `scores` is the most elements of a score matrix that attention
    wrote out at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.scores = 0
        self._inside = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Plain tensors in the body are what `MpsTensor`s hold."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        leaves = _leaves(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        target = next((torch.device(leaf) for leaf in leaves if _is_device(leaf)), None)
        if name in FORBIDDEN_OPERATORS or kwargs.get("pin_memory"):
            raise Forbidden(f"{name}: MPS has no pinned memory, no streams and no int8 product")
        _refuse_types(name, tensors)
        here = self._inside or any(isinstance(tensor, MpsTensor) for tensor in tensors)
        if not here and (target is None or target.type != "mps"):
            result = func(*args, **kwargs)
            _refuse_types(name, _leaves(result))
            return result
        if here and name in _BRANCHES:
            with self:
                return _BRANCHES[name](*args, **kwargs)
        if here and "CompositeImplicitAutograd" in kernels(name) and "MPS" not in kernels(name):
            with self:
                return func._op_dk(_COMPOSITE_KEY, *args, **kwargs)
        if not mps_has(name):
            raise Forbidden(f"{name}: MPS has no such operator")
        if here and not self._inside and name not in CROSSING:
            _refuse_mixture(name, tensors)
        _refuse_layouts(name, args, target)
        self.operators.add(name)
        if name == "aten::_scaled_dot_product_attention_math_for_mps":
            heads, rows = args[0].shape[-3:-1]
            self.scores = max(self.scores, heads * rows * args[1].shape[-2])
        result = self._compute(func, args, kwargs, target)
        _refuse_types(name, _leaves(result))
        return result

    def _compute(self, func: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """The operator over what its tensors hold.

        An input that comes back is itself; what is new is on the device, unless the host is the target.
        """
        args_held, kwargs_held = _mapped(lambda leaf: CPU if _is_device(leaf) else leaf, _held((args, kwargs)))
        result = _KERNELS.get(func.name(), func)(*args_held, **kwargs_held)
        if self._inside:
            return result
        inputs = {id(_held(leaf)): leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Tensor)}

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            same = inputs.get(id(leaf))
            if target is not None and same is not None and same.device.type != target.type:
                leaf, same = leaf.clone(), None  # the devices share no memory
            if same is not None:
                return same
            return leaf if target == CPU else MpsTensor(leaf)

        return _mapped(place, result)


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf == "mps")


def _emulation() -> Emulation:
    mode = _get_current_dispatch_mode()
    assert isinstance(mode, Emulation), "an emulated tensor was used outside `emulated()`"
    return mode


def _refuse_types(name: str, values: list[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.dtype in FORBIDDEN_TYPES:
            raise Forbidden(f"{name}: {value.dtype} does not exist on MPS")


def _refuse_mixture(name: str, tensors: list[Tensor]) -> None:
    strays = [tensor for tensor in tensors if not isinstance(tensor, MpsTensor) and tensor.dim()]
    if strays:
        raise Forbidden(f"{name}: a tensor {list(strays[0].shape)} is still on the CPU")


def _refuse_layouts(name: str, args: Any, target: torch.device | None) -> None:
    """Calls that MPS takes and answers wrongly, each by the PyTorch issue that shows it."""
    operator = name.partition(".")[0]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if operator in _PRODUCTS:
        left, right = tensors[-2:] if operator in ("aten::addmm", "aten::baddbmm") else tensors[:2]
        if not left.is_floating_point():
            raise Forbidden(f"{name}: MPS multiplies no matrices of {left.dtype}")
        if operator == "aten::linear" and left.dim() > 2:
            raise Forbidden(f"{name}: wrong with inputs of over two dimensions (180776, 192934)")
        if operator == "aten::linear" and not right.is_contiguous():
            raise Forbidden(f"{name}: crashes on transposed weights (197796)")
        if operator == "aten::_mps_convolution" and not _is_dense(left):
            raise Forbidden(f"{name}: wrong on slices of channels (180984)")
        if operator != "aten::_mps_convolution" and left.shape[-1] > _LONGEST_SUM:
            raise Forbidden(f"{name}: wrong on M1 and M2 over {_LONGEST_SUM} terms (195163): {left.shape[-1]}")
    if operator in ("aten::sort", "aten::argsort") and not tensors[0].is_contiguous():
        raise Forbidden(f"{name}: ignores strides (175187)")
    if target == CPU and not tensors[0].is_contiguous():
        raise Forbidden(f"{name}: copies views with gaps wrongly to the host (189961)")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


# Where torch branches on MPS, and kernels that only its macOS build has


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """`scaled_dot_product_attention` on MPS: a boolean mask becomes one to add, then one kernel does the rest."""
    assert not dropout_p
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = added.masked_fill_(torch.logical_not(attn_mask), float("-inf"))
    kernel = torch.ops.aten._scaled_dot_product_attention_math_for_mps.default
    return kernel(query, key, value, attn_mask, **options)[0]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """`convolution` on MPS, which has a kernel of its own."""
    assert not transposed
    return torch.ops.aten._mps_convolution.default(x, weight, bias, padding, stride, dilation, groups)


def _mps_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any, groups: int
) -> Tensor:
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def int4_product(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """`_weight_int4pack_mm` as torch's Metal shader computes it: [M, K] -> [M, N].

    The shape of `packed` is for show; the shader reads bytes [N, K/2], the even column in the low nibble. Scale and
    zero are [K/g, N, 2] in x's dtype, and `zero - 8 * scale` is rounded to that dtype; all sums are float32.
    Source: aten/src/ATen/native/mps, operations/Quantized.mm and kernels/Quantized.metal.
    """
    k = x.shape[1]
    n = packed.shape[0] * 8
    for tensor in (x, packed):
        assert tensor.is_contiguous()
    assert packed.dtype == torch.int32
    assert packed.numel() * 8 == n * k
    assert scales_and_zeros.shape == (k // group_size, n, 2)
    assert scales_and_zeros.is_contiguous()
    assert scales_and_zeros.dtype == x.dtype
    assert group_size in (32, 64, 128, 256)
    read = packed.view(torch.uint8).view(n, k // 2)
    scale = scales_and_zeros[..., 0].T
    offset = (scales_and_zeros[..., 1].T - scale * 8).float()  # [N, K/g]
    scale = scale.float()
    levels = torch.empty(n, k)
    levels[:, 0::2] = (read & 15).float()
    levels[:, 1::2] = (read >> 4).float()
    weight = scale[:, :, None] * levels.view(n, -1, group_size) + offset[:, :, None]
    return (x.float() @ weight.reshape(n, k).T).to(x.dtype)


_BRANCHES: dict[str, Callable[..., Any]] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::convolution": _convolution,
}
_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::_scaled_dot_product_attention_math_for_mps": torch.ops.aten._scaled_dot_product_attention_math.default,
    "aten::_mps_convolution": _mps_convolution,
    "aten::_weight_int4pack_mm": int4_product,
}


class _NoStream:
    """Stands for what makes streams and events, and is still a type to compare with."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise Forbidden("MPS has no streams")


@contextmanager
def emulated() -> Iterator[Emulation]:
    """A machine with an `mps` device, for the body."""

    def nothing() -> None:
        pass

    device_module = {
        "synchronize": nothing,
        "empty_cache": nothing,
        "recommended_max_memory": lambda: MEMORY_BYTES,
        "driver_allocated_memory": lambda: 0,
        "current_allocated_memory": lambda: 0,
    }
    lifting = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", return_value=True))
        stack.enter_context(mock.patch.multiple(torch.mps, **device_module))
        stack.enter_context(mock.patch.multiple(torch.cuda, Stream=_NoStream, Event=_NoStream, stream=_NoStream))
        # Makes `torch.tensor(..., device="mps")` build on the CPU and copy through the dispatcher.
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifting)
        torch._C._set_only_lift_cpu_tensors(True)
        # The one tensor that outlives a call: none from before, and none of ours after.
        hadamard.cache_clear()
        stack.callback(hadamard.cache_clear)
        yield stack.enter_context(Emulation())
