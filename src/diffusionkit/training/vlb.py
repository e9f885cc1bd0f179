"""The variational bound of a discrete chain as an objective, alone or with the simple loss."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._chain_terms import chain_length, step_nats
from .._checks import (
    can_be_read,
    check_finite,
    check_part,
    check_positive,
    check_state,
    readable,
    sums_finitely,
)
from .._data_range import check_training_data
from .._masks import masked, mean, total, zeroed
from .._repr import Described
from ..decoders import GaussianDecoder
from ..distributed._gradients import check_gradients_averaged
from ..interfaces import Perturbed, ScoreModel, TimeSampler
from ..random import Generators
from ..values import Prediction
from .discrete_times import DiscreteTimes
from .times import times_and_weights, weighted_losses


class _ChainObjective(Described, abc.ABC):
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
        /,
        *,
        mask: Tensor | None = None,
        t: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """Return the losses (B,) of data x0 (B, *D).

        Args:
            model: the score model; `model.sde` is a discrete chain.
            x0: the data (B, *D), on the decoder's levels.
            mask: booleans or weights >= 0 of the elements, (B, *D) or with sizes of 1: the loss is
                the mean over them. The data are set to 0 where it is 0, whatever their value.
            t: times (B,) of steps, with weight 1; drawn from the time sampler by default.
            generator: the generator of times and noise.
            cond: conditions, passed to the model.

        Raises:
            ValueError: if the batch is empty, not finite or outside the model's data_range, data
                lie between levels, or times between steps; a mask has no entry > 0; or the model
                predicts the noise where alpha = 0.
            TypeError: if x0 is not a floating-point tensor, or the process is not a chain.
        """
        count = chain_length(model)
        check_gradients_averaged(model)
        check_state(x0, "x0")
        if mask is not None:
            mask, x0 = masked(mask, x0, self.decoder.low)
        check_finite(x0, "x0")
        if can_be_read(x0):
            check_training_data(x0, model, mask)
        self.decoder.check(x0)
        x0 = zeroed(x0, mask)
        sde = model.sde
        t, weight = times_and_weights(self.times, sde, x0, t, generator)
        point = (t * count).round()
        if readable(t) and not bool((((point - t * count).abs() < 0.01) & (point >= 1)).all()):
            raise ValueError(
                f"t: expected times of steps, 1 / {count}, 2 / {count} ... 1, got {t.tolist()[:4]}"
            )
        sample = sde.perturb(x0, t, generator=generator)
        prediction = model.predict(sample.x, t, **cond)
        loss = self._loss(model, sample, prediction, point.long() - 1, mask)
        if (
            readable(loss)
            and not sums_finitely(loss)
            and bool((bad := (sample.alpha == 0) & ~torch.isfinite(loss)).any())
        ):
            raise ValueError(
                "model: expected a finite loss, got NaN or infinity at t = "
                f"{float(t[bad][0]):g}, where alpha = 0: there a prediction of the noise does not "
                "determine the data; predict x0 or v"
            )
        self.times.update(t, loss.detach())
        return weighted_losses(loss, weight)

    @abc.abstractmethod
    def _loss(
        self,
        model: ScoreModel,
        sample: Perturbed,
        prediction: Prediction,
        step: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the losses (B,) of a prediction at steps (B,), numbered from 0."""

    def _bits(
        self,
        model: ScoreModel,
        sample: Perturbed,
        prediction: Prediction,
        step: Tensor,
        mask: Tensor | None,
        *,
        detach_mean: bool = False,
    ) -> Tensor:
        """Return T times the terms of the steps (B,), in bits per dimension."""
        nats = step_nats(
            model, prediction, sample.x0, step, self.decoder, detach_mean=detach_mean, mask=mask
        )
        d = sample.x0[0].numel() if mask is None else total(mask)
        return nats * (chain_length(model) / math.log(2)) / d


class VLB(_ChainObjective):
    r"""The variational bound of a chain of T steps, in bits per dimension, at one step per sample.

    .. math::
        \ell = \frac{T}{d \ln 2} L_i, \quad
        L_0 = -\log p(x_0 | x_1), \quad
        L_i = KL(q(x_i | x_{i+1}, x_0) \,\|\, p(x_i | x_{i+1})),

    with i uniform over the steps, numbered from 0. The factor T makes the expected loss the sum
    over all steps: the bound without its prior term, which has no parameters. T is the number of
    steps of `model.sde`; to train on fewer steps, pass a model on the respaced chain.

    Args:
        decoder: the likelihood of the data at step 0, for 256 levels in [-1, 1] by default.
        times: the distribution of the steps, `DiscreteTimes` by default.

    Raises:
        TypeError: if a part has the wrong type.

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (equations 4 to 7).

    >>> import torch
    >>> from diffusionkit import VLB, DDPMChain, EpsModel, GaussianDecoder
    >>> network = lambda x, noise_label: torch.cat([x, x], 1)
    >>> chain = DDPMChain.cosine(100)
    >>> model = EpsModel(network, chain, variance="learned_range")
    >>> x0 = GaussianDecoder().encode(torch.randint(256, (4, 3, 8, 8)))
    >>> VLB()(model, x0).shape
    torch.Size([4])
    """

    @override
    def _loss(
        self,
        model: ScoreModel,
        sample: Perturbed,
        prediction: Prediction,
        step: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        return self._bits(model, sample, prediction, step, mask)


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
    def _loss(
        self,
        model: ScoreModel,
        sample: Perturbed,
        prediction: Prediction,
        step: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        if prediction.log_var is None and prediction.log_var_fraction is None:
            raise ValueError(
                "model: expected a learned variance, as in EpsModel(..., "
                'variance="learned_range"), got none; use ScoreMatching() for a fixed one'
            )
        # The data, too: at alpha = 0 the noise does not determine them.
        target = Prediction(sample.x, sample.x0, sample.eps, sample.alpha, sample.sigma)
        bits = self._bits(model, sample, prediction, step, mask, detach_mean=True)
        error = prediction.noise_error(target).to(bits.dtype)
        return mean(error.square(), mask) + self.vlb_weight * bits
