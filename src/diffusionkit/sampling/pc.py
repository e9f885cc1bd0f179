"""The predictor-corrector sampler: the one step loop of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_part
from .._grid_times import grid_times, noise_at
from .._loops import Progress, evaluation_mode, with_progress
from .._nfe import Tally
from ..interfaces import Constraint, Corrector, Prediction, Predictor, ScoreModel, Step
from ..random import Generators, NoisePath
from ._start import check_step, initial_state, noised_data
from .grids import Grid, resolve_grid
from .time_travel import TimeTravel, travel_back


@dataclass(frozen=True, slots=True, eq=False)
class SamplerState:
    """A sampler's state after a step.

    Args:
        x: the state (B, *D).
        mean: the state without the noise that was added last (B, *D).
        t: the time it stands at.
        step: which point of the grid that is, from 0 at its beginning.
        nfe: how many times the model has been evaluated.
        prediction: what the model said last on the way here; None at the start.
    """

    x: Tensor
    mean: Tensor
    t: float
    step: int
    nfe: int
    prediction: Prediction | None = None

    @property
    def x0(self) -> Tensor | None:
        """The model's last estimate of the data (B, *D), computed when it is read."""
        return None if self.prediction is None else self.prediction.x0


class PCSampler:
    r"""Predictor-corrector sampling from T to the data, on any grid of times.

    At each time the corrector moves the state within the law p_t, then the predictor takes it
    to the next time (the released code's order; `corrector_first=False` is the paper's). At the
    end the noise that p_t still holds at the last time is removed by Tweedie's formula, the
    model's x0. The model is put in evaluation mode for the run.

    Args:
        model: the score model.
        predictor: the move between times; None leaves the state to the corrector alone.
        corrector: the move at a time; None is predictor-only sampling.
        steps: the number of steps, unless the grid is a tensor.
        grid: a callable (sde, steps) -> times, a tensor of decreasing times, or None for times
            uniform between T and the SDE's t_stop.
        corrector_first: whether the corrector runs before the predictor.
        denoise: whether the last noise is removed, at the cost of one evaluation. Where the grid
            ends at a time without noise, the last step's mean is returned instead.
        constraint: what is known of the data. It is put into the initial state, into the state
            and the mean after every move, and into the result.
        time_travel: how often stretches of the grid are sampled again; None is once.
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.

    Attributes:
        nfe: how many times the model was evaluated in the last run; a model that calls others,
            as guidance does, counts as what it calls.

    Raises:
        ValueError: if there is neither predictor nor corrector, steps < 1, the grid is not
            decreasing within [0, T] or too short for the predictor, or a jump of the travel is
            longer than the grid.
        TypeError: if a part has the wrong type.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (algorithm 1).

    >>> from diffusionkit import GaussianMixtureModel, Langevin, ReverseDiffusion, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.1, 0.1])
    >>> sampler = PCSampler(model, ReverseDiffusion(), Langevin(snr=0.16), steps=50)
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
        time_travel: TimeTravel | None = None,
        progress: Progress = False,
    ) -> None:
        """Keep the parts, and try the grid."""
        check_part(model, ScoreModel, "model")
        for name, part, kind in (
            ("predictor", predictor, Predictor),
            ("corrector", corrector, Corrector),
            ("constraint", constraint, Constraint),
            ("time_travel", time_travel, TimeTravel),
        ):
            if part is not None:
                check_part(part, kind, name)
        if predictor is None and corrector is None:
            raise ValueError("expected a predictor, a corrector or both, got neither")
        check_count(steps, "steps")
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
        times = resolve_grid(grid, model.sde, steps)  # what is wrong with it is said here
        length = len(times) - 1
        if predictor is not None:
            with torch.no_grad():  # and here what the predictor cannot do with it
                predictor.prepare(model.sde, grid_times(model.sde, times, times.new_empty(1)))
        if time_travel is not None and time_travel.jump > length:
            raise ValueError(
                f"time_travel: expected a jump of at most the grid's {length} steps, "
                f"got {time_travel.jump}"
            )

    def __repr__(self) -> str:
        return f"PCSampler({self.predictor}, {self.corrector}, steps={self.steps})"

    @property
    def times(self) -> Tensor:
        """The decreasing times (N + 1,) of the grid, for the process as it is now."""
        return resolve_grid(self.grid, self.model.sde, self.steps)

    def __call__(
        self,
        start: Sequence[int] | Tensor,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cond: Any,
    ) -> Tensor:
        """Return samples (B, *D).

        Args:
            start: the shape (B, *D) of a draw from the prior, or the state to start from.
            generator: the source of randomness: one generator, one for each sample, or None.
            device: where a drawn start is made, the model's device by default.
            dtype: the dtype of a drawn start, the model's by default.
            cond: handed to the model.

        Raises:
            ValueError: if the state is not finite, the generators do not match the batch, or a
                start is to be drawn and the grid begins far from T, where the prior is.
        """
        with torch.no_grad(), evaluation_mode(self.model):
            x = initial_state(self.model, start, self.times, generator, device, dtype)
            for state in self._run(x, generator, cond):  # noqa: B007 - the last one is wanted
                pass
        return state.x

    def edit(self, x0: Tensor, t: float, *, generator: Generators = None, **cond: Any) -> Tensor:
        """Return data x0 (B, *D) noised to about a time t, and sampled from there: SDEdit.

        Late times keep little of the data, early ones almost all of them. The run begins at the
        first time of the grid that is at most t; with a constraint, masked parts stay as they are.

        Args:
            x0: the data to change, a sketch or a photograph.
            t: the time to begin at.
            generator: the source of randomness: one generator, one for each sample, or None.
            cond: handed to the model.

        Raises:
            ValueError: if no step of the grid begins within (0, t], or x0 is not finite.
            TypeError: if t is not a number.

        Source: Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic
        Differential Equations, 2022, arXiv 2108.01073 (algorithm 1).
        """
        with torch.no_grad(), evaluation_mode(self.model):
            x, first = noised_data(self.model.sde, x0, t, self.times, generator)
            for state in self._run(x, generator, cond, first=first):  # noqa: B007 - as in a call
                pass
        return state.x

    def iterate(
        self,
        start: Sequence[int] | Tensor,
        *,
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **cond: Any,
    ) -> Iterator[SamplerState]:
        """Yield the initial state, the state after each step, and the denoised result.

        Takes the arguments of a call. Between two states your own code runs in its own gradient
        mode, and with the model in its own training mode.
        """
        with torch.no_grad():
            x = initial_state(self.model, start, self.times, generator, device, dtype)
        return self._in_modes(self._run(x, generator, cond, watched=True))

    def _in_modes(self, run: Iterator[SamplerState]) -> Iterator[SamplerState]:
        while True:
            with torch.no_grad(), evaluation_mode(self.model):
                state = next(run, None)
            if state is None:
                return
            yield state

    def _run(
        self,
        x: Tensor,
        generator: Generators,
        cond: dict[str, Any],
        *,
        first: int = 0,
        watched: bool = False,
    ) -> Iterator[SamplerState]:
        model, grid = self.model, self.times
        times, steps = grid_times(model.sde, grid, x), len(grid) - 1
        clock = grid.tolist()
        if self.predictor is not None:
            self.predictor.prepare(model.sde, times)
        time_travel = self._travel(generator) or TimeTravel(jump=steps, repeats=1)
        tally, memory = Tally(keep=watched), None
        move = self._constrained(Step(x, x), times[first], generator)
        x, self.nfe = move.x, 0
        yield SamplerState(x, move.mean, clock[first], first, 0)
        for i, j in with_progress(time_travel.moves(first, steps), self.progress):
            with tally:
                if i < j:
                    move, memory = self._onward(x, times[i], times[j], memory, generator, cond)
                else:
                    move = travel_back(x, model.sde, grid[i], grid[j], generator=generator)
                    move, memory = self._constrained(move, times[j], generator), None
            x, self.nfe = move.x, tally.evaluations
            yield SamplerState(x, move.mean, clock[j], j, self.nfe, tally.last)
        if self.denoise:
            with tally:
                held = noise_at(times[-1]) > 0
                x = model.predict(x, times[-1], **cond).x0 if held else move.mean
            x = x if self.constraint is None else self.constraint(x, 1.0, 0.0)
            self.nfe = tally.evaluations
            yield SamplerState(x, x, clock[-1], steps, self.nfe, tally.last)

    def _travel(self, generator: Generators) -> TimeTravel | None:
        if self.time_travel is not None and isinstance(generator, NoisePath):
            raise ValueError(
                "generator: expected generators where stretches are sampled again, got a path, "
                "whose noise would be the same each time"
            )
        return self.time_travel

    def _onward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        memory: Any,
        generator: Generators,
        cond: dict[str, Any],
    ) -> tuple[Step, Any]:
        """Correct and predict, in the order asked for, from a time t to an earlier one s."""
        predictor, corrector, move = self.predictor, self.corrector, Step(x, x)
        before = self.corrector_first and predictor is not None
        if corrector is not None and before:
            move = self._correct(corrector, x, t, generator, cond)
        if predictor is not None:
            step = predictor.step(self.model, move.x, t, s, memory, generator=generator, **cond)
            memory = check_step(step, x, predictor).state
            move = self._constrained(step, s, generator)
        if corrector is not None and not before and noise_at(s) > 0:
            move = self._correct(corrector, move.x, s, generator, cond)
        return move, memory

    def _correct(
        self,
        corrector: Corrector,
        x: Tensor,
        t: Tensor,
        generator: Generators,
        cond: dict[str, Any],
    ) -> Step:
        step = corrector.step(self.model, x, t, generator=generator, **cond)
        return self._constrained(check_step(step, x, corrector), t, generator)

    def _constrained(self, move: Step, t: Tensor, generator: Generators) -> Step:
        """Return a move to a time with what is known put into its state and its mean."""
        if self.constraint is None:
            return move
        alpha, sigma = self.model.sde.kernel(t)
        x = self.constraint(move.x, alpha, sigma, generator=generator)
        return Step(x, self.constraint(move.mean, alpha, 0.0))
