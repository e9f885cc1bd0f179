"""Exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._checks import check_number, check_part

Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]


class EMA:
    r"""An exponential moving average of parameters, on top of torch's AveragedModel.

    .. math::
        \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \quad
        d = \min\!\left(\mathrm{decay}, \frac{1 + n}{10 + n}\right)

    after the n-th optimizer step, n = 1, 2, ... Buffers are copied. `ema.model` is the averaged
    model, in evaluation mode; `with ema.applied(model):` uses its weights in your own model.

    Args:
        model: the model whose weights are averaged.
        decay: the limit of d, in [0, 1). The papers use .999 for VE and .9999 for VP and sub-VP.
        warmup: whether d grows from 2/11, so that early weights are soon forgotten; else d = decay.

    Raises:
        ValueError: if decay is outside [0, 1).
        TypeError: if model is not a Module.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix H.1).

    >>> model = nn.Linear(1, 1)
    >>> ema = EMA(model, decay=0.999)
    >>> ema.update(model)
    >>> with ema.applied(model):
    ...     y = model(torch.ones(1, 1))
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = True) -> None:
        """Copy the model."""
        check_part(model, nn.Module, "model")
        check_number(decay, "decay")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        self._averaged.requires_grad_(False).eval()
        # AveragedModel copies at its first update, but its constructor already has.
        self._averaged.n_averaged += 1

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self._averaged.module

    def _average(self, average: Tensors, current: Tensors, _: Tensor | int) -> None:
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(average, current, 1.0 - decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; call after each optimizer step.

        Raises:
            ValueError: if the model's tensors differ in shape from the averaged ones.
        """
        self._pairs(model)
        self.updates += 1
        self._averaged.update_parameters(model)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Swap the averaged weights into the model, and restore the model's own on exit.

        Parameters and buffers are swapped in place, so that the optimizer and compiled code keep
        their references. An exception inside the block restores them too.

        Raises:
            ValueError: if the model's tensors differ in shape from the averaged ones.
        """
        pairs = self._pairs(model)
        self._swap(pairs)
        try:
            yield model
        finally:
            self._swap(pairs)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        mine, theirs = ([*m.parameters(), *m.buffers()] for m in (self.model, model))
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError(f"model: expected {len(mine)} tensors of the averaged model's shapes, "
                             f"got {len(theirs)} of other shapes")  # fmt: skip
        return list(zip(mine, theirs, strict=True))

    @staticmethod
    @torch.no_grad()
    def _swap(pairs: list[tuple[Tensor, Tensor]]) -> None:
        for a, b in pairs:
            held = a.clone()
            a.copy_(b)
            b.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averaged weights and the number of updates from `state_dict()`."""
        updates = int(state["updates"])
        self.model.load_state_dict(state["model"])
        self.updates = updates
