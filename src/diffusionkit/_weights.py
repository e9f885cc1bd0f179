"""Validation of the weights in a file: their names, dtypes and values.

A file may ask for no more than it brings: weights have values of their own, and a network is laid
out without memory, from as many tensors as the file has, before any value is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from ._files import CheckpointError, listed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of weights."""

# Parts that wrappers add to names: anywhere, or at the beginning of all of them.
_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_FIRST = ("module", "model", "ema", "ema_model", "network", "net", "unet", "diffusion_model")

Built = TypeVar("Built")


def weight_problems(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the problem of each entry that is not a weight, by name.

    Weights are dense tensors of finite floating-point numbers, all of one dtype or some of them in
    half precision and the others in float32.

    Args:
        tensors: the entries of a file by name.
    """
    problems = {}
    half = None
    dtypes = [value.dtype for value in tensors.values() if isinstance(value, Tensor)]
    usual = max(sorted(set(dtypes), key=str), key=dtypes.count, default=torch.float32)
    for name, value in tensors.items():
        problem = tensor_problem(value)
        if problem is None and value.dtype != usual:
            narrow, wide = sorted((usual, value.dtype), key=lambda dtype: dtype.itemsize)
            half = half or narrow
            if wide != torch.float32 or narrow != half:
                problem = f"expected {usual} like the other weights, got {value.dtype}"
        if problem is not None:
            problems[name] = problem
    return problems


def tensor_problem(value: Any) -> str | None:
    """Return why a value is not a dense tensor of finite floating-point numbers, or None."""
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.dtype not in FLOATS:
        least = " of at least 16 bits" if value.is_floating_point() else ""
        return f"expected floating-point numbers{least}, got {value.dtype}"
    if value.layout != torch.strided or value.is_meta:
        return f"expected a dense tensor with values, got {value.layout} on {value.device}"
    if not is_finite(value):
        return "expected finite numbers, got NaN or infinity"
    return None


def is_finite(value: Tensor) -> bool:
    """Return whether all numbers are finite."""
    # The sum decides unless it overflows itself.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_tensors(path: str | os.PathLike[str], what: str, tensors: Mapping[str, Any]) -> None:
    """Raise unless all entries of a state dict are weights; see `weight_problems`.

    Args:
        path: the file, for the error.
        what: the part of the file, for the error.
        tensors: the entries by name.

    Raises:
        CheckpointError: if not; it lists them.
    """
    problems = [f"{name:.200}: {text}" for name, text in weight_problems(tensors).items()]
    if problems:
        raise CheckpointError(f"{path}: the {what} does not fit, {listed(problems)}")


def check_own_values(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Raise unless tensors have, on the whole, values of their own.

    Expanded tensors and views of one storage claim more memory than a file brings. Tensors that two
    names share, such as tied weights, are allowed.

    Args:
        path: the file, for the error.
        tensors: the entries of the file by name.

    Raises:
        CheckpointError: if the tensors claim more than twice the memory of their storages.
    """
    found = [value for value in tensors.values() if isinstance(value, Tensor)]
    dense = [value for value in found if value.layout == torch.strided and not value.is_meta]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in dense}
    brought = sum(storage.nbytes() for storage in storages.values())
    claimed = sum(value.numel() * value.itemsize for value in dense)
    if claimed > 2 * brought:
        raise CheckpointError(
            f"{path}: expected tensors with values of their own, got {claimed} bytes of tensors "
            f"from {brought} bytes of values"
        )


def unwrapped(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dict without the prefixes that wrappers add to their names.

    `torch.compile` adds ``_orig_mod.``, `torch.nn.DataParallel` ``module.``; networks within other
    modules have names such as ``model.``.

    Args:
        path: the file, for the error.
        tensors: the entries by name.

    Raises:
        CheckpointError: if some names have such a prefix and others do not, or if two names differ
            in prefixes only.
    """
    bare = {
        name: [part for part in name.split(".") if part not in _INSIDE] or [name]
        for name in tensors
    }
    while True:
        first = {parts[0] for parts in bare.values() if len(parts) > 1 and parts[0] in _FIRST}
        if not first:
            break
        if len(first) > 1 or any(parts[0] not in first for parts in bare.values()):
            known = " and ".join(f"'{part}.'" for part in sorted(first))
            others = "names with and without it" if len(first) == 1 else "names of each kind"
            raise CheckpointError(
                f"{path}: expected the names of one network, with or without {known}, got {others};"
                " save the state dict of the network alone"
            )
        bare = {name: parts[1:] for name, parts in bare.items()}
    found = {".".join(parts): tensors[name] for name, parts in bare.items()}
    if len(found) < len(tensors):
        raise CheckpointError(
            f"{path}: expected names that differ in more than the prefixes of wrappers, got some "
            "twice"
        )
    return found


def laid_out(
    path: str | os.PathLike[str], make: Callable[[], Built], tensors: Mapping[str, Any]
) -> Built:
    """Build a network on the meta device, from no more tensors than a file has.

    Args:
        path: the file, for the error.
        make: builds the network, or returns one that exists.
        tensors: the weights in the file by name.

    Raises:
        CheckpointError: if the network would have many more tensors than the file, or dimensions
            beyond those of any tensor.
    """
    try:
        with torch.device("meta"), _Limit(1000 + 20 * len(tensors)):
            return make()
    except _LimitError as error:
        raise CheckpointError(
            f"{path}: expected the tensors of the described network, got only {len(tensors)}"
        ) from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = f"{error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: expected the description of a network that can be built, got {reason:.200}"
        ) from error


@torch.no_grad()
def fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that fits into a network.

    Args:
        network: the network. If it was only laid out, the tensors become its own.
        state: the tensors by name.
    """
    empty = any(value.is_meta for value in network.state_dict().values())
    network.load_state_dict(
        {name: value.contiguous() for name, value in state.items()}, assign=empty
    )
    for module in network.modules():
        if any(table is not None and table.is_meta for table in module._buffers.values()):
            # Tables that are not in the state; a module that has some makes them when it moves.
            module.to_empty(device=next(iter(state.values())).device, recurse=False)


class _LimitError(Exception):
    """A network takes more operations to build than a file of its tensors allows."""


class _Limit(TorchFunctionMode):
    """A limit to the operations of torch in a block, of which building a tensor takes about ten."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.left = operations

    @override
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        # Raising where torch.no_grad ends would leave gradients disabled for good.
        if func is not torch._C._set_grad_enabled:
            self.left -= 1
            if self.left < 0:
                raise _LimitError
        kwargs = kwargs or {}
        # Normal numbers on the meta device make torch import its compiler, for seconds.
        if func is torch.nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
