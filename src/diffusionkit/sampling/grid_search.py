"""The search for a grid of times for a model, a predictor and a number of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._batch_conditions import for_batch
from .._checks import check_count, check_finite, check_part, check_positive
from .._keywords import explains
from .._log_snr import with_signal
from .._loops import Progress, check_progress, evaluation_mode, with_progress
from .._model_checks import check_model
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, Predictor, ScoreModel
from ..random import Generators
from ._grid_levels import Draws, Levels, mean_square, search
from ._start import initial_state
from .fitted_grid import FittedGrid, fitted
from .grids import MOST_STEPS, AYSGrid, Grid, KarrasGrid, LogSNRGrid, UniformGrid, resolve_grid
from .pc import PCSampler
from .probability_flow import ProbabilityFlow
from .tangent_grid import TangentGrid

_TO_ZERO = (1.0, 6.0, 40.0)  # the last noise before 0, as multiples of that at t_stop
_OPEN = (1.0, 6.0)  # the last noise of grids that end there
_SCALES = (0.35, 0.7, 1.4)  # of tangent grids
_PATIENCE = 3  # iterations without a gain on held-out draws
_SHARE = 4  # the search begins with a quarter of the draws,
_LEAST = 16, 2000  # with as many draws and numbers as this
_SHORTLIST = 4  # of fixed grids of each kind of end, which are compared on all draws

Candidate: TypeAlias = tuple[float, Tensor]


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
    # Equal steps in u = sigma / (alpha + sigma), the times of flow matching.
    u = torch.linspace(first / (1 + first), 0, steps + 1, dtype=ends.dtype, device=here)[1:-1]
    inner = sde.time_at_log_snr(2 * torch.log((1 - u) / u))
    yield torch.cat([ends[:1], inner, torch.zeros_like(ends[:1])])


@explains
def fit_grid(
    model: ScoreModel,
    predictor: Predictor | Sequence[Predictor],
    start: Sequence[int] | Tensor,
    /,
    *,
    steps: int,
    grids: Sequence[Grid | Tensor] = (),
    target: Tensor | None = None,
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

    Among the grids t_0 = T > t_1 > ... > t_N it searches for the one whose samples are nearest to
    the end points of the probability flow from the same states at T,

    .. math::
        \min_{t_1, ..., t_N} \sum_i \| x_N^{(i)}(t_1, ..., t_N) - x^{(i)} \|^2.

    Half of the draws are used to fit, the other half is held out. Two of about thirty fixed grids,
    those with the lowest held-out error among the grids that end at 0 and among those that end
    where noise is left, are improved by the Levenberg-Marquardt method in the logarithms of the
    steps in log-SNR, with derivatives by differences and secants: first on a quarter of the draws,
    then the better of the two on all. The search stops early if the held-out error rises. The
    result is the grid with the lowest held-out error, which may be the best fixed one: it is never
    worse on these draws.

    It takes about as many evaluations as 20 to 100 runs of the sampler with all draws, and one
    solution of the flow, some 100 evaluations for each. With the same draws the result is the same.

    Args:
        model: the score model, with its guidance.
        predictor: a predictor that adds no noise, or a sequence of them: the grid of the one with
            the least held-out error is returned, and `FittedGrid.predictor` is its `repr`.
        start: the shape (B, *D) of draws from the prior, or states at T. 256 or more are safe;
            with few, the fit follows their particular paths.
        steps: the number of steps N.
        grids: further grids to begin with: callables or times (N + 1,).
        target: the end points (B, *D) of the flow from given states, if they are known already, so
            that a second fit to the same draws does not solve the flow again. By default the flow
            is solved.
        tolerance: the tolerance of the probability flow.
        iterations: the largest number of iterations from each of the two grids, and of the last
            search on all draws.
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
        ValueError: if there are fewer than four draws, steps < 2, a predictor adds noise, or the
            target is given without its states or has another shape.
        TypeError: if a part has the wrong type.

    Source: grids optimized for a solver against a reference solution: Watson et al., Learning Fast
    Samplers for Diffusion Models by Differentiating Through Sample Quality, 2022, arXiv 2202.05830;
    Chen et al., On the Trajectory Regularity of ODE-based Diffusion Sampling, 2024, arXiv
    2405.11326. The search is that of Marquardt, 1963, with Broyden's update.

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
    parts: list[Any] = [*predictor] if isinstance(predictor, (list, tuple)) else [predictor]
    for part in parts:
        check_part(part, Predictor, "predictor")
    if not parts:
        raise ValueError("predictor: expected a predictor or several, got none")
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
    if target is not None:
        check_part(target, Tensor, "target")
        if not isinstance(start, Tensor) or target.shape != x.shape:
            states = tuple(x.shape) if isinstance(start, Tensor) else "no states"
            raise ValueError(
                "target: expected the end points of the flow from states `start`, got a tensor of "
                f"shape {tuple(target.shape)} and {states}"
            )
        check_finite(target, "target")
    flow = ProbabilityFlow(model, rtol=tolerance, atol=tolerance)
    # Shuffled: the halves of conditions in order would differ.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    given, fixed = _given(sde, steps, grids), [t.cpu().double() for t in fixed_grids(sde, steps)]
    samplers = [PCSampler(model, part, grid=fixed[0], denoise=False) for part in parts]
    with torch.no_grad(), evaluation_mode(model):
        halves = [
            _draws(flow, samplers[0], x, target, rows.to(x.device), batch_size, cond)
            for rows in order.tensor_split(2)
        ]
        searches = [
            _Search(*(tuple(replace(one, sampler=sampler) for one in half) for half in halves))
            for sampler in samplers
        ]
        starts = [search.starts(given, fixed) for search in searches]
        fixed_error = min(error for found in starts for error, _ in found)
        plan = list(zip(searches, starts, strict=True))
        total = sum(search.most(found, iterations) for search, found in plan)
        best = [min(found, key=_error) for found in starts]
        candidates = (
            (k, one) for k, (search, found) in enumerate(plan)
            for one in search.candidates(found, iterations)
        )  # fmt: skip
        for _ in with_progress(range(total), progress):
            k, one = next(candidates, (0, None))
            if one is not None:
                best[k] = min(best[k], one, key=_error)
        chosen = min(range(len(best)), key=lambda k: best[k][0])
        (_, times), search = best[chosen], searches[chosen]
        root = math.sqrt(search.held_out[1].error(times)), math.sqrt(fixed_error)
        sampler = samplers[chosen]
        return fitted(sde, parts[chosen], times, sampler.nfe, *root)


def _draws(
    flow: ProbabilityFlow,
    sampler: PCSampler,
    x: Tensor,
    target: Tensor | None,
    rows: Tensor,
    batch_size: int | None,
    cond: Mapping[str, Any],
) -> tuple[Draws, Draws]:
    """Return some and all of the chosen rows of draws (B, *D), with the ends of the flow."""
    n, size = len(x), batch_size or len(rows)
    by_sample = for_batch(cond, n)

    def batches(rows: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        return [
            (x[part], {
                name: value[part.to(value.device)]
                if isinstance(value, Tensor) and value.ndim > 0 and len(value) == n
                else value
                for name, value in by_sample.items()
            })
            for part in torch.split(rows, size)
        ]  # fmt: skip

    if target is None:
        ends = torch.cat([flow.sample(part, **own) for part, own in batches(rows)])
    else:
        ends = target[rows].to(x)
    least = max(_LEAST[0], _LEAST[1] // x[0].numel(), len(rows) // _SHARE)
    some, whole = (
        Draws(sampler, batches(rows[:count]), ends[:count])
        for count in (min(least, len(rows)), len(rows))
    )
    return some, whole


def _given(sde: ForwardSDE, steps: int, grids: Sequence[Grid | Tensor]) -> list[Tensor]:
    """Return given grids as times (steps + 1,)."""
    if not isinstance(grids, (list, tuple)):
        raise TypeError(f"grids: expected a sequence of grids, got {type(grids).__name__}")
    given = []
    for grid in grids:
        if grid is None:
            raise TypeError("grids: expected grids, got None")
        times = resolve_grid(grid, sde, steps)
        if len(times) != steps + 1 or not math.isclose(float(times[0]), sde.T, rel_tol=1e-6):
            raise ValueError(
                f"grids: expected grids of {steps} steps from T = {sde.T:g}, "
                f"got one of {len(times) - 1} from {float(times[0]):g}"
            )
        given.append(times.cpu().double())
    return given


def _error(candidate: Candidate) -> float:
    return candidate[0]


@dataclass(frozen=True)
class _Search:
    """The search for one predictor's grid, on some of the draws and then on all.

    Candidates are grids with their mean square errors on all held-out draws.
    """

    fit: Sequence[Draws]
    held_out: Sequence[Draws]

    @property
    def staged(self) -> bool:
        """Whether there are enough draws to begin with some of them."""
        some, whole = self.fit
        return len(some.target) < len(whole.target)

    def starts(self, given: Sequence[Tensor], fixed: Sequence[Tensor]) -> list[Candidate]:
        """Return given grids and the best fixed ones; raise if the predictor adds noise."""
        some, whole = self.held_out
        _check_deterministic(some, fixed[0])
        if self.staged:
            ranked = sorted(fixed, key=some.error)
            last = [[t for t in ranked if (float(t[-1]) > 0.0) == open] for open in (True, False)]
            fixed = [times for kind in last for times in kind[:_SHORTLIST]]
        return [(whole.error(times), times) for times in (*given, *fixed)]

    def _first(self, starts: Sequence[Candidate]) -> list[Tensor]:
        """Return the best of the grids that end at 0, and of those that do not."""
        kinds = [[c for c in starts if (float(c[1][-1]) > 0.0) == open] for open in (False, True)]
        return [min(kind, key=_error)[1] for kind in kinds if kind]

    def most(self, starts: Sequence[Candidate], iterations: int) -> int:
        """Return the largest number of iterations."""
        return (len(self._first(starts)) + self.staged) * iterations

    def candidates(
        self, starts: Sequence[Candidate], iterations: int
    ) -> Iterator[Candidate | None]:
        """Yield a candidate for each iteration, None where it is not known on all draws."""
        first = self._first(starts)
        if self.staged:
            ends = []
            for times in first:
                best = times
                for _, one in self._improved(0, times, iterations):
                    best = one
                    yield None
                ends.append((self.held_out[1].error(best), best))
            first = [min([*starts, *ends], key=_error)[1]]
        for times in first:
            yield from self._improved(1, times, iterations)

    def _improved(self, stage: int, start: Tensor, iterations: int) -> Iterator[Candidate]:
        """Yield the best grid so far and its error on held-out draws, after each iteration."""
        held_out, fit = self.held_out[stage], self.fit[stage]
        best, waited = (held_out.error(start), start), 0
        levels = Levels(fit.sampler.model.sde, start)
        for times in islice(search(levels, fit), iterations):
            error = held_out.error(times)
            best, waited = ((error, times), 0) if error < best[0] else (best, waited + 1)
            yield best
            if waited == _PATIENCE:
                return


def _check_deterministic(draws: Draws, times: Tensor) -> None:
    """Raise if samples depend on more than the state at T."""
    one, two = (draws.residual(times, seed) for seed in (0, 1))
    if mean_square(one - two) > 1e-6 * mean_square(draws.target):
        raise ValueError(
            "predictor: expected a deterministic one, which follows the probability flow, got "
            f"{type(draws.sampler.predictor).__name__}, which adds noise"
        )
