"""Noise labels that reach a network in float32, whatever its wrappers cast.

`fully_shard` with a `MixedPrecisionPolicy`, DistributedDataParallel with one, and Lightning Fabric
cast all floating-point inputs of a network to bfloat16, which cannot distinguish 999 t from
999 (t + .003). The label is passed twice: as a tensor, which they may cast, and in an object of
another type, which they pass on unchanged. A hook of the innermost network replaces the first by
the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._keywords import conditions_of, unknown_condition
from ..distributed._wrappers import bare_class, casts_inputs, unwrapped

_NAME = "_exact_noise_label"


class _Exact:
    """A noise label that is not a tensor."""

    __slots__ = ("label",)

    def __init__(self, label: Tensor) -> None:
        self.label = label


def _restore(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the noise label of a call by the exact one, if there is one."""
    if _NAME not in kwargs:
        return None
    kwargs = dict(kwargs)
    x, label, *others = args
    exact: _Exact = kwargs.pop(_NAME)
    return (x, exact.label.to(label.device), *others), kwargs


def _name(network: object) -> str:
    """Return the name of a function, or of the class of another network."""
    if isinstance(network, nn.Module):
        return bare_class(unwrapped(network)).__name__
    name = str(getattr(network, "__name__", type(network).__name__))
    return "lambda" if name == "<lambda>" else name


class LabelGuard:
    """Calls a network that may be inside wrappers, and protects its noise labels from casts.

    Conditions that the network does not take raise an error that lists those that it takes.

    Args:
        network: the network. Another may be called, and this one be wrapped or sharded later.
    """

    __slots__ = ("_casts", "_conditions", "_kind", "_network")

    def __init__(self, network: object) -> None:
        self._prepare(network)

    def __call__(
        self, network: Callable[..., Any], x: Tensor, noise_label: Tensor, cond: dict[str, Any]
    ) -> Any:
        """Return the output of a network for an input and noise labels in float32 or float64."""
        # Its class changes when a network is sharded.
        if network is not self._network or type(network) is not self._kind:
            self._prepare(network)
        if cond and self._conditions is not None:
            unknown = [name for name in cond if name not in self._conditions]
            if unknown:
                message = unknown_condition(_name(network), unknown, self._conditions)
                raise TypeError(message)
        if self._casts:
            cond = {**cond, _NAME: _Exact(noise_label)}
        return network(x, noise_label, **cond)

    def _prepare(self, network: object) -> None:
        self._network, self._kind = network, type(network)
        self._casts = False
        bare = unwrapped(network) if isinstance(network, nn.Module) else network
        self._conditions = conditions_of(bare)
        if isinstance(network, nn.Module) and isinstance(bare, nn.Module) and casts_inputs(network):
            self._casts = True
            if _restore not in bare._forward_pre_hooks.values():
                bare.register_forward_pre_hook(_restore, with_kwargs=True)
