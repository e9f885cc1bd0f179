"""The predictor-corrector sampler: the one step loop of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_part
from .._draws import Generators
from .._numerics import instant, instants
from ..interfaces import Corrector, Predictor, ScoreModel, Step
from ._run import CountedModel, Progress, evaluation_mode, initial_state, with_progress
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
        nfe: how many times the model was evaluated in the last run.

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
        self.times = resolve_grid(grid, model.sde, steps)
        self.corrector_first = corrector_first
        self.denoise = denoise
        self.progress = progress
        self.nfe = 0

    def __repr__(self) -> str:
        return f"PCSampler({self.predictor}, {self.corrector}, steps={len(self.times) - 1})"

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
            ValueError: if the state is not finite, or the generators do not match the batch.
        """
        with torch.no_grad():
            x = initial_state(self.model, start, generator, device, dtype)
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

        Takes the arguments of a call.
        """
        x = initial_state(self.model, start, generator, device, dtype)
        return torch.no_grad()(self._run)(x, generator, cond)

    def _run(
        self, x: Tensor, generator: Generators, cond: dict[str, Any]
    ) -> Iterator[SamplerState]:
        sde, model = self.model.sde, CountedModel(self.model)
        times = instants(sde, self.times, x.shape[0], x.device)
        clock = self.times.tolist()
        self.nfe = 0
        correct_before = self.corrector_first and self.predictor is not None
        if self.predictor is not None:
            self.predictor.prepare(sde, times)
        with evaluation_mode(self.model):
            yield SamplerState(x, x, clock[0], 0, 0)
            memory = None
            for k, (t, s) in enumerate(with_progress(list(pairwise(times)), self.progress), 1):
                if correct_before:
                    x = self._correct(model, x, t, generator, cond).x
                move = Step(x, x)
                if self.predictor is not None:
                    move = self.predictor.step(model, x, t, s, memory, generator=generator, **cond)
                    x, memory = move.x, move.state
                if not correct_before and self._noise_at(s) > 0:
                    move = self._correct(model, x, s, generator, cond)
                    x = move.x
                self.nfe = model.evaluations
                yield SamplerState(x, move.mean, clock[k], k, self.nfe)
            if self.denoise:
                noisy = self._noise_at(times[-1]) > 0
                x = model.predict(x, times[-1], **cond).x0 if noisy else move.mean
                self.nfe = model.evaluations
                yield SamplerState(x, x, clock[-1], k, self.nfe)

    def _correct(
        self, model: ScoreModel, x: Tensor, t: Tensor, generator: Generators, cond: dict[str, Any]
    ) -> Step:
        if self.corrector is None:
            return Step(x, x)
        return self.corrector.step(model, x, t, generator=generator, **cond)

    def _noise_at(self, t: Tensor) -> float:
        known = instant(t, self.model.sde)
        return known.sigma if known is not None else 0.0
