"""The loss on held-out data, at times and noise that never change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
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
from .._loops import Progress, evaluation_mode, with_progress
from ..distributed._group import rank_and_world_size
from ..distributed._shared_work import share
from ..interfaces import ScoreModel, TimeSampler
from ..random import seeded


class HeldOutData(Sized, Protocol):
    """A map-style data set of items (*D), or of tuples that begin with one."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutLoss:
    """The loss on a data set.

    Args:
        mean: the mean over the data and the draws.
        stderr: its standard error over data sets of the same size, including the noise of the
            draws.
        losses: the losses of each item and draw (N, draws), in float64 on the CPU. Differences
            between models at equal seeds have a much smaller standard error than each mean.
    """

    mean: float
    stderr: float
    losses: Tensor

    @override
    def __str__(self) -> str:
        return f"{self.mean:.5f} +- {self.stderr:.5f}"


def held_out_loss(
    objective: Callable[..., Tensor],
    model: ScoreModel,
    data: Tensor | HeldOutData,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    draws: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress = False,
) -> HeldOutLoss:
    r"""Return the mean loss on held-out data, at fixed times and with fixed noise.

    The times and the noise of each item and draw depend only on the seed and their indices, so
    losses at different steps of a run, or of different models, differ by the models alone. The
    model is in evaluation mode meanwhile, and no gradients are recorded.

    With torch.distributed the batches are shared by the processes, which must all call this. Each
    returns the same result, bit for bit, as a single process; sharded networks are called equally
    often by all.

    Args:
        objective: `ScoreMatching`, or another callable of a model, data, generator= and conditions
            that returns losses (B,). To compare targets or weightings in training, evaluate with
            one objective.
        model: the score model, or the averaged one.
        data: a tensor (N, \*D), or a map-style data set of items (\*D) or tuples that begin with
            one.
        transform: maps a batch of items to the data x0 of the model, for example from levels of
            images to [-1, 1].
        cond: conditions passed to the objective, tensors (N, ...), batched with the data, or
            (1, ...) for one that all items have; with a `mask` the loss of an item is the mean
            over the elements that it keeps, as in training.
        draws: the number of times and noises for each item.
        batch_size: the number of items evaluated at once.
        seed: the random seed.
        device: the device of the batches, by default that of the model.
        progress: whether to show progress, or a function that wraps the rounds and shows it.

    Raises:
        ValueError: if the data set is empty, cond has another length, the losses do not have shape
            (B,), or the objective's times adapt to losses or are stratified.
        TypeError: if a part has the wrong type, or data has no length.
        RuntimeError: if another process failed.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, ScoreMatching, held_out_loss
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [0.5])
    >>> held_out = torch.randn(10, 2)
    >>> held_out_loss(ScoreMatching(), model, held_out, draws=3).losses.shape
    torch.Size([10, 3])
    """
    check_callable(objective, "objective")
    check_part(model, ScoreModel, "model")
    times = getattr(objective, "times", None)
    if isinstance(times, TimeSampler) and type(times).update is not TimeSampler.update:
        raise ValueError(
            f"objective: expected times that do not adapt to losses, got {type(times).__name__}; "
            "evaluate with UniformTimes or DiscreteTimes"
        )
    check_target_device(device)
    if transform is not None:
        check_callable(transform, "transform")
    if isinstance(data, Tensor):
        check_known(data, "data")
        if data.ndim < 2:
            raise ValueError(f"data: expected shape (N, *D), got {tuple(data.shape)}")
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise TypeError(f"data: expected a data set with a length, got {type(data).__name__}")
    n = len(data)
    if n == 0:
        raise ValueError("data: expected at least one item, got none")
    check_count(draws, "draws")
    check_count(batch_size, "batch_size")
    check_count(seed, "seed", least=0, most=2**63 - 1)
    if cond is not None:
        check_mapping(cond, "cond")
    conditions = {} if cond is None else for_batch(cond, n)
    for name, entries in conditions.items():
        check_known(entries, name)
        if entries.ndim == 0 or len(entries) != n:
            raise ValueError(f"{name}: expected {n} entries, one per item, got {len(entries)}")
    if device is None:
        tensors = (*model.parameters(), *model.buffers())
        device = tensors[0].device if tensors else torch.device("cpu")
    place = torch.device(device)

    def losses(batch: tuple[int, range]) -> Tensor:
        draw, rows = batch
        index = list(rows)
        x0 = torch.stack([as_item(data[i], "data") for i in index]).to(place)
        x0 = x0 if transform is None else transform(x0)
        generators = [seeded(seed, draw, i) for i in index]
        extra = {name: value[index].to(place) for name, value in conditions.items()}
        with torch.no_grad():
            found = objective(model, x0, generator=generators, **extra)
        if not isinstance(found, Tensor) or found.shape != (len(index),):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"objective: expected losses ({len(index)},), got {got}")
        return found.double().cpu()

    rank, world = rank_and_world_size()
    batches = [
        (draw, range(start, min(start + batch_size, n)))
        for draw in range(draws)
        for start in range(0, n, batch_size)
    ]
    rounds = [batches[first : first + world] for first in range(0, len(batches), world)]
    table = torch.full((n, draws), math.nan, dtype=torch.float64)
    with evaluation_mode(model):
        for some in with_progress(rounds, progress if rank == 0 else False):
            for (draw, rows), found in zip(some, share(losses, some), strict=True):
                table[rows.start : rows.stop, draw] = found
    items = table.mean(1)
    stderr = float(items.std() / math.sqrt(n)) if n > 1 else math.nan
    return HeldOutLoss(float(items.mean()), stderr, table)
