"""The precision of states and networks: states are in float32 or float64, networks in any dtype.

A network is called in its own dtype, that of most of its parameters, and its answer is converted
to the state's dtype.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._checks import autocast_enabled, readable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GAIN = 256.0  # of cotangents, which float16 holds from 6e-5 to 65504
_DEPTH = 3  # of functions that call functions
WIDER = "use float32 or bfloat16"  # the advice for a result that overflows

Weight: TypeAlias = tuple[nn.Module, str, Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """Return a tensor in half precision in float32, and any other unchanged."""
    return x if x.dtype.itemsize >= 4 or not x.is_floating_point() else x.float()


def state_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """Return float64 if a dtype is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_float_dtype(dtype: torch.dtype | None) -> None:
    """Raise unless samples can have a dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _DTYPES):
        names = ", ".join(str(one) for one in _DTYPES)
        raise TypeError(f"dtype: expected one of {names}, or None, got {dtype!r}")


def narrowed(x: Tensor, dtype: torch.dtype, name: str, advice: str) -> Tensor:
    """Return a tensor in another dtype, or raise if it overflows float16 (read on the CPU only)."""
    if x.dtype == dtype:
        return x
    out = x.to(dtype)
    if dtype == torch.float16 and readable(out):
        ends = [end.item() for end in out.detach().aminmax()]
        if math.inf in map(abs, ends):
            largest = float(x.detach().abs().nan_to_num(0.0, posinf=0.0).max())
            if largest > torch.finfo(dtype).max:
                raise ValueError(
                    f"{name}: expected numbers that float16 holds, of at most 65504, "
                    f"got {largest:g}; {advice}"
                )
    return out


def arithmetic_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype | None:
    """Return the dtype of a network's matrix products: its own, or that of autocast."""
    return torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) else dtype


def backward_factor(gain: Tensor | float, dtype: torch.dtype | None) -> Tensor | float | None:
    """Return a power of two that scales the cotangents of a network so that float16 holds them.

    A prediction may be so many times as large as the network's output that its gradients overflow
    on their way back through the network. Multiply the vectors of a vector-Jacobian product by the
    factor, and divide the product by it.

    Args:
        gain: the largest derivative of the prediction with respect to the output, (B,) or a float.
        dtype: the `arithmetic_dtype` of the network. The factor is None unless it is float16.
    """
    if dtype != torch.float16:
        return None
    gain = torch.as_tensor(gain).clamp(1.0, 2.0**100)
    factor = torch.exp2(-torch.ceil(torch.log2(gain / _GAIN)).clamp_min(0.0))
    return factor if factor.ndim else float(factor)


def network_dtype(network: object) -> torch.dtype | None:
    """Return the dtype of most of a network's parameters, by the count of their elements.

    Those of a module's process do not count; buffers do where a module has no parameters. For a
    function the parameters of modules that it refers to are counted. None if there are none.
    """
    weight = _weight(network)
    return None if weight is None else weight[2].dtype


class NetworkDtype:
    """The `network_dtype` of a network that is called often, read off one of its weights.

    The parameters are counted once. Conversions, sharding and exchanged weights are noticed.

    Args:
        network: the network.
    """

    __slots__ = ("_network", "_place")

    def __init__(self, network: object) -> None:
        self._find(network)

    def __call__(self, network: object) -> torch.dtype | None:
        """Return the dtype of the network, which may have been replaced by another."""
        if self._network is not network:
            self._find(network)
        if self._place is None:
            return None
        module, name = self._place
        weight: Tensor | None = module._parameters.get(name)
        if weight is None:
            weight = module._buffers.get(name)
            if weight is None:  # it was renamed, as by a parametrization
                self._find(network)
                return network_dtype(network)
        return weight.dtype

    def _find(self, network: object) -> None:
        found = _weight(network)
        self._network, self._place = network, None if found is None else found[:2]


def _weight(network: object) -> Weight | None:
    """Return a floating-point weight of the dtype that most elements have."""
    if not isinstance(network, nn.Module):
        seen: set[int] = set()
        return _majority(_parameters(m) for m in _modules(network, seen, _DEPTH))
    return _majority([_parameters(network)]) or _majority([_buffers(network)])


def _majority(groups: Any) -> Weight | None:
    sizes: Counter[torch.dtype] = Counter()
    first: dict[torch.dtype, Weight] = {}
    for weights in groups:
        for weight in weights:
            tensor = weight[2]
            # 8-bit floats are storage: networks that have them compute in another dtype.
            if tensor.dtype in _DTYPES:
                sizes[tensor.dtype] += 1 if is_lazy(tensor) else tensor.numel()
                first.setdefault(tensor.dtype, weight)
    return first[sizes.most_common(1)[0][0]] if sizes else None


def _parameters(module: nn.Module) -> Iterator[Weight]:
    for part in _parts(module):
        yield from ((part, name, p) for name, p in part._parameters.items() if p is not None)


def _buffers(module: nn.Module) -> Iterator[Weight]:
    for part in _parts(module):
        yield from ((part, name, b) for name, b in part._buffers.items() if b is not None)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Return a module and its submodules, without those of a process."""
    yield module
    for name, child in module.named_children():
        if name != "sde":
            yield from _parts(child)


def _modules(network: object, seen: set[int], depth: int) -> Iterator[nn.Module]:
    """Return the modules that a function, a method or another callable refers to."""
    if id(network) in seen or depth < 0:
        return
    seen.add(id(network))
    if isinstance(network, nn.Module):
        yield network
        return
    found: list[object] = []
    if isinstance(network, functools.partial):
        found = [network.func, *network.args, *network.keywords.values()]
    elif isinstance(network, MethodType):
        found = [network.__self__, network.__func__]
    elif isinstance(network, FunctionType):
        code, names = network.__code__, network.__globals__
        found = [names[name] for name in code.co_names if name in names]
        for cell in network.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                found.append(cell.cell_contents)
    elif depth >= _DEPTH - 1 and not isinstance(network, (type, ModuleType)):
        found = list(getattr(network, "__dict__", {}).values())
    for value in found:
        yield from _modules(value, seen, depth - 1)
