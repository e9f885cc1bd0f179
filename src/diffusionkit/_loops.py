"""Helpers for loops that evaluate a model: evaluation mode and progress bars."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .distributed._dealing import ranks_are_independent
from .distributed.gathered import check_whole

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


# Threads may share modules: a change to one is undone when the last block that made it ends.
# Blocks keep their modules alive, and so their ids.
_lock = threading.RLock()
_evaluated: Counter[int] = Counter()  # modules
_unwrapped: Counter[tuple[int, str]] = Counter()  # parents and names
_wrappers: dict[tuple[int, str], nn.Module] = {}


def _is_last(blocks: Counter[Any], key: Any) -> bool:
    """Count a block that ends, and return whether it was the last of its key."""
    blocks[key] -= 1
    return not blocks[key] and blocks.pop(key) == 0


@contextlib.contextmanager
def without_gradients() -> Iterator[None]:
    """Disable gradients, and and clear the cache of autocast at the end; see `evaluation_mode`."""
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode, without DistributedDataParallel, and restore it afterwards.

    A call of that wrapper may wait for the other processes, which may evaluate the model another
    number of times: adaptive solvers do, and processes with shares of unequal size.

    The cache of autocast is cleared at the end: a loss in the same block of autocast would reuse
    weights that older torch cast without gradients, and these weights would not be trained.

    Yields:
        The model, without the wrapper if it is in one itself.

    Raises:
        ValueError: if processes evaluate the model independently, and each has a part of it.
    """
    if ranks_are_independent():
        check_whole(model)
    with bare_networks(model):
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        with _lock:
            training = [m for m in inner.modules() if m.training or id(m) in _evaluated]
            _evaluated.update(map(id, training))
        try:
            with _lock:
                inner.eval()
            yield inner
        finally:
            torch.clear_autocast_cache()
            with _lock:
                for module in training:
                    if _is_last(_evaluated, id(module)):
                        module.training = True


@contextlib.contextmanager
def bare_networks(model: nn.Module) -> Iterator[None]:
    """Replace DistributedDataParallel wrappers by their networks, and restore them afterwards."""
    held = []
    with _lock:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, DistributedDataParallel):
                    _wrappers[id(parent), name] = child
                    setattr(parent, name, child.module)
                if (id(parent), name) in _wrappers:
                    _unwrapped[id(parent), name] += 1
                    held.append((parent, name))
    try:
        yield
    finally:
        with _lock:
            for parent, name in held:
                if _is_last(_unwrapped, (id(parent), name)):
                    setattr(parent, name, _wrappers.pop((id(parent), name)))


def check_progress(progress: object) -> None:
    """Raise unless `progress` is True, False or a callable that wraps an iterable."""
    if not (isinstance(progress, bool) or callable(progress)):
        got = type(progress).__name__
        raise TypeError(f"progress: expected True, False or a callable, got {got}")


def with_progress(items: Sequence[Item], progress: Progress) -> Iterable[Item]:
    """Return items wrapped in a progress bar: tqdm if installed, or the user's wrapper."""
    check_progress(progress)
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
