"""The variational bound of a discrete chain as an objective, alone or with the simple loss."""

from __future__ import annotations

import abc
import math
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._chain_terms import chain_length, step_nats
from .._checks import check_finite, check_part, check_positive, check_state, readable
from ..decoders import GaussianDecoder
from ..interfaces import Perturbed, ScoreModel, TimeSampler
from ..random import Generators
from ..values import Prediction
from .discrete_times import DiscreteTimes
from .times import times_and_weights


class _ChainObjective(abc.ABC):
    """An objective that samples one step of the chain for each sample of the batch."""

    def __init__(
        self, *, decoder: GaussianDecoder | None = None, times: TimeSampler | None = None
    ) -> None:
        self.decoder = GaussianDecoder() if decoder is None else decoder
        self.times = DiscreteTimes() if times is None else times
        check_part(self.decoder, GaussianDecoder, "decoder")
        check_part(self.times, TimeSampler, "times")

    def __call__(
        self,
        model: ScoreModel,
        x0: Tensor,
        *,
        t: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """Return the losses (B,) of data x0 (B, *D).

        Args:
            model: the score model; `model.sde` is a discrete chain.
            x0: the data (B, *D), on the decoder's levels.
            t: times (B,) of steps, with weight 1; drawn from the time sampler by default.
            generator: the generator of times and noise.
            cond: conditions, passed to the model.

        Raises:
            ValueError: if the batch is empty or not finite, data lie between levels, or times
                between steps.
            TypeError: if x0 is not a floating-point tensor, or the process is not a chain.
        """
        count = chain_length(model)
        check_state(x0, "x0")
        check_finite(x0, "x0")
        self.decoder.check(x0)
        sde = model.sde
        t, weight = times_and_weights(self.times, sde, x0, t, generator)
        point = (t * count).round()
        if readable(t) and not bool(
            ((point - t * count).abs() < 0.01).all() and (point >= 1).all()
        ):
            raise ValueError(
                f"t: expected times of steps, 1 / {count}, 2 / {count} ... 1, got {t.tolist()[:4]}"
            )
        sample = sde.perturb(x0, t, generator=generator)
        prediction = model.predict(sample.x, t, **cond)
        loss = self._loss(model, sample, prediction, point.long() - 1)
        self.times.update(t, loss.detach())
        return loss * weight.to(loss.dtype)

    @abc.abstractmethod
    def _loss(
        self, model: ScoreModel, sample: Perturbed, prediction: Prediction, step: Tensor
    ) -> Tensor:
        """Return the losses (B,) of a prediction at steps (B,), numbered from 0."""

    def _bits(
        self,
        model: ScoreModel,
        sample: Perturbed,
        prediction: Prediction,
        step: Tensor,
        *,
        detach_mean: bool = False,
    ) -> Tensor:
        """Return T times the terms of the steps (B,), in bits per dimension."""
        nats = step_nats(model, prediction, sample.x0, step, self.decoder, detach_mean=detach_mean)
        return nats * (chain_length(model) / (sample.x0[0].numel() * math.log(2)))


class VLB(_ChainObjective):
    r"""The variational bound of a chain of T steps, in bits per dimension, at one step per sample.

    .. math::
        \ell = \frac{T}{d \ln 2} L_i, \quad
        L_0 = -\log p(x_0 | x_1), \quad
        L_i = KL(q(x_i | x_{i+1}, x_0) \,\|\, p(x_i | x_{i+1})),

    with i uniform over the steps, numbered from 0. The factor T makes the expected loss the sum
    over all steps: the bound without its prior term, which has no parameters. T is the number of
    steps of `model.sde`; to train on fewer steps, pass a model of the respaced chain.

    Args:
        decoder: the likelihood of the data at step 0, for 256 levels in [-1, 1] by default.
        times: the distribution of the steps, `DiscreteTimes` by default.

    Raises:
        TypeError: if a part has the wrong type.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (equations 4 to 7).

    >>> from diffusionkit import DDPMChain, EpsModel
    >>> model = EpsModel(lambda x, noise_label: torch.cat([x, x], 1), DDPMChain.cosine(100),
    ...                  variance="learned_range")
    >>> x0 = GaussianDecoder().encode(torch.randint(256, (4, 3, 8, 8)))
    >>> VLB()(model, x0).shape
    torch.Size([4])
    """

    @override
    def __repr__(self) -> str:
        return f"VLB(decoder={self.decoder}, times={self.times})"

    @override
    def _loss(
        self, model: ScoreModel, sample: Perturbed, prediction: Prediction, step: Tensor
    ) -> Tensor:
        return self._bits(model, sample, prediction, step)


class HybridLoss(_ChainObjective):
    r"""The simple loss, which trains the mean, plus the bound, which trains the variance.

    .. math::
        \ell = \frac1d \|\hat\epsilon - \epsilon\|^2 + \lambda \, \ell_{VLB}

    with the mean detached in the loss of `VLB`, so that only the simple loss trains the mean and
    only the bound trains the variance. Since `VLB` estimates the sum over all T steps, in bits per
    dimension, lambda does not depend on T.

    Args:
        vlb_weight: lambda.
        decoder: the likelihood of the data at step 0, for 256 levels in [-1, 1] by default.
        times: the distribution of the steps, `DiscreteTimes` by default.

    Raises:
        TypeError: if a part has the wrong type.
        ValueError: if vlb_weight is not finite and positive; when called, if the model's variance
            is not learned.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (equation 16).
    """

    def __init__(
        self,
        vlb_weight: float = 1e-3,
        *,
        decoder: GaussianDecoder | None = None,
        times: TimeSampler | None = None,
    ) -> None:
        """Check the parts and the weight."""
        super().__init__(decoder=decoder, times=times)
        check_positive(vlb_weight, "vlb_weight")
        self.vlb_weight = vlb_weight

    @override
    def __repr__(self) -> str:
        return f"HybridLoss({self.vlb_weight}, decoder={self.decoder}, times={self.times})"

    @override
    def _loss(
        self, model: ScoreModel, sample: Perturbed, prediction: Prediction, step: Tensor
    ) -> Tensor:
        if prediction.log_var is None and prediction.log_var_fraction is None:
            raise ValueError(
                "model: expected a learned variance, as in EpsModel(..., "
                'variance="learned_range"), got none; use ScoreMatching() for a fixed one'
            )
        # The data, too: at alpha = 0 the noise does not determine them.
        target = Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
        bits = self._bits(model, sample, prediction, step, detach_mean=True)
        error = prediction.noise_error(target).to(bits.dtype)
        return error.square().reshape(len(error), -1).mean(1) + self.vlb_weight * bits
