"""What every run of a model needs around its loop: evaluation mode, the bare network, progress."""

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
    """Switch dropout and the like off, and each module back to its own mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def bare_networks(model: nn.Module) -> Iterator[None]:
    """Take networks out of DistributedDataParallel, and put them back at the end.

    An adaptive solver calls the network as often as its own data ask for: ranks that differ in
    that would wait for one another for ever.
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
    bar: Iterable[Item] = tqdm(items, leave=False)
    return bar


def repeated(value: Any, n: int, times: int) -> Any:
    """Return what belongs to a batch of n, a tensor (n, ...), for that batch put `times` in a row.

    Anything else belongs to all, and is returned as it is.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
        return value
    return value.repeat(times, *(1,) * (value.ndim - 1))
