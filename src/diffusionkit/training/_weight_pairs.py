"""A model's weights and their averages in pairs, matched by name once and not in every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed._sharded import is_sharded, placed
from ..distributed._wrappers import bare_tensors


class WeightPairs:
    """The tensors of a model, each with its average.

    Args:
        model: the model.
        averaged: the model of the averages.
        tensors: the tensors of the model by name, which are those of the averages.

    Attributes:
        tensors: the tensors of the model by name.
    """

    def __init__(
        self, model: nn.Module, averaged: nn.Module, tensors: Mapping[str, Tensor]
    ) -> None:
        self.tensors = tensors
        self._groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        self._copies: list[tuple[Tensor, Tensor]] = []
        averages = bare_tensors(averaged)
        unique = {id(x): name for name, x in averages.items()}  # tied ones have several names
        for name in unique.values():
            self._add(averages[name], placed(tensors[name], averages[name]))
        # The shards of sharded weights are looked up in every step.
        self._lasting = not any(map(is_sharded, (*averages.values(), *tensors.values())))
        self._held = [
            held
            for root in (model, averaged)
            for module in root.modules()
            for held in (module._parameters, module._buffers, module._modules)
        ]
        self._every = [*averages.values(), *tensors.values()]
        self._before = self._now()

    def _add(self, average: Tensor, current: Tensor) -> None:
        if not (isinstance(average, nn.Parameter) and is_inexact(average)):
            self._copies.append((average, current))
            return
        if average.dtype != (dtype := kept_dtype(average)):  # after ema.model.half()
            average.data = average.data.to(dtype)
        if is_sharded(average):
            average, current = (cast(Any, x).to_local() for x in (average, current))
        olds, news = self._groups[average.device, average.dtype]
        olds.append(average)
        news.append(current)

    def _now(self) -> tuple[list[int], list[Any]]:
        """Return what changes if a model gets other tensors, or its tensors other data."""
        identities = [id(part) for held in self._held for part in held.values()]
        return identities, [(x.dtype, x.device, x.shape) for x in self._every]

    def hold(self) -> bool:
        """Return whether the pairs are still those of the two models."""
        return self._lasting and self._now() == self._before

    def move(self, share: float) -> None:
        """Give the model's parameters a share in the averages, and copy its other tensors."""
        for average, current in self._copies:
            average.copy_(current)
        for (device, dtype), (olds, news) in self._groups.items():
            alike = [
                x if x.dtype is dtype and x.device == device else x.to(device, dtype) for x in news
            ]
            torch._foreach_lerp_(olds, alike, share)


def is_inexact(x: Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers."""
    return x.is_floating_point() or x.is_complex()


def kept_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a tensor is averaged in."""
    if x.is_complex():
        return torch.promote_types(x.dtype, torch.complex64)
    return torch.float32 if x.is_floating_point() and x.dtype.itemsize < 4 else x.dtype
