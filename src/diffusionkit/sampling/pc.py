"""The predictor-corrector sampler: the one step loop of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_part
from .._draws import Generators
from .._numerics import instants, noise_at
from .._run import Progress, evaluation_mode, with_progress
from .._tally import Tally
from ..interfaces import Corrector, Predictor, ScoreModel, Step
from ._start import check_step, initial_state
from .grids import Grid, resolve_grid


@dataclass(frozen=True, slots=True, eq=False)
class SamplerState:
    """A sampler's state after a step.

    Args:
        x: the state (B, *D).
        mean: the state without the noise that was added last (B, *D).
        t: the time it stands at.
        step: how many steps have been taken.
        nfe: how many times the model has been evaluated.
    """

    x: Tensor
    mean: Tensor
    t: float
    step: int
    nfe: int


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
        progress: True for a bar (tqdm, where installed), or a wrapper of an iterable.

    Attributes:
        nfe: how many times the model was evaluated in the last run; a model that calls others,
            as guidance does, counts as what it calls.

    Raises:
        ValueError: if there is neither predictor nor corrector, steps < 1, or the grid is not
            decreasing within [0, T].
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
        progress: Progress = False,
    ) -> None:
        """Keep the parts and resolve the grid."""
        check_part(model, ScoreModel, "model")
        if predictor is not None:
            check_part(predictor, Predictor, "predictor")
        if corrector is not None:
            check_part(corrector, Corrector, "corrector")
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
        self.progress = progress
        self.nfe = 0
        resolve_grid(grid, model.sde, steps)  # what is wrong with it is said here

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
        return self._in_modes(self._run(x, generator, cond))

    def _in_modes(self, run: Iterator[SamplerState]) -> Iterator[SamplerState]:
        while True:
            with torch.no_grad(), evaluation_mode(self.model):
                state = next(run, None)
            if state is None:
                return
            yield state

    def _run(
        self, x: Tensor, generator: Generators, cond: dict[str, Any]
    ) -> Iterator[SamplerState]:
        model, predictor, grid = self.model, self.predictor, self.times
        times = instants(model.sde, grid, x)
        clock, noise = grid.tolist(), [noise_at(t) for t in times]
        correct_before = self.corrector_first and predictor is not None
        if predictor is not None:
            predictor.prepare(model.sde, times)
        tally, memory, move, steps = Tally(), None, Step(x, x), len(times) - 1
        self.nfe = 0
        yield SamplerState(x, x, clock[0], 0, 0)
        for k in with_progress(range(1, steps + 1), self.progress):
            t, s = times[k - 1], times[k]
            with tally:
                if correct_before:
                    move = self._correct(x, t, generator, cond)
                if predictor is not None:
                    step = predictor.step(model, move.x, t, s, memory, generator=generator, **cond)
                    move, memory = check_step(step, x, predictor), step.state
                if not correct_before and noise[k] > 0:
                    move = self._correct(move.x, s, generator, cond)
            x, self.nfe = move.x, tally.evaluations
            yield SamplerState(x, move.mean, clock[k], k, self.nfe)
        if self.denoise:
            with tally:
                x = model.predict(x, times[-1], **cond).x0 if noise[-1] > 0 else move.mean
            self.nfe = tally.evaluations
            yield SamplerState(x, x, clock[-1], steps, self.nfe)

    def _correct(self, x: Tensor, t: Tensor, generator: Generators, cond: dict[str, Any]) -> Step:
        if self.corrector is None:
            return Step(x, x)
        step = self.corrector.step(self.model, x, t, generator=generator, **cond)
        return check_step(step, x, self.corrector)
