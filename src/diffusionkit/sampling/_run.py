"""What every sampler needs around its loop: counting, evaluation mode, a start, progress."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from .._checks import check_finite, check_shape, check_state
from .._draws import Generators, check_generator
from ..interfaces import Prediction, ScoreModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


class CountedModel(ScoreModel):
    """A score model that counts its evaluations."""

    def __init__(self, model: ScoreModel) -> None:
        """Wrap a model."""
        super().__init__()
        self.sde = model.sde
        self.evaluations = 0
        self._predict = model.predict

    def predict(self, x: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Predict, and count one."""
        self.__dict__["evaluations"] += 1
        return self._predict(x, t, **cond)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and each module back to its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def initial_state(
    model: ScoreModel,
    start: Sequence[int] | Tensor,
    generator: Generators,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the state to start from: the one given, or one drawn from the prior.

    By default it is drawn on the device and in the dtype of the model's parameters.
    """
    if isinstance(start, Tensor):
        check_state(start)
        check_finite(start)
        if (device is not None and torch.device(device) != start.device) or (
            dtype is not None and dtype != start.dtype
        ):
            raise ValueError(
                f"x: expected an initial state on {device}, {dtype}, as asked for, "
                f"got {start.device}, {start.dtype}"
            )
        check_generator(generator, start.shape[0])
        return start
    shape = check_shape(start)
    check_generator(generator, shape[0])
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    somewhere = parameter if parameter is not None else next(model.buffers(), None)
    if device is None and somewhere is not None:
        device = somewhere.device
    if dtype is None and parameter is not None:
        dtype = parameter.dtype
    return model.sde.prior_sample(shape, generator=generator, device=device, dtype=dtype)


def with_progress(items: Sequence[T], progress: Progress) -> Iterable[T]:
    """Show progress over items: with tqdm where it is installed, or with the user's wrapper."""
    if not progress:
        return items
    if callable(progress):
        return progress(items)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        logger.warning("progress=True shows a bar where tqdm is installed: pip install tqdm")
        return items
    bar: Iterable[T] = tqdm(items, leave=False)
    return bar
