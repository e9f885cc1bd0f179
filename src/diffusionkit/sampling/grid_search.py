"""The search for a grid of times for a model, a predictor and a number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._batch_conditions import for_batch
from .._checks import check_count, check_part, check_positive
from .._keywords import explains
from .._log_snr import with_signal
from .._loops import Progress, check_progress, evaluation_mode, with_progress
from .._model_checks import check_model
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, Predictor, ScoreModel
from ..random import Generators
from ._start import initial_state
from .fitted_grid import FittedGrid, fitted
from .grids import MOST_STEPS, AYSGrid, Grid, KarrasGrid, LogSNRGrid, UniformGrid, resolve_grid
from .pc import PCSampler
from .probability_flow import ProbabilityFlow
from .tangent_grid import TangentGrid

_TO_ZERO = (1.0, 6.0, 40.0)  # the last noise before 0, as multiples of that at t_stop
_OPEN = (1.0, 6.0)  # the last noise of grids that end there
_SCALES = (0.35, 0.7, 1.4)  # of tangent grids
_NUDGE = 0.03  # of a logarithm of a step's length, for derivatives
_LONGEST = 0.7  # the largest change of such a logarithm in an iteration
_ENOUGH = 1e-3  # the relative gain below which the search ends
_TRIES = 8  # of shorter and shorter changes, for one that is a gain
_PATIENCE = 3  # iterations without a gain on held-out draws


def fixed_grids(sde: ForwardSDE, steps: int) -> Iterator[Tensor]:
    """Yield times (steps + 1,) of grids that need no fit: several spacings and last levels."""
    here = home(sde)
    ends = torch.tensor([sde.T, sde.t_stop], dtype=schedule_dtype(here), device=here)
    first, stop = torch.exp(-0.5 * with_signal(sde.log_snr(ends))).tolist()
    for to_zero, multiples in ((True, _TO_ZERO), (False, _OPEN)):
        for multiple in multiples:
            if not multiple * stop < 0.1 * first:
                continue
            level = ends.new_tensor([-2 * math.log(multiple * stop)])
            t_end = float(sde.time_at_log_snr(level)) if multiple > 1 else sde.t_stop
            spacings = UniformGrid, LogSNRGrid, AYSGrid
            grids: list[Grid] = [kind(t_end=t_end, to_zero=to_zero) for kind in spacings]
            grids += [KarrasGrid(rho, t_end=t_end, to_zero=to_zero) for rho in (3.0, 5.0, 7.0)]
            for grid in grids:
                yield grid(sde, steps)
    for scale in _SCALES:
        yield TangentGrid(scale)(sde, steps)


@dataclass(frozen=True)
class _Levels:
    """Grids with the first time and kind of end of a given one, by logarithms of their steps.

    The steps are those of l = log(alpha / sigma), of which any positive lengths are a grid.
    """

    sde: ForwardSDE
    start: Tensor

    @property
    def to_zero(self) -> bool:
        return not float(self.start[-1]) > 0.0

    def _levels(self) -> Tensor:
        """Return l at the times of the start that have noise."""
        here = home(self.sde)
        times = self.start[:-1] if self.to_zero else self.start
        log_snr = self.sde.log_snr(times.to(here, schedule_dtype(here)))
        return 0.5 * with_signal(log_snr).detach().cpu().double()

    def parameters(self) -> Tensor:
        """Return the logarithms (n,) of the steps of the start."""
        return torch.log(self._levels().diff())

    def times(self, parameters: Tensor) -> Tensor | None:
        """Return the times of logarithms (n,) of steps, or None if they leave the process."""
        levels = self._levels()[0] + torch.exp(parameters).cumsum(0)
        here = home(self.sde)
        inner = self.sde.time_at_log_snr(2 * levels.to(here, schedule_dtype(here)))
        times = torch.cat([self.start[:1], inner.detach().cpu().double()])
        if not bool((times.diff() < 0).all()) or float(times[-1]) < self.sde.t_min:
            return None
        return torch.cat([times, times.new_zeros(1)]) if self.to_zero else times


@dataclass(frozen=True)
class _Draws:
    """Draws from the prior, and the samples to which the probability flow takes them."""

    sampler: PCSampler
    start: Tensor
    target: Tensor
    cond: Sequence[Mapping[str, Any]]
    batch_size: int

    def residual(self, times: Tensor, seed: int = 0) -> Tensor:
        """Return the differences of samples from the target (n, d)."""
        self.sampler.grid = times  # a new sampler would compute a solver's coefficients twice
        noise = torch.Generator().manual_seed(seed)
        batches = zip(torch.split(self.start, self.batch_size), self.cond, strict=True)
        found = [self.sampler(x, generator=noise, **cond) for x, cond in batches]
        return (torch.cat(found) - self.target).flatten(1)

    def error(self, times: Tensor) -> float:
        """Return the mean square error per number."""
        return _mean_square(self.residual(times))


def _mean_square(residual: Tensor) -> float:
    return float(residual.double().square().mean())


def _search(levels: _Levels, draws: _Draws) -> Iterator[Tensor]:
    """Yield grids of decreasing error on draws, by the method of Levenberg and Marquardt."""
    p, damping = levels.parameters(), 1e-2
    if not bool(torch.isfinite(p).all()):
        return  # levels fainter than any that can be told from none
    residual = draws.residual(levels.start)
    error = _mean_square(residual)
    while True:
        rows = []
        for k in range(len(p)):
            for nudge in (_NUDGE, -_NUDGE):
                moved = p.clone()
                moved[k] += nudge
                near = levels.times(moved)
                if near is not None:
                    rows.append((draws.residual(near) - residual).flatten() / nudge)
                    break
            else:
                rows.append(torch.zeros_like(residual).flatten())
        slopes = torch.stack(rows)
        normal = (slopes @ slopes.T).cpu().double()
        right = (slopes @ residual.flatten()).cpu().double()
        scale = normal.diagonal() + 1e-12 * normal.diagonal().max() + 1e-300
        for _ in range(_TRIES):
            change = -torch.linalg.solve(normal + damping * torch.diag(scale), right)
            moved = p + change.clamp(-_LONGEST, _LONGEST)
            tried = levels.times(moved)
            if tried is not None:
                found = draws.residual(tried)
                if (now := _mean_square(found)) < error:
                    break
            damping *= 4
        else:
            return
        gain = 1 - now / error
        p, times, residual, error = moved, tried, found, now
        damping = max(damping / 5, 1e-5)
        yield times
        if gain < _ENOUGH:
            return


@explains
def fit_grid(
    model: ScoreModel,
    predictor: Predictor,
    start: Sequence[int] | Tensor,
    /,
    *,
    steps: int,
    grids: Sequence[Grid | Tensor] = (),
    tolerance: float = 1e-5,
    iterations: int = 20,
    batch_size: int | None = None,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = False,
    **cond: Any,
) -> FittedGrid:
    r"""Fit a grid of times to a model, a deterministic predictor and a number of steps.

    Of the grids t_0 = T > t_1 > ... > t_N it seeks the one whose samples are nearest to the ends of
    the probability flow from the same states at T,

    .. math::
        \min_{t_1, ..., t_N} \sum_i \| x_N^{(i)}(t_1, ..., t_N) - x^{(i)} \|^2.

    Half of the draws are fitted, the other half decides. The best two of about thirty fixed grids
    on the latter, one that ends at 0 and one that ends where noise is left, are improved by the
    method of Levenberg and Marquardt in the logarithms of the steps in log-SNR, with derivatives by
    differences. It stops early where the held-out error rises. The result is the grid with the
    least held-out error, which may be the best fixed one: never a worse one on these draws.

    It takes about 30 to 200 runs of the sampler with half of the draws, and one solution of the
    flow with all of them. With the same draws the result is the same.

    Args:
        model: the score model, guidance included.
        predictor: a predictor that adds no noise.
        start: the shape (B, *D) of draws from the prior, or states at T. 256 or more are safe;
            with few, the fit follows their particular paths.
        steps: the number of steps N.
        grids: further grids to begin with: callables or times (N + 1,).
        tolerance: the tolerance of the probability flow.
        iterations: the largest number of iterations from each of the two grids.
        batch_size: the number of draws that are sampled at once, all by default.
        generator: the source of randomness: one generator, one for each draw, or None.
        device: the device of drawn states, by default the model's.
        dtype: the dtype of drawn states.
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.
        cond: passed to the model, with one condition for each draw or one for all. Fit guidance
            with the conditions and the scale that samples will have.

    Returns:
        The grid, with its error and that of the best fixed grid on the held-out draws.

    Raises:
        ValueError: if there are fewer than four draws, steps < 2, or the predictor adds noise.
        TypeError: if a part has the wrong type.

    Source: grids optimized for a solver against a reference solution: Watson et al., Learning Fast
    Samplers for Diffusion Models by Differentiating Through Sample Quality, 2022, arXiv 2202.05830;
    Chen et al., On the Trajectory Regularity of ODE-based Diffusion Sampling, 2024, arXiv
    2405.11326. The search is that of Marquardt, 1963.

    >>> import torch
    >>> from diffusionkit import (
    ...     EDMSDE, DEIS, GaussianMixtureModel, PCSampler, fit_grid
    ... )
    >>> model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4])
    >>> seed = torch.Generator().manual_seed(0)
    >>> grid = fit_grid(model, DEIS(), (64, 1), steps=6, generator=seed)
    >>> grid.error < 0.5 * grid.fixed_error
    True
    >>> sampler = PCSampler(model, DEIS(), grid=grid, steps=6, denoise=False)
    >>> sampler((4, 1), generator=seed).shape
    torch.Size([4, 1])
    """
    check_model(model)
    check_part(predictor, Predictor, "predictor")
    check_count(steps, "steps", least=2, most=MOST_STEPS)
    check_count(iterations, "iterations", least=0)
    check_positive(tolerance, "tolerance")
    check_progress(progress)
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    sde = model.sde
    whole = torch.tensor([sde.T], dtype=torch.float64)
    x, _ = initial_state(model, start, whole, generator, device, dtype)
    if len(x) < 4:
        raise ValueError(f"start: expected 4 draws or more, half of them held out, got {len(x)}")
    flow = ProbabilityFlow(model, rtol=tolerance, atol=tolerance)
    # Shuffled: the halves of conditions in order would differ.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    starts = _starts(sde, steps, grids)
    sampler = PCSampler(model, predictor, grid=starts[0], denoise=False)
    with torch.no_grad(), evaluation_mode(model):
        fit, held_out = (
            _draws(flow, sampler, x, rows.to(x.device), batch_size, cond)
            for rows in order.tensor_split(2)
        )
        return _fitted(fit, held_out, starts, iterations, progress)


def _draws(
    flow: ProbabilityFlow,
    sampler: PCSampler,
    x: Tensor,
    rows: Tensor,
    batch_size: int | None,
    cond: Mapping[str, Any],
) -> _Draws:
    """Return the chosen rows of draws (B, *D) with the ends of the flow from them."""
    n, size = len(x), batch_size or len(rows)
    conditions: list[dict[str, Any]] = [
        {
            name: value[part.to(value.device)]
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
            else value
            for name, value in for_batch(cond, n).items()
        }
        for part in torch.split(rows, size)
    ]
    start = x[rows]
    batches = zip(torch.split(start, size), conditions, strict=True)
    target = torch.cat([flow.sample(part, **own) for part, own in batches])
    return _Draws(sampler, start, target, conditions, size)


def _starts(sde: ForwardSDE, steps: int, grids: Sequence[Grid | Tensor]) -> list[Tensor]:
    """Return the fixed grids and the given ones, as times (steps + 1,)."""
    if not isinstance(grids, (list, tuple)):
        raise TypeError(f"grids: expected a sequence of grids, got {type(grids).__name__}")
    starts = list(fixed_grids(sde, steps))
    for grid in grids:
        if grid is None:
            raise TypeError("grids: expected grids, got None")
        times = resolve_grid(grid, sde, steps)
        if len(times) != steps + 1 or not math.isclose(float(times[0]), sde.T, rel_tol=1e-6):
            raise ValueError(
                f"grids: expected grids of {steps} steps from T = {sde.T:g}, "
                f"got one of {len(times) - 1} from {float(times[0]):g}"
            )
        starts.append(times)
    return [times.cpu().double() for times in starts]


def _fitted(
    fit: _Draws, held_out: _Draws, starts: Sequence[Tensor], iterations: int, progress: Progress
) -> FittedGrid:
    """Search from the best grid of each kind, and return the best on held-out draws."""
    _check_deterministic(held_out, starts[0])
    sampler = held_out.sampler
    sde, errors = sampler.model.sde, [held_out.error(times) for times in starts]
    best = min(zip(errors, starts, strict=True), key=lambda pair: pair[0])
    fixed_error = best[0]
    chosen = []
    for to_zero in (True, False):
        kind = [k for k, times in enumerate(starts) if (float(times[-1]) == 0.0) == to_zero]
        chosen += [min(kind, key=errors.__getitem__)] if kind else []
    plan = [(k, i) for k in chosen for i in range(iterations)]
    searches = {k: _search(_Levels(sde, starts[k]), fit) for k in chosen}
    least = {k: (errors[k], 0) for k in chosen}  # and the iterations since
    for k, _ in with_progress(plan, progress):
        error, waited = least[k]
        times = next(searches[k], None) if waited < _PATIENCE else None
        if times is None:
            continue
        now = held_out.error(times)
        least[k] = (now, 0) if now < error else (error, waited + 1)
        best = min(best, (now, times), key=lambda pair: pair[0])
    _, times = best
    root = math.sqrt(held_out.error(times)), math.sqrt(fixed_error)
    return fitted(sde, sampler.predictor, times, sampler.nfe, *root)


def _check_deterministic(draws: _Draws, times: Tensor) -> None:
    """Raise if samples depend on more than the state at T."""
    one, two = (draws.residual(times, seed) for seed in (0, 1))
    if _mean_square(one - two) > 1e-6 * _mean_square(draws.target):
        raise ValueError(
            "predictor: expected a deterministic one, which follows the probability flow, got "
            f"{type(draws.sampler.predictor).__name__}, which adds noise"
        )
