"""Samples in files: distributed over processes, resumable, with one seed per sample."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .._checks import check_callable, check_count, check_number, check_state
from .._loops import Progress, with_progress
from .._writing import atomic_write
from ..distributed._dealing import Dealer, independent_ranks, share_of
from ..distributed._group import rank_and_world_size
from ..random import seeded

SETTINGS = "settings.json"
_KEYS = {"count", "batch_size", "seed", "data_range", "settings"}
_CHECKSUM = b"\ncrc32 %08x\n"  # after the content of a file, which readers of .npy ignore
_LENGTH = len(_CHECKSUM % 0)


def to_uint8(x: Tensor, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Return samples as 8-bit images, rounded to the nearest level.

    .. math::
        \operatorname{round}\left(255\, \frac{x - low}{high - low}\right)

    This recovers images scaled by k / 255, unlike truncation, and those at the centers
    (k + 1/2) / 256. Values outside the range are clamped.

    Args:
        x: samples (B, \*D).
        data_range: the values of black and white.

    Raises:
        ValueError: if x is not finite, or data_range is not low < high.
        TypeError: if x is not a floating-point tensor, or data_range not a pair of numbers.

    >>> import torch
    >>> from diffusionkit.metrics import to_uint8
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
    r"""Draw samples and save them as 8-bit images, one .npy file (n, \*D) per batch.

    Sample i has its own generator, which depends only on the seed and i, not on the batch size or
    the number of processes. Files are written atomically, with a checksum, and existing ones are
    kept unless they are damaged, so an interrupted run can be resumed, also with another number of
    processes or a larger count.

    The processes of a group share the missing batches and return when all are complete. None waits
    for another in a collective: a process that has finished its share continues with batches that
    no other has started, and with the unfinished ones of a process that died. So processes may draw
    different numbers of batches: a network sharded by fully_shard needs
    `with diffusionkit.distributed.gathered_weights(model):` around the call.

    Args:
        draw: returns n samples (n, \*D) from n generators, one per sample, for example
            ``lambda n, generators: sampler((n, 3, 32, 32), generator=generators)``. They are
            generators of the CPU, with which noise is the same on every device; of each,
            ``torch.Generator("cuda").manual_seed(g.initial_seed())`` is faster for large images.
        count: the total number of samples. If the folder has fewer, the others are added; if it
            has more, an error is raised, as `load_shards` would return those too.
        directory: the folder of the files, created if missing.
        batch_size: the number of samples drawn at once.
        seed: the random seed.
        data_range: the values of black and white in the samples; see `to_uint8`.
        settings: other settings that identify the run, such as the checkpoint and the number of
            steps, as JSON values. They are saved, and a later run in the same folder must have
            the same.
        rank: the index of this process, by default its rank in torch.distributed. Processes
            without a group draw fixed shares and do not wait for each other.
        world_size: the number of processes.
        progress: whether to show progress, or a function that wraps the batches and shows it.

    Raises:
        ValueError: if the folder has samples with other settings or more samples, its settings are
            damaged, a number is out of range, samples are not finite or have the wrong shape, or
            several processes draw from a sharded network whose weights are not gathered.
        TypeError: if an argument has the wrong type, settings cannot be written as JSON, or draw
            does not return a floating-point tensor.

    >>> import tempfile
    >>> import torch
    >>> from diffusionkit.metrics import load_shards, sample_to_shards
    >>> def draw(n, generators):
    ...     images = [torch.rand(3, 8, 8, generator=g) for g in generators]
    ...     return torch.stack(images)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sample_to_shards(draw, 10, folder, batch_size=4, progress=False)
    ...     [len(images) for images in load_shards(folder)]
    [4, 4, 2]
    """
    check_callable(draw, "draw")
    check_count(count, "count", most=2**63 - 1)
    check_count(batch_size, "batch_size")
    check_count(seed, "seed", least=0, most=2**63 - 1)
    group = rank_and_world_size()
    place = rank_and_world_size(rank, world_size)
    about = {
        "count": count,
        "batch_size": batch_size,
        "seed": seed,
        "data_range": _range(data_range),
        "settings": _plain({} if settings is None else settings),
    }
    _check_directory(directory)
    folder = Path(directory)

    shards = list(_shards(folder, count, batch_size))

    def missing() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        _keep_settings(folder, about)
        numbers = range(len(shards)) if place == group else share_of(len(shards), *place)
        found = [i for i in numbers if _images(shards[i][0], _length(shards[i])) is None]
        for i in found:  # from now on a file that exists is whole
            shards[i][0].unlink(missing_ok=True)
        return found

    def make(number: int) -> None:
        file, start, stop = shards[number]
        n = _length(shards[number])
        with torch.no_grad():
            samples = draw(n, [seeded(seed, i) for i in range(start, stop)])
        if not isinstance(samples, Tensor) or samples.ndim < 1 or len(samples) != n:
            got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise ValueError(f"draw: expected {n} samples ({n}, *D), got {got}")
        atomic_write(file, partial(_save, to_uint8(samples, data_range)))

    shown = progress if place[0] == 0 else False
    with independent_ranks(group[1] > 1):
        if place != group:
            for number in with_progress(missing(), shown):
                make(number)
            return
        dealer = Dealer(missing)
        for number in dealer.take(with_progress(dealer.own, shown)):
            make(number)
        for number in dealer.left(lambda number: shards[number][0].exists()):
            make(number)


def load_shards(directory: str | Path) -> Iterator[Tensor]:
    r"""Return the images (n, \*D), uint8, of each file of `sample_to_shards`, in order.

    ``torch.cat(list(load_shards(directory)))`` returns them in one tensor.

    Raises:
        FileNotFoundError: if the folder has no samples.
        ValueError: if files are missing, as after an interrupted run, or damaged.
    """
    _check_directory(directory)
    folder = Path(directory)
    about = _settings(folder)
    expected = math.ceil(about["count"] / about["batch_size"])
    names = {file.name for file in folder.glob("*.npy")}
    # A damaged count must not make a long list.
    shards = list(islice(_shards(folder, about["count"], about["batch_size"]), len(names) + 1))
    bad = [file.name for file, start, stop in shards if _images(file, stop - start) is None]
    if bad:
        raise ValueError(
            f"directory: expected {expected} complete files in {folder}, got "
            f"{len(bad) + expected - len(shards)} missing or damaged, first {bad[0]}; "
            "resume with sample_to_shards"
        )
    return (torch.from_numpy(np.load(file)) for file, _, _ in shards)


def _settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder."""
    file = folder / SETTINGS
    expected = f"directory: expected {file} as written by sample_to_shards, got"
    try:
        about = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no samples in {folder}: {SETTINGS} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{expected} a damaged file: {error}") from error
    if not isinstance(about, dict) or set(about) != _KEYS:
        got = sorted(about) if isinstance(about, dict) else type(about).__name__
        raise ValueError(f"{expected} {got}")
    try:
        check_count(about["count"], "count", most=2**63 - 1)
        check_count(about["batch_size"], "batch_size")
        check_count(about["seed"], "seed", least=0, most=2**63 - 1)
        about["data_range"] = _range(about["data_range"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected} {error}") from error
    return about


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
    """Return settings after a round trip through JSON."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings: expected a mapping, got {type(settings).__name__}")
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings: expected JSON values, got {settings}") from error


def _keep_settings(folder: Path, about: dict[str, Any]) -> None:
    """Write the settings, or check that existing files have the same ones and are not more."""
    file = folder / SETTINGS
    kept = _settings(folder) if file.exists() else about | {"count": 0}
    if about | {"count": kept["count"]} != kept:
        raise ValueError(f"settings: expected {kept}, as saved in {folder}, got {about}")
    if kept["count"] > about["count"]:
        raise ValueError(
            f"count: expected at least the {kept['count']} samples of {folder}, "
            f"got {about['count']}"
        )
    if kept["count"] < about["count"]:
        text = json.dumps(about, indent=1).encode()
        atomic_write(file, lambda opened: opened.write(text))


def _save(images: Tensor, file: BinaryIO) -> None:
    content = BytesIO()
    np.save(content, images.cpu().numpy())
    file.write(content.getvalue() + _checksum(content.getvalue()))


def _checksum(content: bytes) -> bytes:
    return _CHECKSUM % zlib.crc32(content)


def _shards(folder: Path, count: int, batch_size: int) -> Iterator[tuple[Path, int, int]]:
    for start in range(0, count, batch_size):
        yield folder / f"{start:08d}.npy", start, min(start + batch_size, count)


def _length(shard: tuple[Path, int, int]) -> int:
    return shard[2] - shard[1]


def _images(file: Path, n: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """Return the n images of a file; None if it is missing, truncated or damaged."""
    try:
        whole = file.read_bytes()
        content, checksum = whole[:-_LENGTH], whole[-_LENGTH:]
        if checksum != _checksum(content):
            return None
        images = np.load(BytesIO(content))
    except (OSError, EOFError, ValueError):
        return None
    return images if len(images) == n and images.dtype == np.uint8 else None


def _check_directory(directory: str | Path) -> None:
    if not isinstance(directory, (str, Path)):
        raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
