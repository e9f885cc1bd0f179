"""The predictor-corrector sampler: the one step loop of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_flag, check_part, check_samples
from .._data_range import check_range
from .._grid_times import noise_at
from .._keywords import explained, explains
from .._loops import Progress, check_progress, evaluation_mode, with_progress
from .._model_checks import check_model
from .._nfe import EvaluationCounter
from .._precision import WIDER, narrowed
from .._repr import Described
from .._schedules import home, schedule_dtype
from ..interfaces import Constraint, Corrector, Prediction, Predictor, ScoreModel, Step
from ..random import Generators, NoisePath, ObservedPath
from ._prepared import PreparedGrid
from ._route import Route, Travel, planned
from ._start import check_path, check_step, initial_state, noised_data
from .grids import Grid
from .time_travel import travel_back


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SamplerState(Described):
    """A sampler's state after a step.

    Args:
        x: the state (B, *D).
        mean: the state without the noise that was added last (B, *D).
        t: its time.
        step: the index of that time in the grid, from 0; between two times of the grid, as in a
            `Restart`, that of the next.
        nfe: the number of model evaluations so far.
        prediction: the model's last prediction, as returned by the parts; None at the start.
    """

    x: Tensor
    mean: Tensor
    t: float
    step: int
    nfe: int
    prediction: Prediction | None = None

    @property
    def x0(self) -> Tensor | None:
        """The data (B, *D) of the last prediction, computed on access."""
        return None if self.prediction is None else self.prediction.x0


@explained
class PCSampler(Described):
    r"""Predictor-corrector sampling from T to the data, on any grid of times.

    At each time the corrector updates the state within the distribution p_t, then the predictor
    takes it to the next time (the order of the released code; `corrector_first=False` is the
    paper's). At the end the noise remaining at the last time is removed by Tweedie's formula, the
    model's x0. The model is in evaluation mode during the run.

    Args:
        model: the score model.
        predictor: the step between times; None uses the corrector alone.
        corrector: the step at a fixed time; None is predictor-only sampling.
        steps: the number of steps, unless the grid is a tensor.
        grid: a callable (sde, steps) -> times, a tensor of decreasing times, or None for the
            predictor's default: `TangentGrid` for multistep and two-stage DPM-Solvers, for others
            times from T to the SDE's t_stop, `KarrasGrid` for an `EDMSDE` and uniform otherwise.
        corrector_first: whether the corrector runs before the predictor.
        denoise: whether the last noise is removed, at the cost of one evaluation. Where the grid
            ends at a time without noise, the last step's mean is returned instead.
        constraint: known information about the data, imposed on the initial state, on the state
            and the mean after every step, and on the result.
        time_travel: which segments are sampled again: a `TimeTravel`, a `Restart` or a sequence
            of restarts; None for none.
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.

    Attributes:
        nfe: the number of model evaluations in the last run; a model that calls others, such as
            guidance, counts as the evaluations it makes.

    Raises:
        ValueError: if there is neither predictor nor corrector, steps < 1, the grid is not
            decreasing within [0, T] or too short for the predictor, time_travel.jump is larger
            than the number of steps, or a restart's interval is outside the grid's noise.
        TypeError: if a part has the wrong type.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (algorithm 1).

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, GaussianMixtureModel, Langevin, PCSampler, ReverseDiffusion
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.1, 0.1])
    >>> corrector = Langevin(snr=0.16)
    >>> sampler = PCSampler(model, ReverseDiffusion(), corrector, steps=50)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    >>> sampler.nfe
    101
    """

    def __init__(
        self,
        model: ScoreModel,
        predictor: Predictor | None,
        corrector: Corrector | None = None,
        *,
        steps: int = 1000,
        grid: Grid | Tensor | None = None,
        corrector_first: bool = True,
        denoise: bool = True,
        constraint: Constraint | None = None,
        time_travel: Travel | None = None,
        progress: Progress = False,
    ) -> None:
        """Store the parts and validate the grid."""
        check_model(model)
        for name, part, kind in (
            ("predictor", predictor, Predictor),
            ("corrector", corrector, Corrector),
            ("constraint", constraint, Constraint),
        ):
            if part is not None:
                check_part(part, kind, name)
        if predictor is None and corrector is None:
            raise ValueError("predictor: expected a predictor, a corrector or both, got neither")
        check_count(steps, "steps")
        check_flag(corrector_first, "corrector_first")
        check_flag(denoise, "denoise")
        check_progress(progress)
        self.model = model
        self.predictor = predictor
        self.corrector = corrector
        self.grid = grid
        self.steps = steps
        self.corrector_first = corrector_first
        self.denoise = denoise
        self.constraint = constraint
        self.time_travel = time_travel
        self.progress = progress
        self.nfe = 0
        self._prepared = PreparedGrid()
        route = planned(time_travel, model.sde, self._times())  # raises if the grid is invalid
        if predictor is not None:
            with torch.no_grad():  # raises if the predictor cannot use it
                here = home(model.sde)
                like = torch.empty(1, dtype=schedule_dtype(here), device=here)
                self._prepared.times(model.sde, predictor, route, like)

    @property
    def times(self) -> Tensor:
        """The decreasing times (N + 1,) of the grid, for the current process."""
        return self._times().clone()

    def _times(self) -> Tensor:
        return self._prepared.resolved(self.grid, self.predictor, self.model.sde, self.steps)

    @explains
    def __call__(
        self,
        start: Sequence[int] | Tensor,
        /,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cond: Any,
    ) -> Tensor:
        """Return samples (B, *D).

        Args:
            start: the shape (B, *D) of a draw from the prior, or the initial state.
            generator: the source of randomness: one generator, one for each sample, or None.
            device: the device of a drawn state, by default the model's.
            dtype: the dtype of the result, by default that of the given state, or else float64 for
                a model in float64 and float32 for others. The run itself is in float32 at least.
            cond: passed to the model.

        Raises:
            ValueError: if the state is not finite, the generators do not match the batch, a
                state is to be drawn and the grid does not begin at the prior's noise, a
                predictor adds noise that is not that of the `BrownianPath` it got, or the result
                is not finite, which is read on every device.
            TypeError: if dtype is not a floating-point dtype.
        """
        with torch.no_grad(), evaluation_mode(self.model):
            x, kind = initial_state(self.model, start, self._times(), generator, device, dtype)
            for state in self._run(x, generator, cond):  # noqa: B007 - only the last is used
                pass
        return narrowed(state.x, kind, "samples", WIDER)

    def edit(self, x0: Tensor, t: float, /, *, generator: Generators = None, **cond: Any) -> Tensor:
        """Return data x0 (B, *D) perturbed to about time t and denoised from there: SDEdit.

        Large times keep little of the data, small ones almost all. The run begins at the first
        time of the grid that is at most t; with a constraint, the known parts do not change.

        Args:
            x0: the data to edit, such as a sketch or a photograph.
            t: the time to begin at.
            generator: the source of randomness: one generator, one for each sample, or None.
            cond: passed to the model.

        Raises:
            ValueError: if no step of the grid begins within (0, t], x0 or the result is not finite,
                or x0 is outside the model's data_range.
            TypeError: if t is not a number.

        Source: Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic
        Differential Equations, 2022, arXiv 2108.01073 (algorithm 1).
        """
        with torch.no_grad(), evaluation_mode(self.model):
            x, first = noised_data(self.model.sde, x0, t, self._times(), generator)
            check_range(x0, self.model, "x0")
            for state in self._run(x, generator, cond, first=first):  # noqa: B007 - only the last is used
                pass
        return narrowed(state.x, x0.dtype, "samples", WIDER)

    def iterate(
        self,
        start: Sequence[int] | Tensor,
        /,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cond: Any,
    ) -> Iterator[SamplerState]:
        """Yield the initial state, the state after each step, and the denoised result.

        Takes the arguments of a call. Between two states the caller's gradient mode and the
        model's training mode are restored. The states are those of the run, in float32 at least.
        """
        with torch.no_grad():
            x, _ = initial_state(self.model, start, self._times(), generator, device, dtype)
        return self._in_modes(self._run(x, generator, cond))

    def _in_modes(self, run: Iterator[SamplerState]) -> Iterator[SamplerState]:
        while True:
            with torch.no_grad(), evaluation_mode(self.model):
                state = next(run, None)
            if state is None:
                return
            yield state

    def _run(
        self, x: Tensor, generator: Generators, cond: dict[str, Any], *, first: int = 0
    ) -> Iterator[SamplerState]:
        model, grid = self.model, self._times()
        route, last = self._route(generator, grid, first), len(grid) - 1
        times = self._prepared.times(model.sde, self.predictor, route, x)
        clock = route.times.tolist()
        counter = EvaluationCounter()
        step = self._constrained(Step(x, x), times[first], generator)
        prediction: Prediction | None = None
        self.nfe = 0
        yield SamplerState(step.x, step.mean, clock[first], first, 0)
        for i, j in with_progress(route.moves, self.progress):
            with counter:
                if clock[i] > clock[j]:
                    step = self._onward(step, times[i], times[j], generator, cond)
                else:
                    step = travel_back(
                        step.x, model.sde, route.times[i], route.times[j],
                        s_noise=route.noise.get(j, 1.0), generator=generator,
                    )  # fmt: skip
                    step = self._constrained(step, times[j], generator)
            self.nfe = counter.evaluations
            prediction = step.prediction or prediction
            at = j if j <= last else sum(t > clock[j] for t in clock[: last + 1])
            yield SamplerState(step.x, step.mean, clock[j], at, self.nfe, prediction)
        if self.denoise:
            x = step.mean
            with counter:
                if noise_at(times[last]) > 0:
                    prediction = model.predict(step.x, times[last], **cond)
                    x = prediction.x0
            if self.constraint is not None:
                one = x.new_ones(len(x), dtype=schedule_dtype(x.device))
                x = self.constraint(x, one, torch.zeros_like(one))
            self.nfe = counter.evaluations
            check_samples(x)
            yield SamplerState(x, x, clock[last], last, self.nfe, prediction)
        else:
            check_samples(step.x)

    def _route(self, generator: Generators, grid: Tensor, first: int) -> Route:
        if self.time_travel is not None and isinstance(generator, NoisePath):
            raise ValueError(
                "generator: expected generators where segments are sampled again, got a path, "
                "whose noise would be the same each time"
            )
        return planned(self.time_travel, self.model.sde, grid, first)

    def _onward(
        self, before: Step, t: Tensor, s: Tensor, generator: Generators, cond: dict[str, Any]
    ) -> Step:
        """Correct and predict, in the chosen order, from a time t to an earlier time s."""
        predictor, corrector, step = self.predictor, self.corrector, before
        first = self.corrector_first and predictor is not None
        if corrector is not None and first:
            step = self._correct(corrector, step, t, generator, cond)
        if predictor is not None:
            step = self._predict(predictor, step, t, s, generator, cond)
        if corrector is not None and not first and noise_at(s) > 0:
            step = self._correct(corrector, step, s, generator, cond)
        return step

    def _predict(
        self,
        predictor: Predictor,
        before: Step,
        t: Tensor,
        s: Tensor,
        generator: Generators,
        cond: dict[str, Any],
    ) -> Step:
        path = None
        if generator is not None and isinstance(generator, NoisePath):
            path = ObservedPath(generator)
        source = generator if path is None else path
        step = predictor.step(self.model, before.x, t, s, before.state, generator=source, **cond)
        check_step(step, before.x, predictor)
        if path is not None:
            check_path(path, step, predictor)
        return self._constrained(step, s, generator)

    def _correct(
        self,
        corrector: Corrector,
        before: Step,
        t: Tensor,
        generator: Generators,
        cond: dict[str, Any],
    ) -> Step:
        step = corrector.step(self.model, before.x, t, generator=generator, **cond)
        check_step(step, before.x, corrector)
        # The predictor's memory passes through.
        return self._constrained(replace(step, state=before.state), t, generator)

    def _constrained(self, step: Step, t: Tensor, generator: Generators) -> Step:
        """Return a step to a time with the constraint imposed on its state and its mean."""
        if self.constraint is None:
            return step
        alpha, sigma = self.model.sde.perturbation_kernel(step.x, t)
        x = self.constraint(step.x, alpha, sigma, generator=generator)
        mean = self.constraint(step.mean, alpha, torch.zeros_like(sigma))
        return replace(step, x=x, mean=mean)
