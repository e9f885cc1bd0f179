"""Many samples in files: shared out over processes, resumable, each sample with its own seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from .._checks import check_count, check_number, check_state
from .._files import atomic_write
from .._loops import Progress, with_progress
from ..random import seeded

SETTINGS = "settings.json"


def to_uint8(x: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Return samples as images of 8 bits, rounded to the nearest level.

    .. math::
        \operatorname{round}\left(255\, \frac{x - low}{high - low}\right)

    so that images which went to the range by 255 levels come back as they were, which truncating
    would not do; so do those put at the centres of 256 intervals of it. What is beyond the
    range becomes its end.

    Args:
        x: samples (B, \*D).
        data_range: the values of black and white.

    Raises:
        ValueError: if x is not finite, or the range is not low < high.
        TypeError: if x is not a floating-point tensor, or the range not a pair of numbers.

    >>> to_uint8(torch.tensor([[-1.0, 0.0, 0.999, 1.2]]))
    tensor([[  0, 128, 255, 255]], dtype=torch.uint8)
    """
    check_state(x)
    low, high = _range(data_range)
    bad = int((~torch.isfinite(x)).reshape(len(x), -1).any(1).sum())
    if bad:
        raise ValueError(f"x: expected finite samples, got {bad} of {len(x)} with NaN or infinity")
    exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return ((exact - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def sample_to_shards(
    draw: Callable[[int, list[torch.Generator]], Tensor],
    count: int,
    directory: str | Path,
    *,
    batch_size: int = 64,
    seed: int = 0,
    data_range: tuple[float, float] = (-1.0, 1.0),
    settings: Mapping[str, Any] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: Progress = True,
) -> None:
    r"""Draw samples and keep them as images of 8 bits, one .npy file (n, \*D) for each batch.

    Sample i has a generator of its own, which depends on the seed and on i alone: neither the size
    of the batches nor the number of processes changes it. Files are written whole or not at all,
    and those that are there are left alone, so a run that was stopped goes on, with another
    number of processes if need be, or to a larger count.

    Args:
        draw: returns n samples (n, \*D) from n generators, one for each of them, for example
            ``lambda n, generators: sampler((n, 3, 32, 32), generator=generators)``.
        count: the number of samples in all. A run into a folder of fewer adds the others; into a
            folder of more it is refused, as `load_shards` would return those too.
        directory: the folder of the files; it is made.
        batch_size: how many samples are drawn at once.
        seed: of everything that is random.
        data_range: the values of black and white in the samples; see `to_uint8`.
        settings: what else distinguishes the run, such as the checkpoint's name and the number
            of steps: anything that JSON can express. It is kept, and a run into the same folder
            with other settings is refused.
        rank: which of the processes this is, by default the one of torch.distributed.
        world_size: how many there are.
        progress: whether to show progress, or a wrapper of the batches that does.

    Raises:
        ValueError: if the folder has samples of other settings or more of them, numbers do not
            fit, or samples are not n, or not finite.
        TypeError: if a number is not one, the range is not a pair, settings are no mapping that
            JSON can express, or draw returns no floating-point tensor.

    >>> import tempfile
    >>> draw = lambda n, generators: torch.stack([torch.rand(3, 8, 8, generator=g)
    ...                                           for g in generators])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sample_to_shards(draw, 10, folder, batch_size=4, progress=False)
    ...     [len(images) for images in load_shards(folder)]
    [4, 4, 2]
    """
    if not callable(draw):
        raise TypeError(f"draw: expected a callable, got {type(draw).__name__}")
    check_count(count, "count")
    check_count(batch_size, "batch_size")
    check_count(seed, "seed", least=0)
    shared = dist.is_available() and dist.is_initialized()
    if world_size is None:
        world_size = dist.get_world_size() if shared else 1
    if rank is None:
        rank = dist.get_rank() if shared else 0
    check_count(world_size, "world_size")
    check_count(rank, "rank", least=0)
    if rank >= world_size:
        raise ValueError(f"rank: expected a number below {world_size}, got {rank}")
    about = {
        "count": count,
        "batch_size": batch_size,
        "seed": seed,
        "data_range": _range(data_range),
        "settings": _plain({} if settings is None else settings),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_settings(folder, about)
    missing = [
        (file, start, stop)
        for number, (file, start, stop) in enumerate(_shards(folder, count, batch_size))
        if number % world_size == rank and not _kept(file, stop - start)
    ]
    for file, start, stop in with_progress(missing, progress if rank == 0 else False):
        n = stop - start
        with torch.no_grad():
            samples = draw(n, [seeded(seed, i) for i in range(start, stop)])
        if not isinstance(samples, Tensor) or samples.ndim < 1 or len(samples) != n:
            got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise ValueError(f"draw: expected {n} samples ({n}, *D), got {got}")
        atomic_write(file, partial(_save, to_uint8(samples, data_range)))
    if shared:
        dist.barrier()  # whoever returns may load them all


def load_shards(directory: str | Path) -> Iterator[Tensor]:
    r"""Return the images (n, \*D), uint8, of every file of `sample_to_shards`, in order.

    ``torch.cat(list(load_shards(directory)))`` is all of them at once.

    Raises:
        FileNotFoundError: if the folder has no samples.
        ValueError: if some are missing, as those of a run that has not ended.
    """
    folder = Path(directory)
    about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    shards = list(_shards(folder, about["count"], about["batch_size"]))
    missing = [file.name for file, start, stop in shards if not _kept(file, stop - start)]
    if missing:
        raise ValueError(
            f"{folder}: expected {len(shards)} files, {len(missing)} are missing or cut short, "
            f"first {missing[0]}; sample_to_shards with the same settings goes on"
        )
    return (torch.from_numpy(np.load(file)) for file, _, _ in shards)


def _range(data_range: tuple[float, float]) -> list[float]:
    if not isinstance(data_range, (tuple, list)):
        raise TypeError(f"data_range: expected a pair (low, high), got {type(data_range).__name__}")
    if len(data_range) != 2:
        raise ValueError(f"data_range: expected a pair (low, high), got {data_range}")
    low, high = data_range
    check_number(low, "data_range")
    check_number(high, "data_range")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range: expected finite low < high, got {data_range}")
    return [float(low), float(high)]


def _plain(settings: Mapping[str, Any]) -> Any:
    """Return settings as they come back from JSON."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings: expected a mapping, got {type(settings).__name__}")
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings: expected what JSON can express, got {settings}") from error


def _keep_settings(folder: Path, about: dict[str, Any]) -> None:
    """Write the settings, or check that the files that are there have the same, and are no more."""
    file = folder / SETTINGS
    kept = about | {"count": 0}
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
    if about | {"count": kept.get("count")} != kept:
        raise ValueError(f"{folder}: expected samples of the settings {about}, got those of {kept}")
    if kept["count"] > about["count"]:
        raise ValueError(
            f"count: expected at least {kept['count']}, as many as {folder} is for, "
            f"got {about['count']}"
        )
    if kept["count"] < about["count"]:
        atomic_write(file, partial(_write, json.dumps(about, indent=1)))


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode("utf-8"))


def _save(images: Tensor, file: BinaryIO) -> None:
    np.save(file, images.cpu().numpy())


def _shards(folder: Path, count: int, batch_size: int) -> Iterator[tuple[Path, int, int]]:
    for start in range(0, count, batch_size):
        yield folder / f"{start:08d}.npy", start, min(start + batch_size, count)


def _kept(file: Path, n: int) -> bool:
    """Whether there is a file of n images, and the whole of it."""
    try:
        images = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return len(images) == n and images.dtype == np.uint8
