"""Helpers for loops that evaluate a model: evaluation mode, unwrapped networks, progress bars."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def bare_networks(model: nn.Module) -> Iterator[None]:
    """Replace DistributedDataParallel wrappers by their networks, and restore them afterwards.

    Adaptive solvers call the network a data-dependent number of times, so wrapped networks on
    different ranks would wait for each other forever.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, DistributedDataParallel)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.module)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def with_progress(items: Sequence[Item], progress: Progress) -> Iterable[Item]:
    """Return items wrapped in a progress bar: tqdm if installed, or the user's wrapper."""
    if not progress:
        return items
    if callable(progress):
        return progress(items)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        logger.warning("progress=True requires tqdm: pip install tqdm")
        return items
    bar: Iterable[Item] = tqdm(items, leave=False)
    return bar


def repeated(value: Any, n: int, times: int) -> Any:
    """Return a tensor (n, ...) that belongs to a batch of n repeated `times` along the batch.

    Other values apply to the whole batch and are returned unchanged.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
        return value
    return value.repeat(times, *(1,) * (value.ndim - 1))
