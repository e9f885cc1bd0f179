"""The score-matching objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._batch_conditions import for_batch
from .._checks import (
    can_be_read,
    check_finite,
    check_part,
    check_reference,
    check_state,
    check_times,
    readable,
    sums_finitely,
)
from .._data_range import check_range, check_training_data
from .._keywords import explained
from .._masks import common, masked, mean, total
from .._model_checks import check_model
from .._ones import product
from .._repr import Described
from .._tracing import traced
from ..distributed._gradients import check_gradients_averaged
from ..interfaces import ForwardSDE, ScoreModel, TargetEstimator, TimeSampler, Weighting
from ..random import Generators
from ..values import Prediction
from ._output_weights import channel_weighted, limits, output_weights, reaches_noise
from .targets import DenoisingTarget
from .times import UniformTimes, times_and_weights, weighted_losses
from .weighting import LikelihoodWeighting, SimpleWeighting


@explained
class ScoreMatching(Described):
    r"""The weighted error of a model's noise prediction, one loss for each sample.

    .. math::
        \ell_i = w(t_i) \frac{1}{d} \|\hat\epsilon(x_i, t_i) - \epsilon_i\|^2, \quad
        x = \alpha x_0 + \sigma \epsilon,

    with w the weighting times the time sampler's weight, and the mean over the d dimensions of
    a sample. The error is computed in the model's own parameterization, which loses no digits at
    any noise level; where a weight is infinite and the error zero, as for `VModel` at alpha = 0,
    the loss is the finite limit. If a network's output is not finite, neither is the loss;
    `clipped_step` skips and reports such a step.

    Args:
        weighting: the weight of the noise-prediction error, `SimpleWeighting` by default.
        target: the regression target, `DenoisingTarget` by default.
        times: the distribution of training times, `UniformTimes` by default.

    Raises:
        TypeError: if a part has the wrong type.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.

    >>> import torch
    >>> from diffusionkit import VPSDE, EpsModel, ScoreMatching
    >>> model = EpsModel(lambda x, noise_label: 0 * x, VPSDE())
    >>> ScoreMatching()(model, torch.randn(8, 3)).shape
    torch.Size([8])
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        *,
        target: TargetEstimator | None = None,
        times: TimeSampler | None = None,
    ) -> None:
        """Check the parts; the defaults are DDPM's simple loss in continuous time."""
        self.weighting = SimpleWeighting() if weighting is None else weighting
        self.target = DenoisingTarget() if target is None else target
        self.times = UniformTimes() if times is None else times
        check_part(self.weighting, Weighting, "weighting")
        check_part(self.target, TargetEstimator, "target")
        check_part(self.times, TimeSampler, "times")

    def nats(
        self,
        model: ScoreModel,
        x0: Tensor,
        /,
        *,
        reference: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        r"""Return the likelihood-weighted losses of data x0 (B, *D) in nats, (B,).

        .. math::
            \tfrac12 \int_{t_{min}}^T g^2
            \|s_\theta - \nabla \log p(x_t | x_0)\|^2 \, dt
            = \tfrac{d}{2} (T - t_{min}) \, E[\ell]

        an unbiased estimate of the trainable term of the bound on -log p of the SDE model, d the
        sum of the mask if there is one. `NELBO` computes the whole bound.

        Raises:
            TypeError: if the weighting is not `LikelihoodWeighting`.
            ValueError: if the times are not `unbiased`, and as `__call__` does.

        Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021,
        arXiv 2101.09258 (theorems 1 and 3).
        """
        if not isinstance(self.weighting, LikelihoodWeighting):
            raise TypeError(
                "weighting: expected LikelihoodWeighting(), without which the loss is not in nats, "
                f"got {self.weighting}"
            )
        if not self.times.unbiased:
            raise ValueError(
                "times: expected a sampler whose weighted mean is that over uniform times, such as "
                f"ImportanceTimes(), got {self.times}"
            )
        loss = self(
            model,
            x0,
            reference=reference,
            reference_class_labels=reference_class_labels,
            mask=mask,
            generator=generator,
            **cond,
        )
        sde = model.sde
        d = x0[0].numel() if mask is None else total(mask.to(loss.dtype).expand_as(x0))
        return 0.5 * (sde.T - sde.t_min) * d * loss

    def __call__(
        self,
        model: ScoreModel,
        x0: Tensor,
        /,
        *,
        reference: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        mask: Tensor | None = None,
        t: Tensor | None = None,
        eps: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """Return the losses (B,) of data x0 (B, *D).

        Args:
            model: the score model, with the process `model.sde`.
            x0: the data (B, *D).
            reference: reference data (n, *D), for targets that use them.
            reference_class_labels: the class labels (n,) of the reference data.
            mask: booleans or weights >= 0 of the elements, (B, *D) or with sizes of 1, such as
                (B, 1, H, W): the loss is sum(mask * error^2) / sum(mask). The data are set to 0
                where it is 0, whatever their value, NaN included. With reference data, one mask
                for all samples, (1, *D): the target is then that of the elements it keeps.
            t: times (B,), in [0, T], with weight 1; drawn from the time sampler by default.
            eps: noise (B, *D) that belongs to the data, as in reflow and in couplings by optimal
                transport; standard normal by default, the only noise with which the model learns
                the score. Any other changes the probability flow alone, see `optimal_coupling`.
            generator: the generator of times and noise.
            cond: conditions, passed to the model and to the target.

        Raises:
            ValueError: if the batch is empty, not finite or outside the model's data_range; the
                shapes, dtypes or devices of data and reference differ; a mask has no entry > 0, or
                differs between samples although there are reference data; a part returns another
                shape than the interface's; the loss is infinite although the model's output is
                not; or its network is trained by a DistributedDataParallel that the model does not
                call.
            TypeError: if x0 is not a floating-point tensor, model is not a ScoreModel, or is
                wrapped where its network should be.
        """
        check_model(model)
        check_gradients_averaged(model)
        check_state(x0, "x0")
        if mask is not None:
            if reference is not None:
                reference = common(mask, reference)
            mask, x0 = masked(mask, x0)
        free = readable(x0)
        if free and not sums_finitely(x0):
            check_finite(x0, "x0")
        if free or can_be_read(x0):
            check_training_data(x0, model, mask)
        if cond:
            cond = for_batch(cond, x0.shape[0])
        if reference is not None:
            check_reference(reference, x0)
            check_range(reference, model, "reference", None if mask is None else mask[:1])
        sde = model.sde
        t, weight = times_and_weights(self.times, sde, x0, t, generator)
        # Without eps if there is none: a user's process may not have the argument.
        given = {} if eps is None else {"eps": eps}
        sample = sde.perturb(x0, t, **given, generator=generator)
        target_cond = dict(cond)
        if reference_class_labels is not None:
            target_cond["reference_class_labels"] = reference_class_labels
        target = self.target(sample, reference, **target_cond)
        prediction = model.predict(sample.x, t, **cond)
        squares = prediction.squared_error(target)
        if (per_channel := getattr(self.weighting, "per_channel", None)) is not None:
            squares = channel_weighted(squares, per_channel(sde, t), self.weighting)
        squares = mean(squares, mask)
        weights = output_weights(self.weighting, sde, prediction, t)
        if weights is None:
            weighted = squares if weight is None else weighted_losses(squares, weight)
        else:
            if not free and _may_be_infinite(sde):
                weights = limits(weights, self.weighting, sde, prediction, t)
            both = weights if weight is None else product(weights, weight)
            weighted = weighted_losses(squares, both)
        if free and not sums_finitely(weighted):
            if weights is not None:
                weights = limits(weights, self.weighting, sde, prediction, t)
            loss = weighted_losses(squares, weights)
            weighted = weighted_losses(loss, weight)
            self._check(sde, weighted, loss, prediction, target, t)
        if type(self.times).update is not TimeSampler.update:
            self.times.update(t, weighted_losses(squares.detach(), weights))
        return weighted

    def _check(
        self,
        sde: ForwardSDE,
        weighted: Tensor,
        loss: Tensor,
        prediction: Prediction,
        target: Prediction,
        t: Tensor,
    ) -> None:
        """Raise if losses are not finite although the model's output is."""
        if sums_finitely(weighted):
            return
        check_times(t.detach().clone(), sde.T)  # from a sampler, of a process that returned NaN
        for name, value, part in (("x0", target.x0, self.target), ("eps", target.eps, self.target)):
            if bool((bad := ~_finite(value)).any()):
                raise ValueError(
                    f"target: expected finite {name}, got NaN or infinity at "
                    f"t = {float(t[bad][0]):g} from {part}; return both x0 and eps where one does "
                    "not determine the other"
                )
        error = prediction.output_error(target)
        if bool((bad := _finite(error) & ~torch.isfinite(loss)).any()):
            raise ValueError(
                "weighting: expected a finite loss, got an infinite weight of the model's "
                f"error at t = {float(t[bad][0]):g} with {self.weighting}; end the times "
                "earlier, or use a weighting or a parameterization that is finite there"
            )
        if bool((bad := torch.isfinite(loss) & ~torch.isfinite(weighted)).any()):
            raise ValueError(
                f"times: expected finite weights, got others at t = {float(t[bad][0]):g} from "
                f"{self.times}"
            )


def _may_be_infinite(sde: ForwardSDE) -> bool:
    """Return whether a weight may be infinite, where the loss cannot be read."""
    if traced():
        return True
    return reaches_noise(sde)


def _finite(x: Tensor) -> Tensor:
    """Return whether each sample is finite (B,)."""
    return torch.isfinite(x).reshape(len(x), -1).all(1)
