"""The exponential moving average of a model's weights."""

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

    after the n-th optimiser step, n = 1, 2, ... Buffers are copied. `ema.model` is the averaged
    model, in evaluation mode; `with ema.applied(model):` lends its weights to your own.

    Args:
        model: the model to follow.
        decay: the limit of d, in [0, 1). The papers use .999 for VE and .9999 for VP and sub-VP.
        warmup: whether d starts at 2/11 and grows, so that early weights are soon forgotten.

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
        # AveragedModel copies at its first update; the copy has just been made.
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
        """Move the average towards the model; call after each optimiser step.

        Raises:
            ValueError: if the model has other parameters than the one that was followed.
        """
        self._pairs(model)
        self.updates += 1
        self._averaged.update_parameters(model)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the averaged weights to the model, and its own back at the end.

        Parameters and buffers are exchanged in place, so the optimiser and compiled code keep
        their references; an exception inside the block gives them back too.

        Raises:
            ValueError: if the model has other parameters than the one that was followed.
        """
        pairs = self._pairs(model)
        self._exchange(pairs)
        try:
            yield model
        finally:
            self._exchange(pairs)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        mine, theirs = ([*m.parameters(), *m.buffers()] for m in (self.model, model))
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ValueError("model: expected the parameters of the model that was followed, "
                             f"{len(mine)} tensors; got {len(theirs)}")  # fmt: skip
        return list(zip(mine, theirs, strict=True))

    @staticmethod
    @torch.no_grad()
    def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
        for a, b in pairs:
            held = a.clone()
            a.copy_(b)
            b.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averaged weights and the number of updates from `state_dict()`."""
        updates = int(state["updates"])
        self.model.load_state_dict(state["model"])
        self.updates = updates
