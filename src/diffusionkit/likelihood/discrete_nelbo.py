"""The variational bound on the probability of discrete data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._chain_terms import prior_kl
from .._checks import check_count, check_part, readable
from .._coefficients import scaled
from .._masks import kept_levels, zeroed
from .._model_checks import check_model
from .._precision import network_dtype, state_dtype
from .._repr import Described
from .._schedules import exact, schedule_dtype
from ..decoders import LevelDecoder
from ..distributed._gradients import check_gradients_averaged
from ..interfaces import ForwardSDE, ScoreModel
from ..random import Generators, rand
from ..values import Prediction
from ._control_variates import SquaredErrors
from ._strata import Strata


@dataclass(frozen=True, slots=True, eq=False)
class DiscreteBound:
    """An estimate of a bound on -log P(images), term by term.

    Args:
        reconstruction: the negative log-likelihood of the levels given the state at t_min (B,),
            nats.
        prior: the KL divergence of the state at T from the prior (B,), nats.
        diffusion: the denoising term (B,), nats.
        stderr: the Monte Carlo standard error of the bound (B,), None for one draw; too large where
            the terms of few steps change much from one to the next.
    """

    reconstruction: Tensor
    prior: Tensor
    diffusion: Tensor
    stderr: Tensor | None = None

    @property
    def nats(self) -> Tensor:
        """The bound, the sum of the terms (B,), nats."""
        return self.reconstruction + self.prior + self.diffusion


class DiscreteNELBO(Described):
    r"""The variational bound on -log P(images) of integers, without dequantization or offset.

    .. math::
        -\log P(k) \le E[-\log p(k \mid z_0)] + KL(q(z_1 \mid x) \,\|\, N(0, \pi^2 I))
        + \tfrac12 \int \frac{g^2}{\sigma^2} E\|\epsilon - \hat\epsilon\|^2\, dt

    for data x at the centers of the levels k, with z_0 the state at t_min and z_1 that at T. With
    `steps` the process is a chain of N equal time steps, and the last term is

    .. math::
        \tfrac{N}{2} E[\mathrm{expm1}(\mathrm{log\,snr}_s - \mathrm{log\,snr}_t)
        \|\epsilon - \hat\epsilon\|^2], \quad t - s = (T - t_{min}) / N.

    Each call draws one time per sample. With a single generator, or none, the times are evenly
    spaced over the batch, u_i = (u_0 + i / B) mod 1, which lowers the variance of the mean; with
    one generator per sample they are independent. Several times per sample are stratified, and
    from ten on control variates from neighboring draws remove much of the variance and add no bias,
    as in `NELBO`. The bound is differentiable, for training and evaluation. Any process works whose
    noise at t_min is below the width of a level. A mask restricts the bound to the elements that it
    keeps, as that of `NELBO` does.

    Args:
        model: the score model; its SDE is the process.
        decoder: the likelihood of the levels given the state at t_min; 256 levels in [-1, 1] by
            default.
        steps: the number N of steps, or None for continuous time.
        samples: the number of times and noises drawn for each sample. For the reconstruction a
            tenth as many are drawn, but at least two; one if samples is one.

    Raises:
        TypeError: if a part has the wrong type.
        ValueError: if steps < 1 or samples < 1.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (equations 11 to
    19, appendix I.1).

    >>> import torch
    >>> from diffusionkit import (
    ...     DiscreteNELBO, EpsModel, LogSNRSDE, LogSigmaLabel
    ... )
    >>> network = lambda x, noise_label: x
    >>> model = EpsModel(network, LogSNRSDE(), label=LogSigmaLabel())
    >>> DiscreteNELBO(model)(torch.randint(256, (4, 3, 8, 8))).nats.shape
    torch.Size([4])
    """

    def __init__(
        self,
        model: ScoreModel,
        decoder: LevelDecoder | None = None,
        *,
        steps: int | None = None,
        samples: int = 1,
    ) -> None:
        check_model(model)
        self.model = model
        self.decoder = LevelDecoder() if decoder is None else decoder
        check_part(self.decoder, LevelDecoder, "decoder")
        if steps is not None:
            check_count(steps, "steps")
        check_count(samples, "samples")
        self.steps = steps
        self.samples = samples

    def __call__(
        self,
        images: Tensor,
        /,
        *,
        mask: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> DiscreteBound:
        """Return the terms of the bound, each (B,), for images (B, *D).

        Args:
            images: integers 0 ... levels - 1, (B, *D), of any integer dtype.
            mask: the pixels to bound the probability of, booleans or 0 and 1, (B, *D) or with sizes
                of 1.
            generator: the source of times and noise.
            cond: passed to the model.

        Raises:
            TypeError: if images are not integers.
            ValueError: if a value is not a level, a prediction is not finite (checked on the CPU
                only), or the mask does not fit or has other numbers than 0 and 1.
        """
        check_gradients_averaged(self.model)
        if mask is not None:
            mask, images = kept_levels(mask, images)
        x = self.decoder.encode(images, dtype=state_dtype(network_dtype(self.model)))
        x = zeroed(x, mask)
        sde = self.model.sde
        first = x.new_full((len(x),), sde.t_min)
        draws = min(self.samples, max(2, math.ceil(self.samples / 10)))
        reads = []
        for _ in range(draws):
            least = sde.perturb(x, first, generator=generator)
            log_prob = self.decoder.log_prob(images, least.x, least.alpha, least.sigma, mask=mask)
            reads.append(-log_prob)
        read, prior = torch.stack(reads), prior_kl(sde, x, mask)
        values = self._diffusion(x, generator, cond, mask)
        stderr = None
        if self.samples > 1:
            variance = Strata.equal(self.samples, values[0]).variance(values.detach())
            stderr = torch.sqrt(variance + exact(read.detach()).var(0) / draws)
        mean = read.mean(0) if draws > 1 else reads[0]  # of one to the bit, the sign of 0 included
        return DiscreteBound(mean, prior, values.mean(0), stderr)

    def _diffusion(
        self, x: Tensor, generator: Generators, cond: dict[str, Any], mask: Tensor | None
    ) -> Tensor:
        """Return one value of the denoising term for each draw (samples, B)."""
        if self.samples == 1:
            error, weight, _ = self._error(x, 0, generator, cond, mask)
            return (0.5 * weight * _total_square(error)).unsqueeze(0)
        errors = SquaredErrors(self.samples, mask)
        for k in range(self.samples):
            error, weight, eps = self._error(x, k, generator, cond, mask)
            # Before the control variates, whose coefficients are those of neighbors.
            errors.add(scaled(torch.sqrt(0.5 * weight), exact(error)), eps)
        return errors.values()

    def _error(
        self, x: Tensor, k: int, generator: Generators, cond: dict[str, Any], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the error (B, *D) of draw k, the weight (B,) of half its square, and the noise."""
        sde = self.model.sde
        t, weight = self._times(sde, x, k, generator)
        sample = sde.perturb(x, t, generator=generator)
        target = Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
        prediction = self.model.predict(sample.x, t, **cond)
        error = zeroed(prediction.noise_error(target), mask)
        if self.steps is not None and readable(weight) and bool((ends := weight.isinf()).any()):
            # At alpha = 0 the noise has no error; weight and error are those of the data.
            step = (sde.T - sde.t_min) / self.steps
            weight = torch.where(ends, self.steps * torch.exp(sde.log_snr(exact(t) - step)), weight)
            of_data = zeroed(sample.x0 - prediction.x0, mask)
            error = torch.where(ends.view(-1, *(1,) * (x.ndim - 1)), of_data, error)
        finite = torch.isfinite(error.detach()).reshape(len(x), -1).all(1)
        if readable(error) and not bool(finite.all()):
            raise ValueError(
                "model: expected a finite prediction, got NaN or infinity at "
                f"t = {float(t[~finite][0]):g}"
            )
        return error, weight, sample.eps

    def _times(
        self, sde: ForwardSDE, x: Tensor, k: int, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """Return times (B,) in stratum k, and the weights (B,) of half the squared error."""
        n, dtype = len(x), schedule_dtype(x.device)
        shared = generator is None or isinstance(generator, torch.Generator)
        u = rand(1 if shared else n, generator=generator, device=x.device, dtype=dtype)
        if shared:
            u = (u + torch.arange(n, device=x.device, dtype=dtype) / n) % 1.0
        u = (k + u) / self.samples
        span = sde.T - sde.t_min
        if self.steps is None:
            t = sde.t_min + span * u
            weight = span * (sde.diffusion(t) / sde.marginal(t)[1]).square()
        else:
            step = torch.floor(u * self.steps)
            s, t = (sde.t_min + span * (step + i) / self.steps for i in (0, 1))
            weight = self.steps * torch.expm1(sde.log_snr(s) - sde.log_snr(t))
        return t.to(x.dtype), weight


def _total_square(x: Tensor) -> Tensor:
    """Return the sum of squares of each sample (B,), in float64."""
    return exact(x).square().reshape(len(x), -1).sum(1)


def variance_minimizing_backward(
    loss: Tensor, diffusion: Tensor, interior: Iterable[torch.nn.Parameter]
) -> None:
    r"""Backpropagate a loss, and train the schedule's interior to minimize its variance.

    All other parameters get the gradient of `loss`; those of the interior get

    .. math::
        \nabla_\eta \tfrac1B \sum_i \ell_i^2,

    the gradient of the variance of the diffusion terms, since in continuous time their mean does
    not depend on the interior. In a chain of steps it does: use `loss.backward()` there. The cost
    is one additional backward pass, down to the state only.

    Args:
        loss: the loss, a scalar, best per dimension to keep gradients moderate.
        diffusion: the diffusion terms (B,), in the same units.
        interior: the parameters of the schedule between its end points.

    Raises:
        RuntimeError: if the diffusion terms do not depend on a parameter of the interior.

    Source: Kingma et al., Variational Diffusion Models, 2021, arXiv 2107.00630 (appendix H).

    >>> import torch
    >>> from diffusionkit import (
    ...     DiscreteNELBO, EpsModel, LearnedSDE, LogSigmaLabel,
    ...     variance_minimizing_backward
    ... )
    >>> from diffusionkit.networks import MLP
    >>> model = EpsModel(MLP(2), LearnedSDE(), label=LogSigmaLabel())
    >>> bound = DiscreteNELBO(model)(torch.randint(256, (8, 2)))
    >>> loss, diffusion = bound.nats.mean() / 2, bound.diffusion / 2
    >>> variance_minimizing_backward(loss, diffusion, model.sde.interior())
    """
    parameters = list(interior)
    gradients = torch.autograd.grad(diffusion.square().mean(), parameters, retain_graph=True)
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None  # or the loss would accumulate into it in place
    loss.backward()  # type: ignore[no-untyped-call]
    for p, old, new in zip(parameters, before, gradients, strict=True):
        p.grad = new if old is None else old + new
