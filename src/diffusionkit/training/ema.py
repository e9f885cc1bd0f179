"""Exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, Self, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar, override

from .._checks import check_count, check_flag, check_number, check_part, check_positive
from .._keywords import explained
from .._repr import described
from ..distributed._wrappers import bare_state
from ._averaged_weights import AveragedWeights, check_own_weights, check_tensors

Model = TypeVar("Model", bound=nn.Module)
# Covariant and with a default, so that an `EMA` without brackets is that of any model.
Model_co = TypeVar("Model_co", bound=nn.Module, default=nn.Module, covariant=True)

Decay: TypeAlias = Callable[[int], float]


@dataclass(frozen=True)
class HalfLife:
    r"""The decay of an average whose half-life is measured in images, for `EMA(model, decay=...)`.

    .. math::
        d_n = 2^{-B / h_n}, \quad h_n = \min(\mathrm{images}, \mathrm{ramp\_up} \cdot (n - 1) B)

    at the n-th update, n = 1, 2, ..., with the batch size B. After so many images the share of
    what was learned before has halved, whatever the batch size.

    Args:
        images: the half-life in images; EDM uses 500,000.
        batch_size: the number of images between two updates, on all processes together.
        ramp_up: the largest half-life as a fraction of the images seen so far, so that early
            weights are soon forgotten; EDM uses 0.05. None for no such limit.

    Raises:
        ValueError: if images or ramp_up is not positive and finite, or batch_size < 1.
        TypeError: if an argument is not a number.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (released code).

    >>> from diffusionkit import HalfLife
    >>> decay = HalfLife(images=500_000, batch_size=512, ramp_up=0.05)
    >>> decay(1), round(decay(2), 6), round(decay(10**6), 6)
    (0.0, 1e-06, 0.99929)
    """

    images: float
    batch_size: int
    _: KW_ONLY
    ramp_up: float | None = None

    def __post_init__(self) -> None:
        check_positive(self.images, "images")
        check_count(self.batch_size, "batch_size")
        if self.ramp_up is not None:
            check_positive(self.ramp_up, "ramp_up")

    def __call__(self, update: int) -> float:
        """Return d at an update, 1 for the first."""
        check_count(update, "update")
        half_life = float(self.images)
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * (update - 1) * self.batch_size)
        return float(0.5 ** (self.batch_size / half_life)) if half_life else 0.0


class Averages(nn.Module):
    """Averages whose states are loaded as a whole or not at all."""

    def by_prefix(self) -> Mapping[str, EMA]:
        """Return the single averages by the beginning of their names in the state."""
        raise NotImplementedError

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Restore the averaged weights and the number of updates from `state_dict()`.

        Weights are copied, and those of another precision are cast.

        Args:
            state_dict: the state.
            strict: whether the state must have all the names, and no others.
            assign: without effect; averages keep their tensors.

        Raises:
            ValueError: if the state has other weights; then nothing has changed.
        """
        check_part(state_dict, Mapping, "state_dict")
        check_flag(strict, "strict")
        check_flag(assign, "assign")
        own = self.state_dict()
        state = state_dict if strict else {n: state_dict.get(n, x) for n, x in own.items()}
        check_tensors("state_dict", own, state)
        for prefix in self.by_prefix():
            check_count(state[f"{prefix}updates"].item(), f"{prefix}updates", least=0)
        return super().load_state_dict(state_dict, strict, assign)


@explained
class EMA(Averages, Generic[Model_co]):
    r"""An exponential moving average of parameters, kept in at least float32.

    .. math::
        \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \quad
        d = \min\!\left(\mathrm{decay}, \frac{1 + n}{10 + n}\right)

    after the n-th optimizer step, n = 1, 2, ... Buffers are copied. `ema.model` is the averaged
    model, in evaluation mode; `with ema.applied(model):` uses its weights in your own model.

    Weights belong together by their names in the model without wrappers: the model may be
    compiled, in DistributedDataParallel or sharded by fully_shard, and become so later. The
    average of a sharded model is sharded, too; `ema.model` then holds its weights under their
    names, but cannot be called.

    The average may be an attribute of another module, such as a LightningModule: it moves with
    that module and is in its state dict. It is not among its parameters and submodules, so
    optimizers, wrappers, precision settings and training mode of that module do not affect it.

    Args:
        model: the model whose weights are averaged.
        decay: the limit of d, in [0, 1); the papers use .999 for VE and .9999 for VP and sub-VP.
            Or a function that returns d at the n-th update, such as `HalfLife`.
        warmup: whether d grows from 2/11, so that early weights are soon forgotten; else d = decay.
            A function is used as it is.

    Attributes:
        updates: the number of updates so far.

    Raises:
        ValueError: if decay is outside [0, 1), or a parameter of the model has no shape yet.
        TypeError: if model is not a Module, or decay neither a number nor a function.

    Source: Song et al., 2021, arXiv 2011.13456 (appendix H.1).

    >>> import torch
    >>> from torch import nn
    >>> from diffusionkit import EMA
    >>> model = nn.Linear(1, 1)
    >>> ema = EMA(model, decay=0.999)
    >>> ema.update(model)
    >>> with ema.applied(model):
    ...     y = model(torch.ones(1, 1))
    """

    def __init__(
        self, model: Model_co, decay: float | Decay = 0.9999, *, warmup: bool = True
    ) -> None:
        """Copy the weights."""
        super().__init__()
        check_part(model, nn.Module, "model")
        check_flag(warmup, "warmup")
        if not callable(decay):
            check_number(decay, "decay")
            _check_decay(decay)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._average = AveragedWeights(model)  # no Module: it is not trained, wrapped or cast

    @property
    def model(self) -> Model_co:
        """The averaged model."""
        return cast(Model_co, self._average.model)

    @override
    def __repr__(self) -> str:
        return described(self, updates=self.updates)

    @override
    def by_prefix(self) -> Mapping[str, EMA]:
        return {"": self}

    def _decay_at(self, n: int) -> float:
        """Return d at the n-th update."""
        if callable(self.decay):
            d = self.decay(n)
            check_number(d, "decay")
            _check_decay(d)
            return d
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; call after each optimizer step.

        Raises:
            ValueError: if the model's tensors differ in name or shape from the averaged ones, or
                hold an average, inside `applied`.
        """
        check_part(model, nn.Module, "model")
        pairs = self._average.pairs(model)
        check_own_weights(pairs.tensors)
        d = self._decay_at(self.updates + 1)
        self.updates += 1
        pairs.move(1.0 - d)

    @contextlib.contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
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

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._average.apply(fn)
        return self

    @override
    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        weights = bare_state(self.model, keep_vars=keep_vars)
        destination.update({f"{prefix}model.{name}": x for name, x in weights.items()})
        destination[f"{prefix}updates"] = torch.tensor(self.updates)
        versions = getattr(destination, "_metadata", {})
        versions.setdefault(prefix[:-1], {})["model"] = getattr(weights, "_metadata", {})

    @override
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {n.removeprefix(prefix): x for n, x in state_dict.items() if n.startswith(prefix)}
        own = self.state_dict()
        missing_keys += [prefix + name for name in own if name not in found]
        unexpected_keys += [prefix + name for name in found if name not in own]
        state = {name: found.get(name, x) for name, x in own.items()}
        try:
            check_tensors(prefix[:-1], own, state)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        updates = int(state.pop("updates"))
        weights = OrderedDict((name.removeprefix("model."), x) for name, x in state.items())
        weights._metadata = local_metadata.get("model", {})  # type: ignore[attr-defined]
        self.restore(weights, updates)

    def restore(self, weights: Mapping[str, Any], updates: int) -> None:
        """Take weights that fit the averaged model, and the number of updates, unchecked."""
        self._average.load(weights)
        self.updates = updates


def _check_decay(d: float) -> None:
    if not 0.0 <= d < 1.0:
        raise ValueError(f"decay: expected a number in [0, 1), got {d}")
