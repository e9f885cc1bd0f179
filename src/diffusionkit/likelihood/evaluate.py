"""Bits per dimension of a data set: several draws, resumable, distributed over processes."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._batch_conditions import for_batch
from .._checks import (
    as_item,
    check_callable,
    check_count,
    check_known,
    check_mapping,
    check_part,
    check_target_device,
)
from .._files import read_torch
from .._loops import Progress, evaluation_mode, with_progress
from .._masks import total
from .._schedules import exact
from .._writing import check_suffix, save_torch
from ..distributed._dealing import Dealer, independent_ranks, of_first
from ..distributed._group import rank_and_world_size
from ..distributed.gathered import gathered_weights
from ..random import seeded
from .bits import bits_per_dim
from .dequantization import Dequantizer


class Data(Sized, Protocol):
    """A map-style data set of items (*D), or of tuples that begin with one."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class BitsPerDim:
    """Bits per dimension of a data set.

    Args:
        mean: the mean over the data and the draws.
        stderr: its standard error over test sets of the same size, including the noise of the
            draws.
        draw_stderr: the part of stderr due to the draws, None for one draw.
        bits: bits per dimension of each item and draw (N, draws), in float64.
    """

    mean: float
    stderr: float
    draw_stderr: float | None
    bits: Tensor

    @override
    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.stderr:.4f} bits/dim"


def evaluate_bits_per_dim(
    likelihood: Callable[..., Any],
    data: Tensor | Data,
    *,
    dequantizer: Dequantizer | None = None,
    draws: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    path: str | Path | None = None,
    progress: Progress = True,
) -> BitsPerDim:
    r"""Return the bits per dimension of a whole data set.

    .. math::
        \frac{1}{d \ln 2} E\left[-\log p(x) + \log q(x | \mathrm{image})\right]

    with x drawn by the dequantizer. The random numbers of each item and draw depend only on the
    seed and their indices. With torch.distributed the processes share the batches, and a process
    that has finished its share continues with those that no other has started or finished; each
    returns the same result, bit for bit, as a single process. Networks are in evaluation mode, with
    all weights in each process meanwhile, and no gradients are recorded.

    Args:
        likelihood: `NELBO`, `ODELikelihood`, or any callable of x, generator= and conditions whose
            result has `.nats` (B,), the negative log-likelihood or a bound on it.
        data: a tensor (N, \*D) or a map-style data set of tensors (\*D), or of tuples that begin
            with one; integers if there is a dequantizer.
        dequantizer: draws x given an image. None for likelihoods of images, and for continuous
            data, where the result is a density and may be negative.
        draws: the number of evaluations of each item, with new random numbers.
        batch_size: the number of items evaluated at once.
        seed: the random seed.
        cond: conditions passed to the likelihood, tensors (N, ...), batched with the data, or
            (1, ...) for one that all items have. A condition `mask` is that of the likelihood: d
            is then the number of elements that it keeps of an item.
        device: the device of the batches, by default that of the likelihood's model.
        path: a file with partial results, from which an interrupted run resumes. With several
            processes, each adds its rank to the name.
        progress: whether to show progress, or a function that wraps the batches and shows it.

    Raises:
        ValueError: if the data set is empty, cond has another length, the range of the dequantizer
            is not that of the model's data, there are a dequantizer and a mask, or path belongs to
            a run with other settings.
        TypeError: if a part has the wrong type, or data has no length.

    >>> import torch
    >>> from diffusionkit import (
    ...     NELBO, VPSDE, GaussianMixtureModel, UniformDequantizer,
    ...     evaluate_bits_per_dim
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    >>> images = torch.randint(0, 4, (10, 2))
    >>> dequantizer = UniformDequantizer(levels=4)
    >>> result = evaluate_bits_per_dim(
    ...     NELBO(model), images, dequantizer=dequantizer, progress=False
    ... )
    >>> result.bits.shape
    torch.Size([10, 1])
    """
    check_callable(likelihood, "likelihood")
    check_target_device(device)
    check_count(seed, "seed", least=0, most=2**63 - 1)
    if isinstance(data, Tensor):
        check_known(data, "data")
        if data.ndim < 2:
            raise ValueError(f"data: expected shape (N, *D), got {tuple(data.shape)}")
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise TypeError(f"data: expected a data set with a length, got {type(data).__name__}")
    if dequantizer is not None:
        check_part(dequantizer, Dequantizer, "dequantizer")
        stated = getattr(getattr(likelihood, "model", None), "data_range", None)
        if stated is not None and tuple(stated) != (dequantizer.low, dequantizer.high):
            raise ValueError(
                f"dequantizer: expected the range of the model's data, {stated}, "
                f"got {(dequantizer.low, dequantizer.high)}"
            )
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        check_count(value, name)
    if cond is not None:
        check_mapping(cond, "cond")
    n = len(data)
    cond = {} if cond is None else for_batch(cond, n)
    if n == 0:
        raise ValueError("data: expected at least one item, got none")
    for name, entries in cond.items():
        if len(entries) != n:
            raise ValueError(f"{name}: expected {n} entries, one per item, got {len(entries)}")
    if dequantizer is not None and "mask" in cond:
        raise ValueError(
            "mask: expected no mask with a dequantizer, whose density counts every element, got "
            "both; dequantize the data first, and subtract the logarithm of a level's width"
        )
    modules = [m for m in (getattr(likelihood, "model", None), dequantizer) if m is not None]
    device = _device(modules) if device is None else torch.device(device)
    settings = {"n": n, "draws": draws, "batch_size": batch_size, "seed": seed}
    rank, world = rank_and_world_size()
    file = None if path is None else _own_file(path, rank, world)
    nats = of_first(partial(_kept, path, (n, draws), settings))
    batches = [
        (draw, list(range(start, min(start + batch_size, n))))
        for draw in range(draws)
        for start in range(0, n, batch_size)
    ]

    def evaluate(number: int) -> None:
        draw, index = batches[number]
        x = torch.stack([as_item(data[i], "data") for i in index]).to(device)
        generators = [seeded(seed, draw, i) for i in index]
        extra = {name: value[index].to(device) for name, value in cond.items()}
        density: Tensor | float = 0.0
        if dequantizer is not None:
            drawn = dequantizer(x, generator=generators)
            x, density = drawn.x, drawn.log_prob
        found = (likelihood(x, generator=generators, **extra).nats + density).cpu().double()
        if bool(found.isnan().any()):
            raise ValueError(
                f"likelihood: expected numbers, got NaN for items {index[0]} to {index[-1] + 1}"
            )
        nats[index, draw] = found
        if file is not None:
            save_torch(file, {"settings": settings, "nats": nats})
        dealer.publish(number, found)

    dealer = Dealer(lambda: [i for i, (draw, index) in enumerate(batches)
                             if bool(nats[index, draw].isnan().any())])  # fmt: skip
    with _evaluating(modules), independent_ranks(world > 1):
        for number in dealer.take(with_progress(dealer.own, progress if rank == 0 else False)):
            evaluate(number)
        for number in dealer.left(dealer.is_published):
            evaluate(number)
        for number in dealer.pieces:
            draw, index = batches[number]
            if bool(nats[index, draw].isnan().any()):
                nats[index, draw] = dealer.published(number)
    dealer.leave()
    first = as_item(data[0], "data")
    bits = bits_per_dim(nats, first.numel())
    if "mask" in cond:
        mask = cond["mask"].cpu().expand(n, *first.shape)
        bits = bits * (first.numel() / total(exact(mask))).unsqueeze(1)
    items = bits.mean(1)
    return BitsPerDim(
        mean=float(items.mean()),
        stderr=float(items.std() / math.sqrt(n)) if n > 1 else math.nan,
        draw_stderr=float((bits.var(1).mean() / (n * draws)).sqrt()) if draws > 1 else None,
        bits=bits,
    )


def _device(modules: list[nn.Module]) -> torch.device:
    """Return the device of the first tensor of the modules."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.enter_context(gathered_weights(module))
            stack.enter_context(evaluation_mode(module))
        yield


def _own_file(path: str | Path, rank: int, world: int) -> Path:
    """Return the file of this process."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    check_suffix(path)
    file = Path(path)
    if world == 1:
        return file
    longest, most = len(os.fsencode(f"{file.name}.{world - 1}")), 255
    if longest > most:
        raise ValueError(
            f"path: expected a name of at most {most} bytes with the number of a process, "
            f"got {longest}"
        )
    return file.with_name(f"{file.name}.{rank}")


def _kept(path: str | Path | None, shape: tuple[int, int], settings: dict[str, int]) -> Tensor:
    """Return the results saved by any process of an earlier run, and NaN for the others."""
    nats = torch.full(shape, math.nan, dtype=torch.float64)
    if path is None:
        return nats
    path = Path(path)
    of_process = re.compile(re.escape(path.name) + r"(\.\d+)?")
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    for file in (path.parent / name for name in names if of_process.fullmatch(name)):
        kept = read_torch(file)
        if not isinstance(kept, dict) or kept.get("settings") != settings:
            found = kept.get("settings") if isinstance(kept, dict) else type(kept).__name__
            raise ValueError(f"path: expected results with {settings} in {file}, got {found}")
        nats = torch.where(nats.isnan(), kept["nats"], nats)
    return nats
