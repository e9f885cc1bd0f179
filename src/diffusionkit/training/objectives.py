"""The score-matching objective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_finite, check_part, check_reference, check_state
from ..interfaces import ScoreModel, TargetEstimator, TimeSampler, Weighting
from ..random import Generators
from .targets import DenoisingTarget
from .times import UniformTimes, times_and_weights
from .weighting import LikelihoodWeighting, SimpleWeighting


class ScoreMatching:
    r"""The weighted error of a model's noise prediction, one loss for each sample.

    .. math::
        \ell_i = w(t_i) \frac{1}{d} \|\hat\epsilon(x_i, t_i) - \epsilon_i\|^2, \quad
        x = \alpha x_0 + \sigma \epsilon,

    with w the weighting times the time sampler's weight, and the mean over the d dimensions of
    a sample. The error is computed in the model's own parameterization, which loses no digits at
    any noise level.

    Args:
        weighting: the weight of the noise-prediction error, `SimpleWeighting` by default.
        target: the regression target, `DenoisingTarget` by default.
        times: the distribution of training times, `UniformTimes` by default.

    Raises:
        TypeError: if a part has the wrong type.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.

    >>> from diffusionkit import EpsModel, VPSDE
    >>> model = EpsModel(lambda x, noise_label: torch.zeros_like(x), VPSDE())
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

    @override
    def __repr__(self) -> str:
        return f"ScoreMatching({self.weighting}, target={self.target}, times={self.times})"

    def nats(
        self,
        model: ScoreModel,
        x0: Tensor,
        *,
        reference: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        r"""Return the likelihood-weighted losses of data x0 (B, *D) in nats, (B,).

        .. math::
            \tfrac12 \int_{t_{min}}^T g^2
            \|s_\theta - \nabla \log p(x_t | x_0)\|^2 \, dt
            = \tfrac{d}{2} (T - t_{min}) \, E[\ell]

        an unbiased estimate of the trainable term of the bound on -log p of the SDE model.
        `NELBO` computes the whole bound.

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
            generator=generator,
            **cond,
        )
        sde = model.sde
        return 0.5 * (sde.T - sde.t_min) * x0[0].numel() * loss

    def __call__(
        self,
        model: ScoreModel,
        x0: Tensor,
        *,
        reference: Tensor | None = None,
        reference_class_labels: Tensor | None = None,
        t: Tensor | None = None,
        generator: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """Return the losses (B,) of data x0 (B, *D).

        Args:
            model: the score model, with the process `model.sde`.
            x0: the data (B, *D).
            reference: reference data (n, *D), for targets that use them.
            reference_class_labels: the class labels (n,) of the reference data.
            t: times (B,), in [0, T], with weight 1; drawn from the time sampler by default.
            generator: the generator of times and noise.
            cond: conditions, passed to the model and to the target.

        Raises:
            ValueError: if the batch is empty or not finite, or the shapes, dtypes or devices of
                data and reference differ.
            TypeError: if x0 is not a floating-point tensor, or model is not a ScoreModel.
        """
        if not isinstance(model, ScoreModel):
            raise TypeError(
                f"model: expected a ScoreModel, got {type(model).__name__}; wrap the network, "
                "not the score model: EpsModel(DistributedDataParallel(network), sde)"
            )
        check_state(x0, "x0")
        check_finite(x0, "x0")
        if reference is not None:
            check_reference(reference, x0)
        sde = model.sde
        t, weight = times_and_weights(self.times, sde, x0, t, generator)
        sample = sde.perturb(x0, t, generator=generator)
        target_cond = dict(cond)
        if reference_class_labels is not None:
            target_cond["reference_class_labels"] = reference_class_labels
        target = self.target(sample, reference, **target_cond)
        error = model.predict(sample.x, t, **cond).noise_error(target)
        dtype = torch.promote_types(error.dtype, torch.float32)
        loss = error.to(dtype).square().reshape(len(x0), -1).mean(1)
        loss = loss * self.weighting(sde, t).to(loss.dtype)
        self.times.update(t, loss.detach())
        return loss * weight.to(loss.dtype)
