"""The reverse SDE with steps as long as a tolerance allows, for each sample by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_positive, check_step_times
from .._grid_times import tabulated
from .._schedules import exact
from ..interfaces import ForwardSDE, Predictor, ScoreModel, Step
from ..random import Generators, NoisePath, rand
from ..values import linear
from .brownian import BrownianPath
from .predictors import check_rates

_FIRST = 0.01  # of T, the first step
_SAFETY = 0.9
_POWER = 2 / 3  # the two proposals differ by O(h^(3/2))
_LEAST, _MOST = 0.1, 5.0  # how much a step may shrink or grow at once


@dataclass(frozen=True)
class AdaptiveSDE(Predictor):
    r"""The reverse SDE from t to s in steps of its own, chosen by tolerance for each sample.

    A step of length h makes two proposals with the same noise, Euler and Maruyama's and Heun's,

    .. math::
        x' = x - h\, d(x, t) + g_t \sqrt h\, z, \quad
        x'' = \tfrac12 \left(x' + x - h\, d(x', t - h) + g_{t - h} \sqrt h\, z\right), \quad
        d = f x - g^2 \nabla \log p,

    and is accepted, as x'', where

    .. math::
        E = \frac{1}{\sqrt D} \left\| \frac{x' - x''}{\delta} \right\|_2 \le 1, \quad
        \delta = \max(\mathrm{atol}, \mathrm{rtol} \max(|x|, |x'|)).

    Then h becomes .9 h E^(-2/3). Two evaluations a step, of the whole batch until its slowest
    sample arrives. `PCSampler(model, AdaptiveSDE(), steps=1)` is the whole solver; on a longer
    grid, with correctors or constraints at its times, step lengths are kept from one of its steps
    to the next. From where the model is last defined, the SDE's t_stop, to a time without noise
    there is one step, to the predicted data.

    A step that is refused must not be tried again with new noise: on Gaussian data that made the
    standard deviation 1.2 to 2 times too large, the more so the tighter the tolerance. All noise
    is therefore the increments of a `BrownianPath`: the one handed in as generator, or one whose
    seeds the generator draws.

    Args:
        rtol: the tolerance relative to the state.
        atol: the absolute tolerance, in units of the state; one level of an image in [-1, 1] by
            default.
        max_steps: how many steps of its own a move may take, refused ones included.

    Raises:
        ValueError: unless the tolerances are positive and max_steps >= 1; in `step`, if that many
            do not suffice or a prediction is not finite; in `prepare` and `step`, from a time
            where alpha = 0 and the drift is infinite (read on the CPU only).
        TypeError: if one of them is not a number.

    Source: Jolicoeur-Martineau et al., Gotta Go Fast When Generating Data with Score-Based
    Models, 2021, arXiv 2105.14080 (algorithm 1, with r = 2/3 for .9, and x for x'_prev).

    >>> from diffusionkit import GaussianMixtureModel, PCSampler, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.5, 0.5])
    >>> sampler = PCSampler(model, AdaptiveSDE(rtol=0.05), steps=1)
    >>> sampler((4, 1), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    """

    rtol: float = 0.01
    atol: float = 2 / 255
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")
        check_count(self.max_steps, "max_steps")

    def prepare(self, sde: ForwardSDE, times: Sequence[Tensor]) -> None:
        """Raise if the reverse SDE has no finite drift at a time of the grid."""
        table = tabulated(sde, times)
        if table is not None:
            starts = table[1][:-1]
            check_rates(self, starts, *_reverse(sde, starts))

    def step(
        self,
        model: ScoreModel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: Any = None,
        *,
        generator: Generators = None,
        **cond: Any,
    ) -> Step:
        """Move a state x (B, *D) from times t (B,) to s (B,), s < t.

        `state` is the lengths of the next steps (B,).
        """
        sde = model.sde
        check_step_times(s, t, sde.T, x)
        path = generator if isinstance(generator, NoisePath) else _path(len(x), generator)
        t, s = exact(t), exact(s)
        alpha, sigma = sde.marginal(s)
        clean = sigma == 0
        end = torch.where(clean, s.clamp_min(sde.t_stop), s).minimum(t)
        length = torch.full_like(t, _FIRST * sde.T) if state is None else state
        out = mean = x
        left = end < t * (1 - 1e-6)  # the last bit of a float32 is no move
        for _ in range(self.max_steps):
            if not bool(left.any()):
                break
            # A sample that has arrived stays where its last step began: the model is defined there.
            to = torch.where(left, (t - length).maximum(end), 0.5 * (t + s))
            first, last, last_mean = _proposals(model, x, t, to, path, cond)
            error = self._error(x, first, last)
            if not bool(torch.isfinite(error).all()):
                check_rates(self, t, *_reverse(sde, t))
                worst = t[~torch.isfinite(error)][0]
                raise ValueError(
                    "model: expected finite predictions, got NaN or infinity in a step from "
                    f"t = {float(worst):g}"
                )
            accepted = left & (error <= 1)
            arrived = accepted & (to <= end)
            factor = (_SAFETY * error.clamp_min(1e-9) ** -_POWER).clamp(_LEAST, _MOST)
            wanted = (t - to) * factor
            # The end cut the last step short: that says nothing against a longer one.
            wanted = torch.where(arrived, torch.maximum(wanted, length), wanted)
            length = torch.where(left, wanted, length)
            out, mean = _where(arrived, last, out), _where(arrived, last_mean, mean)
            left = left & ~arrived
            moved = accepted & left
            x, t = _where(moved, last, x), torch.where(moved, to, t)
        if bool(left.any()):
            raise ValueError(
                f"expected to reach s within max_steps = {self.max_steps}, got to "
                f"t = {float(t[left].max()):g}; ask for less with rtol and atol, or allow more"
            )
        if bool(clean.any()):
            data = model.predict(out, end, **cond).x0
            data = linear(alpha, data, 0.0, data)
            out, mean = _where(clean, data, out), _where(clean, data, mean)
        return Step(out, mean, length)

    def _error(self, x: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Return the root mean square of the error over its tolerance, (B,)."""
        size = (self.rtol * torch.maximum(x.abs(), first.abs())).clamp_min(self.atol)
        ratio = ((first - last) / size).reshape(len(x), -1).to(torch.float64)
        return ratio.square().mean(1).sqrt()


def _path(batch: int, generator: Generators) -> BrownianPath:
    """Return the path of as many samples whose seeds a generator draws."""
    u = rand(batch, generator=generator, dtype=torch.float64)
    return BrownianPath((u * 2.0**53).long().tolist())


def _where(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return x in some rows (B,) and y in the others."""
    return torch.where(rows.view(-1, *(1,) * (x.ndim - 1)), x, y)


def _proposals(
    model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, path: NoisePath, cond: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x', x'' and x'' without its noise, each (B, *D)."""
    noise, h = path.increment(x, model.sde, t, s), t - s
    p, q, g = _reverse(model.sde, t)
    mean = model.predict(x, t, **cond).combine(x=1 - h * p, x0=-h * q)
    first = linear(1.0, mean, g * h.sqrt(), noise)
    p, q, g_s = _reverse(model.sde, s)
    change = model.predict(first, s, **cond).combine(x=-h * p, x0=-h * q)
    mean = 0.5 * (mean + x + change)
    return first, linear(1.0, mean, 0.5 * (g + g_s) * h.sqrt(), noise), mean


def _reverse(sde: ForwardSDE, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, q and g, each (n,), of the reverse SDE dx = (p x + q x0) dt + g dw."""
    alpha, sigma = sde.marginal(t)
    g = sde.diffusion(t)
    pull = (g / sigma).square()
    return sde.drift_coefficient(t) + pull, -pull * alpha, g
