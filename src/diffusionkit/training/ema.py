"""Exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._checks import check_count, check_flag, check_number, check_part
from ._averaged_weights import AveragedWeights, check_own_weights


class EMA:
    r"""An exponential moving average of parameters, kept in at least float32.

    .. math::
        \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \quad
        d = \min\!\left(\mathrm{decay}, \frac{1 + n}{10 + n}\right)

    after the n-th optimizer step, n = 1, 2, ... Buffers are copied. `ema.model` is the averaged
    model, in evaluation mode; `with ema.applied(model):` uses its weights in your own model.

    Weights belong together by their names in the model without wrappers: the model may be
    compiled, in DistributedDataParallel or sharded by fully_shard, and become so later. The
    average of a sharded model is sharded likewise; `ema.model` then holds its weights under their
    names, but cannot be called.

    Args:
        model: the model whose weights are averaged.
        decay: the limit of d, in [0, 1). The papers use .999 for VE and .9999 for VP and sub-VP.
        warmup: whether d grows from 2/11, so that early weights are soon forgotten; else d = decay.

    Raises:
        ValueError: if decay is outside [0, 1), or a parameter of the model has no shape yet.
        TypeError: if model is not a Module.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix H.1).

    >>> model = nn.Linear(1, 1)
    >>> ema = EMA(model, decay=0.999)
    >>> ema.update(model)
    >>> with ema.applied(model):
    ...     y = model(torch.ones(1, 1))
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = True) -> None:
        """Copy the weights."""
        check_part(model, nn.Module, "model")
        check_number(decay, "decay")
        check_flag(warmup, "warmup")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._average = AveragedWeights(model)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self._average.model

    def _decay(self) -> float:
        """Return d for the current update."""
        return (
            min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        )

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; call after each optimizer step.

        Raises:
            ValueError: if the model's tensors differ in name or shape from the averaged ones, or
                hold an average, inside `applied`.
        """
        check_part(model, nn.Module, "model")
        tensors = self._average.matching(model)
        check_own_weights(tensors)
        self.updates += 1
        self._average.move(tensors, 1.0 - self._decay())

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Use the averaged weights in the model, and restore the model's own on exit.

        Parameters and buffers change in place and keep the model's dtype, so that the optimizer
        and compiled code keep their references. An exception inside the block restores them too.
        The average itself does not change: the block may save it. What the block changes in the
        model is lost, with a warning in the log if parameters were changed.

        A block of the same average may be inside another, or in another thread; the last that
        ends restores the weights.

        Raises:
            ValueError: if the model's tensors differ in name or shape from the averaged ones, or
                hold another average.
        """
        with self._average.lent_to(model):
            yield model

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averaged weights and the number of updates from `state_dict()`.

        Weights of another precision are cast.

        Raises:
            ValueError: if the state has other weights; then nothing has changed.
        """
        self._restore(self._checked(state))

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(state, Mapping) or set(state) != {"model", "updates"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected model and updates, got {got}")
        check_count(state["updates"], "updates", least=0)
        return {"model": self._average.fitting(state["model"]), "updates": state["updates"]}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
