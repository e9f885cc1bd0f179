"""The variational bound on the likelihood of the SDE model, term by term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import (
    check_count,
    check_finite,
    check_log_snr,
    check_part,
    check_state,
    check_t_min,
    readable,
)
from .._coefficients import scaled
from .._data_range import check_range
from .._log_snr import LogSNRSpan
from .._masks import count, kept, zeroed
from .._model_checks import check_model
from .._repr import Described
from .._schedules import exact, home, schedule_dtype
from ..distributed._gradients import check_gradients_averaged
from ..interfaces import ForwardSDE, ScoreModel
from ..random import Generators, check_generator, rand
from ..values import Prediction
from ._control_variates import SquaredErrors
from ._strata import Strata, pilot_draws
from .divergence import Divergence


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """An upper bound on -log p(x) under the SDE model, and its terms, in nats.

    Args:
        nats: the bound, the sum of the terms (B,).
        prior: the expected -log of the prior at x_T (B,), exact.
        path: the score-matching integral (B,), estimated.
        drift: minus the integral of the divergence of the drift (B,), exact.
        smallest_time: the term of the last step, from t_min to the data (B,), estimated.
        stderr: the Monte Carlo standard error of the bound (B,), None for one draw.
        t_min: the end of the path and the start of the last step.
    """

    nats: Tensor
    prior: Tensor
    path: Tensor
    drift: Tensor
    smallest_time: Tensor
    stderr: Tensor | None
    t_min: float


class NELBO(Described):
    r"""The negative evidence lower bound: -log p_SDE(x) <= NELBO(x), for each sample.

    The SDE model starts from the prior at T, runs the reverse-time SDE with the model's score
    down to t_min, and ends with a Gaussian step around the denoised state. Its bound is

    .. math::
        -E \log \pi(x_T)
        + \tfrac12 \int_{t_{min}}^T g^2 E \left[\|s_\theta - \nabla \log p(x_t | x)\|^2
        - \|\nabla \log p(x_t | x)\|^2\right] dt
        - d \int_{t_{min}}^T f \, dt
        + E\left[-\log N(x; \hat x_0, \tfrac{\sigma^2}{\alpha^2} I)\right] - H[N(0, \sigma^2 I)]

    with the last two at t_min. Times are uniform in the log-SNR, stratified with one draw per
    stratum; terms with a closed form are exact. In the denoising form, from ten draws on, control
    variates from neighboring draws remove most of the variance, and from 300 on a tenth of the
    draws estimates at which times the others are needed; neither adds bias. It does not bound the
    likelihood under the probability flow ODE, a different model with the same score: see
    `ODELikelihood`.

    With a mask it bounds the density of the elements that the mask keeps, under the model in which
    the others are data of 0: the model that `ScoreMatching` trains with a mask. Their exact reverse
    process is then known, so their terms of the bound are zero, whatever the network predicts for
    them. For padding this is the density of the shorter sample; for missing values, that of the
    given values under a model trained with them missing, not a marginal of another model.

    In the denoising form gradients flow to the data and the parameters, so the bound can also
    serve as an objective. The model's mode is unchanged: call `model.eval()` first to disable
    dropout, as `evaluate_bits_per_dim` does.

    Args:
        model: the score model.
        samples: the number of times and noises drawn for each data point. For the last step a
            tenth as many are drawn, but at least two; one if samples is one.
        divergence: if given, estimates the path from the divergence of the score, as in sliced
            score matching and without gradients, instead of by denoising.
        t_min: the end of the path, the SDE's t_min by default.

    Raises:
        ValueError: if samples < 1, or t_min is not in [0, T).
        TypeError: if a part has the wrong type.

    Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
    arXiv 2101.09258 (theorem 3, appendix B).

    >>> import torch
    >>> from diffusionkit import NELBO, VPSDE, GaussianMixtureModel
    >>> model = GaussianMixtureModel(VPSDE(), means=[[0.0]], stds=[1.0])
    >>> bound = NELBO(model, samples=4)(torch.zeros(2, 1))
    >>> bound.nats.shape, bound.stderr.shape
    (torch.Size([2]), torch.Size([2]))
    """

    def __init__(
        self,
        model: ScoreModel,
        *,
        samples: int = 1,
        divergence: Divergence | None = None,
        t_min: float | None = None,
    ) -> None:
        check_model(model)
        check_count(samples, "samples")
        if divergence is not None:
            check_part(divergence, Divergence, "divergence")
        self.model = model
        self.samples = samples
        self.divergence = divergence
        self.t_min = model.sde.t_min if t_min is None else t_min
        check_t_min(self.t_min, model.sde.T)

    def __call__(
        self,
        x: Tensor,
        /,
        *,
        mask: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Bound:
        """Return the bound for data x (B, *D).

        Args:
            x: the data (B, *D).
            mask: the elements to bound the density of, booleans or 0 and 1, (B, *D) or with sizes
                of 1; the data may have any value where it is 0, NaN included.
            generator: the source of times and noise: one, one for each sample, or None.
            cond: passed to the model.

        Raises:
            ValueError: if x is empty, not finite or outside the model's data_range, sigma is 0 at
                t_min or alpha at T, a prediction is not finite (checked on the CPU only), or the
                mask does not fit or has other numbers than 0 and 1.
            TypeError: if x is not a floating-point tensor.
        """
        check_gradients_averaged(self.model)
        check_state(x)
        if mask is not None:
            mask, x = kept(mask, x)
        check_finite(x)
        check_range(x, self.model, mask=mask)
        check_generator(generator, len(x))
        sde, d = self.model.sde, count(x, mask)
        alphas, sigmas, span = self._ends(sde, x.device)
        z, floor = float(span.length), float(span.floor)
        squares = exact(x).reshape(len(x), -1).square().sum(1)
        spread = sde.prior_std**2
        prior = (alphas[2] ** 2 * squares + d * sigmas[2] ** 2) / (2 * spread)
        prior = prior + 0.5 * d * math.log(2 * math.pi * spread)
        # Beyond the floor, if alpha(T) = 0, the integrals of f and of g^2 |score|^2 / 2 diverge;
        # their sum is the change of log(sigma).
        rest = math.log(alphas[0] / alphas[1]) + math.log(sigmas[1] / sigmas[2])
        drift = torch.zeros_like(prior) + d * rest

        last = torch.full((len(x),), self.t_min, dtype=schedule_dtype(x.device), device=x.device)
        draws = min(self.samples, max(2, math.ceil(self.samples / 10)))
        # One sequence in the order of time: each draw's neighbors predict its noise.
        errors = SquaredErrors(draws + self.samples, mask)
        for _ in range(draws):
            self._add_error(errors, x, last, generator, cond, mask)

        def rates(strata: Strata, errors: SquaredErrors) -> Tensor:
            return self._rates(strata, errors, x, last, span, generator, cond, mask)

        pilot = pilot_draws(self.samples) if self.divergence is None else 0
        strata, share = Strata.equal(self.samples - pilot, last), 0.25 * pilot / self.samples
        extra, uncertain = torch.zeros_like(prior), torch.zeros_like(prior)
        if pilot:
            # A part of the draws measures where the others are needed. Its weight is fixed, and
            # small, since its own draws are not placed as well.
            first = Strata.equal(pilot, last)
            found = rates(first, SquaredErrors(pilot, mask))
            extra, uncertain = share * first.integral(found), first.variance(found.detach())
            strata = Strata.by_noise(self.samples - pilot, found.detach())
        found = rates(strata, errors)
        values = errors.values()
        # E |eps|^2 = d is exact.
        small = 0.5 * (values[:draws] - d)
        integral = extra + (1 - share) * strata.integral(found)
        path_mean = 0.5 * (z * integral - (float(span.first) - floor) * d)
        smallest_time = small.mean(0) - d * math.log(alphas[0])
        stderr = None
        if self.samples > 1:
            path = share**2 * uncertain + (1 - share) ** 2 * strata.variance(found.detach())
            stderr = torch.sqrt((0.5 * z) ** 2 * path + small.detach().var(0) / draws)
        return Bound(
            nats=prior + path_mean + drift + smallest_time,
            prior=prior,
            path=path_mean,
            drift=drift,
            smallest_time=smallest_time,
            stderr=stderr,
            t_min=self.t_min,
        )

    def _ends(
        self, sde: ForwardSDE, device: torch.device
    ) -> tuple[list[float], list[float], LogSNRSpan]:
        """Return alpha and sigma at t_min, at the floor of the log-SNRs and at T, and these.

        The floor is T where alpha(T) > 0.
        """
        at = torch.tensor([self.t_min, sde.T], dtype=schedule_dtype(device), device=home(sde))
        with torch.no_grad():
            span = LogSNRSpan(*sde.log_snr(at).tolist())
            first, last, floor = float(span.first), float(span.last), float(span.floor)
            # Sliced score matching divides noise by alpha there.
            check_log_snr((first, floor if self.divergence is None else last), self.t_min, sde.T)
            middle = at[1:] if floor == last else sde.time_at_log_snr(at.new_tensor([floor]))
            alphas, sigmas = sde.marginal(torch.cat([at[:1], middle, at[1:]]))
        return alphas.tolist(), sigmas.tolist(), span

    def _rates(
        self,
        strata: Strata,
        errors: SquaredErrors,
        x: Tensor,
        last: Tensor,
        span: LogSNRSpan,
        generator: Generators,
        cond: dict[str, Any],
        mask: Tensor | None,
    ) -> Tensor:
        """Return the integrand over the density of the log-SNRs, one draw per stratum (n, B)."""
        sde, sliced = self.model.sde, []
        for k in range(len(strata.widths)):
            u = rand(len(x), generator=generator, device=x.device, dtype=last.dtype)
            t = sde.time_at_log_snr(span.at(strata.draw(k, u))).clamp(self.t_min, sde.T)
            share = span.share(sde.log_snr(t).detach()).expand(len(x))
            if self.divergence is None:
                self._add_error(errors, x, t, generator, cond, mask, share)
            else:
                rate = self._sliced(self.divergence, x, t, generator, cond, mask)
                sliced.append((rate + count(x, mask)) / share)
        return torch.stack(sliced) if sliced else errors.values()[-len(strata.widths) :]

    def _sliced(
        self,
        divergence: Divergence,
        x: Tensor,
        t: Tensor,
        generator: Generators,
        cond: dict[str, Any],
        mask: Tensor | None,
    ) -> Tensor:
        """Return sigma^2 times the bracketed term of the integral (B,), without denoising."""
        sample = self.model.sde.perturb(x, t, generator=generator)
        state = divergence.start(sample.x, generator)

        def noise(y: Tensor) -> Tensor:
            return zeroed(self.model.predict(y, t, **cond).eps, mask)

        with torch.no_grad():
            eps, trace = divergence(noise, sample.x, state)
        _check(eps, t)
        square = exact(eps).reshape(len(x), -1).square().sum(1)
        return square - 2 * exact(sample.sigma) * exact(trace).mean(0)

    def _add_error(
        self,
        errors: SquaredErrors,
        x: Tensor,
        t: Tensor,
        generator: Generators,
        cond: dict[str, Any],
        mask: Tensor | None,
        share: Tensor | None = None,
    ) -> None:
        """Append the error of the predicted noise at times t (B,), over the root of the share."""
        sample = self.model.sde.perturb(x, t, generator=generator)
        truth = Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
        error = zeroed(self.model.predict(sample.x, t, **cond).noise_error(truth), mask)
        _check(error, t)
        if share is not None:
            # Before the control variates, whose coefficients are those of neighbors: they have to
            # fall with the integrand, not with the squared error.
            error = scaled(share.rsqrt(), exact(error))
        errors.add(error, sample.eps)


def _check(value: Tensor, t: Tensor) -> None:
    """Raise if a prediction is not finite, naming the time."""
    if readable(value):
        bad = ~torch.isfinite(value.detach()).reshape(len(t), -1).all(1)
        if bool(bad.any()):
            raise ValueError(
                f"model: expected a finite prediction, got NaN or infinity at t = {t[bad][0]:g}"
            )
