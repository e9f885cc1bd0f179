"""A grid of times that was fitted to a model, a predictor and a number of steps."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_finite_number, check_part
from .._files import CheckpointError, read_json
from .._schedules import home, schedule_dtype
from .._writing import atomic_write, checked_path
from ..interfaces import ForwardSDE

_FORMAT = "diffusionkit.grid"
_VERSION = 1
_TOLERANCE = 1e-4  # of alpha and sigma, for processes in float32


@dataclass(frozen=True)
class FittedGrid:
    """A grid made by `fit_grid`, for one process and number of steps.

    Pass it as the `grid` of a `PCSampler` with the predictor that it was fitted for, and
    `denoise=False`: the last level is part of the fit.

    Args:
        times: the decreasing times (N + 1,).
        alpha: the process's scales of the data at these times (N + 1,).
        sigma: its standard deviations of the noise (N + 1,).
        process: the process, as text.
        predictor: the predictor, as text.
        nfe: the number of model evaluations of a run.
        error: the root mean square distance of samples from the probability flow, on held-out
            draws, in units of the data.
        fixed_error: the same for the best fixed grid.

    Raises:
        ValueError: unless the times are finite and decreasing, and alpha and sigma as many.
    """

    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    process: str
    predictor: str
    nfe: int
    error: float
    fixed_error: float

    def __post_init__(self) -> None:
        for name in ("times", "alpha", "sigma"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) < 2:
                raise ValueError(f"{name}: expected two numbers or more, got {values!r:.80}")
            for value in values:
                check_finite_number(value, name)
            object.__setattr__(self, name, tuple(float(value) for value in values))
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        if not all(step < 0 for step in steps) or self.times[-1] < 0:
            raise ValueError(f"times: expected decreasing times >= 0, got {self.times!r:.80}")
        if not len(self.times) == len(self.alpha) == len(self.sigma):
            raise ValueError(
                f"alpha, sigma: expected {len(self.times)} numbers each, "
                f"got {len(self.alpha)} and {len(self.sigma)}"
            )
        for name in ("process", "predictor"):
            check_part(getattr(self, name), str, name)
        check_count(self.nfe, "nfe")
        for name in ("error", "fixed_error"):
            check_finite_number(getattr(self, name), name)

    @property
    def steps(self) -> int:
        """The number of steps, N."""
        return len(self.times) - 1

    def __call__(self, sde: ForwardSDE, steps: int) -> Tensor:
        """Return the times (N + 1,), or raise where they were not fitted.

        Raises:
            ValueError: if the process or the number of steps is another.
        """
        check_part(sde, ForwardSDE, "sde")
        check_count(steps, "steps")
        if steps != self.steps:
            raise ValueError(
                f"steps: expected {self.steps}, which the grid was fitted for, got {steps}; "
                f"pass steps={self.steps} or fit another"
            )
        here = home(sde)
        times = torch.tensor(self.times, dtype=torch.float64)
        problem = f"{sde!r:.200}"
        if self.times[0] <= sde.T * (1 + 1e-6):
            inside = times.clamp(max=sde.T).to(here, schedule_dtype(here))
            found = [c.detach().cpu().double() for c in sde.marginal(inside)]
            fitted = [times.new_tensor(c) for c in (self.alpha, self.sigma)]
            close = [
                torch.allclose(a, b, rtol=_TOLERANCE, atol=1e-6)
                for a, b in zip(found, fitted, strict=True)
            ]
            if all(close):
                return times
        raise ValueError(
            f"sde: expected the process that the grid was fitted for, {self.process}, got {problem}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the grid to a JSON file, which is complete before it replaces a previous one.

        A good place is the folder of the model, next to the files of `save_model`.

        Raises:
            ValueError: if the name does not end in .json, or is that of the model's description.
            OSError: if the file cannot be written; the previous one is left as it was.
        """
        file = checked_path(path)
        name = os.path.basename(file)
        if not name.lower().endswith(".json") or name == "model.json":
            raise ValueError(f"path: expected a name such as deis_8.json, got {name}")
        content = {"format": _FORMAT, "version": _VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        atomic_write(file, lambda out: out.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedGrid:
        """Read a grid that `save` has written; equal to the one that was saved.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file is damaged, of another kind or of a newer version.
        """
        file = checked_path(path)
        content = read_json(file, "a grid written by FittedGrid.save")
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            expected = "a grid of FittedGrid.save"
            raise CheckpointError(f"{file}: expected {expected}, got another kind of file")
        if content.pop("version", None) != _VERSION:
            raise CheckpointError(
                f"{file}: expected version {_VERSION}, got another: the file was written by a "
                "newer diffusionkit, which can read it"
            )
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: expected the values of a grid, got {error}") from error


def fitted(
    sde: ForwardSDE, predictor: Any, times: Tensor, nfe: int, error: float, fixed_error: float
) -> FittedGrid:
    """Return the grid of times (N + 1,) fitted for a process."""
    here = home(sde)
    schedule = sde.marginal(times.to(here, schedule_dtype(here)))
    alpha, sigma = (tuple(c.detach().tolist()) for c in schedule)
    texts = repr(sde), repr(predictor)
    return FittedGrid(tuple(times.tolist()), alpha, sigma, *texts, nfe, error, fixed_error)
