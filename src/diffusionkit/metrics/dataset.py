"""Features of data sets, whose batches several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .._checks import as_item, check_callable, check_count, check_known, check_target_device
from .._loops import Progress, check_progress, evaluation_mode, with_progress
from ..distributed._group import rank_and_world_size
from ..distributed._shared_work import share
from .extract import Features, features_of_batch, joined, module_device


class ImageSet(Sized, Protocol):
    """A map-style data set of images, or of tuples whose first item is the image."""

    def __getitem__(self, index: int, /) -> Any: ...


def stream_features(
    data: Tensor | ImageSet,
    extractor: Callable[[Tensor], Features],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    progress: Progress = True,
) -> Iterator[Features]:
    r"""Return an iterator over the features of each batch of a data set, in its order.

    With torch.distributed the processes share the work, and each gets the features of all batches,
    in the same order as a single process. So results computed from them agree in all digits for any
    number of processes. All processes must exhaust the iterator. If an image cannot be read, all
    raise.

    Args:
        data: images (N, \*D), or a map-style data set of images (\*D) or tuples that begin with
            one.
        extractor: maps images (B, \*D) to features (B, d), or to a tuple of them. A module is put
            in evaluation mode meanwhile.
        batch_size: the number of images evaluated at once.
        device: the device of the batches, by default that of a module's first parameter or
            buffer.
        workers: the number of processes that read images, for each process of the group.
        progress: whether to show progress, or a function that wraps the rounds and shows it.

    Raises:
        ValueError: if there are no images, or the features do not have one row per image.
        TypeError: if data has no length, or a part has the wrong type.
        RuntimeError: if another process could not read its images.

    >>> import torch
    >>> from diffusionkit.metrics import stream_features
    >>> images = torch.randn(10, 3, 8, 8)
    >>> means = lambda x: x.mean((2, 3))
    >>> batches = stream_features(images, means, batch_size=4, progress=False)
    >>> [len(features) for features in batches]
    [4, 4, 2]
    """
    check_callable(extractor, "extractor")
    check_target_device(device)
    check_count(batch_size, "batch_size")
    check_count(workers, "workers", least=0, most=4096)
    check_progress(progress)
    if isinstance(data, Tensor):
        check_known(data, "data")
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise TypeError(f"data: expected a data set with a length, got {type(data).__name__}")
    if (isinstance(data, Tensor) and data.ndim == 0) or len(data) == 0:
        raise ValueError("data: expected at least one image, got none")
    return _stream(data, extractor, batch_size, device, workers, progress)


def gather_features(
    data: Tensor | ImageSet,
    extractor: Callable[[Tensor], Features],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    progress: Progress = True,
) -> Features:
    r"""Return the features of a whole data set, in its order, the same in every process.

    For arguments and errors see `stream_features`.

    >>> import torch
    >>> from diffusionkit.metrics import gather_features
    >>> images, means = torch.randn(10, 3, 8, 8), lambda x: x.mean((2, 3))
    >>> gather_features(images, means, progress=False).shape
    torch.Size([10, 3])
    """
    return joined(
        stream_features(
            data,
            extractor,
            batch_size=batch_size,
            device=device,
            workers=workers,
            progress=progress,
        )
    )


def _stream(
    data: Tensor | ImageSet,
    extractor: Callable[[Tensor], Features],
    batch_size: int,
    device: torch.device | str | None,
    workers: int,
    progress: Progress,
) -> Iterator[Features]:
    rank, world = rank_and_world_size()
    n = len(data)
    batches = [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    rounds = [batches[first : first + world] for first in range(0, len(batches), world)]
    # `share` has a process without a batch repeat the last one of the round.
    images = _batches(data, [some[min(rank, len(some) - 1)] for some in rounds], workers)
    module = extractor if isinstance(extractor, nn.Module) else None
    device = module_device(module) if device is None else device

    def evaluated(_: range) -> Features:
        with torch.no_grad(), evaluation_mode(module) if module else nullcontext():
            return features_of_batch(extractor, next(images), device)

    for some in with_progress(rounds, progress if rank == 0 else False):
        yield from share(evaluated, some)


def _batches(data: Tensor | ImageSet, batches: Sequence[range], workers: int) -> Iterator[Tensor]:
    """Return the images of each batch."""
    if isinstance(data, Tensor):
        return (data[rows.start : rows.stop] for rows in batches)
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        cast(Any, data),
        batch_sampler=cast(Any, batches),
        num_workers=workers,
        collate_fn=_stack,
    )
    return iter(loader)


def _stack(items: Sequence[Any]) -> Tensor:
    images = [as_item(item, "data") for item in items]
    if images[0].ndim == 0:
        raise ValueError("data: expected images, got numbers")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(f"data: expected images of one shape, got {shapes[0]} and {shapes[1]}")
    return torch.stack(images)
