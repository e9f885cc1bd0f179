"""The likelihood of a model under its probability-flow ODE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from .._batch_conditions import for_batch, rows_of
from .._checks import (
    check_count,
    check_finite,
    check_part,
    check_positive,
    check_state,
    check_t_min,
    readable,
)
from .._coefficients import Coefficient
from .._data_range import check_range
from .._flow_solver import Solver, angles, radii
from .._gaussian import normal_log_prob
from .._grid_times import schedule
from .._loops import evaluation_mode
from .._masks import count, kept, total, zeroed
from .._model_checks import check_model
from .._precision import (
    arithmetic_dtype,
    at_least_float32,
    backward_factor,
    network_dtype,
    state_dtype,
)
from .._repr import Described, described
from .._schedules import exact, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel
from ..random import Generators
from ._balance import (
    SHARE,
    Runs,
    check_balance,
    looser,
    needed_probes,
    pilot_factors,
    pilot_probes,
    pilot_samples,
    until_reached,
)
from .divergence import Divergence, Hutchinson


@dataclass(frozen=True, slots=True, eq=False)
class ODELogLikelihood:
    """The log-likelihood of data under the probability flow of a model.

    Args:
        log_prob: the log-density of each sample in nats (B,), the mean over the probes.
        latent: the latent codes at T (B, *D).
        nfe: the number of network evaluations.
        stderr: the standard error of `log_prob` over several probes (B,), without the errors of
            the solver and dequantization; None for one probe.
        t: the time assigned to the data.
        density: a description of the evaluated density.
        probes: the number of probes in the mean.
        rtol: the relative tolerance of the solver.
        solver_error: the solver's error in nats, measured on a few samples to choose the tolerance
            for a target standard error; None without a target.
    """

    log_prob: Tensor
    latent: Tensor
    nfe: int
    stderr: Tensor | None
    t: float
    density: str
    probes: int
    rtol: float
    solver_error: float | None

    @property
    def nats(self) -> Tensor:
        """The negative log-density of each sample in nats (B,)."""
        return -self.log_prob


class ODELikelihood(Described):
    r"""The log-density of data under the probability flow of a model.

    The flow maps x at t_min to a latent code x_T, evaluated under the prior:

    .. math::
        \log p(x) = \log \pi(x_T) + d \log \frac{r(T)}{r(t_{min})}
            + \int \nabla \cdot v(x, t)\, d\theta, \quad r^2 = \alpha^2 + \sigma^2, \quad
        \tan\theta = \frac{\sigma}{\alpha},

    with the predicted velocity v = alpha eps - sigma x0. The ODE is solved for x / r in the angle
    theta, see `ProbabilityFlow`: there the divergence is that of v alone, regular at both ends
    and zero for standard normal data.

    The result is the ODE model's density at t_min, evaluated at x. It is neither the density at
    t = 0 nor that of the SDE model, which `NELBO` bounds: the two models agree for an exact
    score, but not in general.

    With a mask it is the density of the elements that the mask keeps, with the others held at 0 and
    not part of the flow. This is meaningful if the prediction of the former does not depend on the
    latter, as for padding that a network ignores because of a condition. Otherwise the flow of some
    elements is not that of a model, and ValueError is raised; `NELBO` bounds the density for any
    network.

    State and log-density are kept in float64 if the device supports it. The batch shares adaptive
    steps: with one generator per sample, a value depends on the rest of its batch only within the
    tolerance. At jumps of an `IndexLabel` with fewer than 100 levels the solver restarts; it cannot
    detect jumps inside a network that rounds its labels.

    With a target standard error the tolerance and the number of probes are chosen together. Runs of
    at most eight samples with the same probes and tolerances of 1e-2, 1e-3, ... measure the
    solver's error and the variance of a probe; the tolerance is the first whose values the next
    one changes by at most a quarter of the target. Fresh probes are then drawn until the estimated
    standard error of every sample is at most the target, or `max_probes` is reached. The standard
    error of the mean over N samples is smaller by a factor of sqrt(N), since their probes are
    independent: use a larger target for a data set.

    Args:
        model: the score model. Networks in DistributedDataParallel are called unwrapped, so ranks
            do not wait for each other; dropout is off.
        divergence: the divergence estimator, one Rademacher probe by default.
        method: a solver of torchdiffeq, as in `ProbabilityFlow`.
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance, in units of the data and in nats per dimension.
        t_min: the time assigned to the data, the SDE's t_min by default.
        target_stderr: the standard error to reach for each sample, in nats of `log_prob`: that in
            bits per dimension times d log 2. rtol and atol are then the tightest tolerances that
            may be chosen, and the number of probes of `divergence` is not used.
        max_probes: the largest number of probes drawn for a target.
        differentiable: whether gradients flow to the data, to conditions and to the network's
            parameters, through the steps of the solver. The activations of all evaluations, and
            of their derivatives, are then kept in memory. A process's own parameters get none.
        options: further options of the solver, such as {"step_size": h} in theta.

    Raises:
        ValueError: if the method is unknown, a tolerance is not positive, t_min is not in [0, T),
            sigma is 0 at t_min, target_stderr is not positive or has a method with fixed steps, or
            max_probes < 2.
        TypeError: if model is not a ScoreModel, divergence not a Divergence, or neither Hutchinson
            nor ExactDivergence with a target.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (section 4.3); Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv 2101.09258.

    >>> import torch
    >>> from diffusionkit import VPSDE, GaussianMixtureModel, ODELikelihood
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> result = ODELikelihood(model)(torch.tensor([[-1.5], [2.5]]))
    >>> result.log_prob.round(decimals=2)
    tensor([-1.4200, -1.4200], dtype=torch.float64)
    >>> result.density
    'p_t at t = 1e-05 (probability-flow ODE)'
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        divergence: Divergence | None = None,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        t_min: float | None = None,
        target_stderr: float | None = None,
        max_probes: int = 64,
        differentiable: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.divergence = Hutchinson() if divergence is None else divergence
        check_part(self.divergence, Divergence, "divergence")
        self.solver = Solver(method, rtol, atol, {} if options is None else options, differentiable)
        self.t_min = model.sde.t_min if t_min is None else t_min
        check_t_min(self.t_min, model.sde.T)
        angles(model.sde, self.t_min, model.sde.T)
        if target_stderr is not None:
            check_positive(target_stderr, "target_stderr")
            check_balance(self.solver, self.divergence)
        check_count(max_probes, "max_probes", least=2)
        self.target_stderr = target_stderr
        self.max_probes = max_probes

    @override
    def __repr__(self) -> str:
        solver = self.solver
        return described(self, method=solver.method, rtol=solver.rtol, atol=solver.atol)

    def __call__(
        self,
        x: Tensor,
        /,
        *,
        mask: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> ODELogLikelihood:
        """Return the log-likelihood of data x (B, *D).

        Args:
            x: the data (B, *D), dequantized if discrete.
            mask: the elements whose density is computed, booleans or 0 and 1, (B, *D) or with
                sizes of 1; the data may have any value where it is 0, NaN included.
            generator: the source of the probes: one generator, one for each sample, or None.
            cond: passed to the model.

        Raises:
            ValueError: if x is not finite or outside the model's data_range, a prediction is not
                finite, or a mask does not fit, has other numbers than 0 and 1, or leaves out
                elements on which the prediction of the others depends (read on the CPU only).
            TypeError: if x is not a floating-point tensor.
        """
        check_state(x)
        if mask is not None:
            mask, x = kept(mask, x)
        check_finite(x)
        check_range(x, self.model, mask=mask)
        # Tensors created in inference mode cannot be differentiated, not even with respect to x.
        grad = self.solver.differentiable and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            cond = {name: _ordinary(value) for name, value in cond.items()}
            x, mask = _ordinary(x), _ordinary(mask)
            if mask is not None:
                self._check_ignored(x, mask, cond)
            return self._run(x, generator, cond, mask)

    @torch.no_grad()
    def _check_ignored(self, x: Tensor, mask: Tensor, cond: dict[str, Any]) -> None:
        """Raise if the velocity of what a mask keeps depends on the rest (read on the CPU only)."""
        if not readable(x):
            return
        sde = self.model.sde
        equal = torch.zeros(len(x), dtype=schedule_dtype(x.device), device=x.device)
        t = sde.time_at_log_snr(equal).clamp(self.t_min, sde.T).to(at_least_float32(x).dtype)
        r = sum(value.square() for value in sde.marginal(t)) ** 0.5
        state = x * r.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
        others = torch.where(mask == 0, (state.abs().mean() + 1).to(state.dtype), state)
        with evaluation_mode(self.model):
            one, other = (zeroed(self.model.predict(s, t, **cond).v, mask) for s in (state, others))
        change, size = float((one - other).abs().max()), float(one.abs().max())
        if change > 1e-3 * (1e-3 + size):
            raise ValueError(
                "mask: expected a model whose prediction of the elements that it keeps does not "
                f"depend on the others, got a change of {change:.2g} in a velocity of {size:.2g}; "
                "pass the network the mask as a condition that it uses, or use NELBO, which "
                "bounds the density for any network"
            )

    def _run(
        self, x: Tensor, generator: Generators, cond: dict[str, Any], mask: Tensor | None
    ) -> ODELogLikelihood:
        dtype = state_dtype(x.dtype, network_dtype(self.model))

        def solve(solver: Solver, divergence: Divergence) -> Runs:
            fixed = divergence.start(x.to(dtype), generator)
            return self._solve(solver, divergence, fixed, x, cond, mask)

        solver, error = self.solver, None
        if self.target_stderr is None:
            runs = solve(solver, self.divergence)
        else:
            solver, error, probes, nfe = self._plan(x.to(dtype), generator, cond, mask)
            runs = solve(solver, self._with(probes))
            if probes > 1:
                runs = until_reached(
                    runs,
                    lambda k: solve(solver, self._with(k)),
                    self.target_stderr,
                    self.max_probes,
                )
            runs = replace(runs, nfe=runs.nfe + nfe)
        return ODELogLikelihood(
            log_prob=runs.each.mean(0),
            latent=runs.latent.to(at_least_float32(x).dtype),
            nfe=runs.nfe,
            stderr=runs.stderr,
            t=self.t_min,
            density=f"p_t at t = {self.t_min:g} (probability-flow ODE)",
            probes=len(runs.each),
            rtol=solver.rtol,
            solver_error=error,
        )

    def _with(self, probes: int) -> Divergence:
        """Return the divergence estimator with another number of probes."""
        own = self.divergence
        return Hutchinson(probes, own.noise) if isinstance(own, Hutchinson) else own

    @torch.no_grad()
    def _plan(
        self, x: Tensor, generator: Generators, cond: dict[str, Any], mask: Tensor | None
    ) -> tuple[Solver, float, int, int]:
        """Return the solver for the target, its error, the probes, and the evaluations spent."""
        target, n = cast(float, self.target_stderr), len(x)
        few = torch.arange(pilot_samples(n), device=x.device)
        some = None if generator is None or isinstance(generator, torch.Generator) else generator
        cond = {name: rows_of(value, n, few) for name, value in for_batch(cond, n).items()}
        mask = None if mask is None else mask[: len(few)]
        divergence = self._with(pilot_probes(n))
        x = x[: len(few)]
        fixed = divergence.start(x, generator if some is None else list(some)[: len(few)])

        def run(factor: float) -> Runs:
            return self._solve(looser(self.solver, factor), divergence, fixed, x, cond, mask)

        factors = pilot_factors(self.solver)
        found, error, factor = run(factors[0]), math.inf, 1.0
        nfe = found.nfe
        for looser_one, tighter in itertools.pairwise(factors):
            before, found = found, run(tighter)
            nfe += found.nfe
            error = float((before.each - found.each).mean(0).abs().max())
            if error <= SHARE * target:
                factor = looser_one
                break
        probes = 1
        if isinstance(self.divergence, Hutchinson):
            probes = needed_probes(found.each.var(0).mean(), target, self.max_probes)
        return looser(self.solver, factor), error, probes, nfe

    def _solve(
        self,
        solver: Solver,
        divergence: Divergence,
        fixed: Any,
        x: Tensor,
        cond: dict[str, Any],
        mask: Tensor | None,
    ) -> Runs:
        """Return the log-density of x (B, *D) under each probe."""
        sde, d = self.model.sde, count(x, mask)
        own = network_dtype(self.model)

        def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            factor = _factor(sde, t, arithmetic_dtype(own, x))

            def predict(x: Tensor) -> Tensor:
                v = zeroed(self.model.predict(x, t, **cond).v, mask)
                return v if factor is None else v * factor

            v, rate = divergence(predict, x, fixed)
            return (v, rate / d) if factor is None else (v / factor, rate / d / factor)

        # In nats per dimension, the unit of the tolerance.
        volume = x.new_zeros(divergence.probes, len(x), dtype=schedule_dtype(x.device))
        (latent, volume), nfe = solver(
            self.model, evaluate, x, self.t_min, sde.T, (volume,), state_dtype(x.dtype, own)
        )
        first, last = radii(sde, self.t_min, sde.T)
        growth = math.log(last / first)
        each = sde.prior_log_prob(latent) + d * (growth + volume)
        if mask is not None:  # the prior of elements at 0, which are no part of the data
            absent = x[0].numel() - total(exact(mask))
            each = each - absent * exact(normal_log_prob(latent.new_zeros(1), sde.prior_std))
        return Runs(each, latent, nfe)


def _factor(sde: ForwardSDE, t: Tensor, dtype: torch.dtype | None) -> Coefficient | None:
    """Return the factor of backward passes from the velocity to a state, see `backward_factor`.

    The velocity is at most r^2 max(sigma, 1 / sigma) times as large as a network's output.
    """
    alpha, sigma = (float(value) for value in schedule(sde, t))
    gain = (alpha**2 + sigma**2) * max(sigma, 1 / sigma)
    return backward_factor(gain, dtype)


def _ordinary(value: Any) -> Any:
    """Return a copy of a tensor created in inference mode, and anything else unchanged."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
