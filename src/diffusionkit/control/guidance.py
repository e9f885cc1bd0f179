"""Guidance by gradients: of a classifier of noisy data, or of a likelihood of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._checks import check_callable, check_flag
from .._grid_times import kernel
from .._keywords import explained
from ..interfaces import ScoreModel
from ..values import Prediction
from ._guided import GuidedModel, check_process, check_scale, gradient, shape_or_type
from .classifier import class_log_probs


@explained
class ClassifierGuidance(GuidedModel):
    r"""A model guided by the gradient of a classifier of noisy data.

    .. math::
        s(x, t, y) = \nabla \log p_t(x) + \mathrm{scale}\; \nabla_x \log p(y \mid x, t)

    With the true classifier, scale 1 gives the score of the data of class y. A larger scale gives
    that of p_t(x) p(y | x)^scale, which favors samples that the classifier is confident of. Pass
    the class labels y (B,) when sampling, `sampler(shape, class_labels=y)`; all other conditions
    are passed to the model.

    Args:
        model: the score model.
        classifier: maps (x (B, *D), t (B,)) to logits (B, K), such as a `NoiseClassifier`.
        scale: the factor of the classifier's gradient.
        conditional: whether the model is conditioned on the class labels too.

    Raises:
        ValueError: unless scale is finite, or if classifier is a `NoiseClassifier` of another
            process than the model's; in a call, if class_labels is not (B,) or out of range, or
            the logits are not (B, K).
        TypeError: if model is not a ScoreModel, classifier not callable, or scale not a number;
            in a call, if class_labels is missing or does not hold integers.

    Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations,
    2021, arXiv 2011.13456 (section 5); Dhariwal and Nichol, Diffusion Models Beat GANs on Image
    Synthesis, 2021, arXiv 2105.05233.

    >>> import torch
    >>> from diffusionkit import (
    ...     VPSDE, ClassifierGuidance, GaussianMixtureModel
    ... )
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> classifier = lambda x, t: torch.cat([-4 * x, 4 * x], 1)  # logits
    >>> guided = ClassifierGuidance(model, classifier, scale=2.0)
    >>> x, t = torch.zeros(2, 1), torch.tensor([0.5, 0.5])
    >>> guided(x, t, class_labels=torch.tensor([0, 1])).detach()
    tensor([[-8.],
            [ 8.]])
    """

    def __init__(
        self,
        model: ScoreModel,
        classifier: Callable[[Tensor, Tensor], Tensor],
        scale: float = 1.0,
        *,
        conditional: bool = False,
    ) -> None:
        """Keep the model and the classifier."""
        super().__init__(model)
        check_callable(classifier, "classifier")
        check_flag(conditional, "conditional")
        check_scale(scale)
        check_process(classifier, self.sde, "classifier")
        self.classifier = classifier
        self.scale = scale
        self.conditional = conditional

    @override
    def predict(
        self, x: Tensor, t: Tensor, /, *, class_labels: Any = None, **cond: Any
    ) -> Prediction:
        labels = {"class_labels": class_labels}
        prediction = self.model.predict(x, t, **cond, **(labels if self.conditional else {}))
        inside, at = self._with_signal(x, t)
        with self._differentiable(inside, at, labels) as (leaf, time, saved, keep):
            log_p = class_log_probs(self.classifier, leaf, time, **saved)
            grad = gradient(log_p, leaf, "classifier", keep=keep)
        return self._shifted(prediction, x, t, self.scale * grad, at)


@explained
class GradientGuidance(GuidedModel):
    r"""A model guided by a differentiable log p(y | x0), evaluated at the predicted data (DPS).

    .. math::
        s(x, t) = \nabla \log p_t(x) + \mathrm{scale}\; \nabla_x \log p(y \mid \hat x_0(x, t))

    The gradient is taken through the model, at the cost of about two more evaluations. This is an
    approximation: it ignores the uncertainty of the predicted data, so guidance is too strong at
    high noise. For data N(0, c^2), y = x0 + noise of standard deviation tau, r = c / tau and
    Dawson's function D, the samples have

    ================  ==============================  =========================================
    \                 mean / y                        variance / c^2
    ================  ==============================  =========================================
    true posterior    r^2 / (1 + r^2)                 1 / (1 + r^2)
    probability flow  sqrt(2) r D(r / sqrt(2))        exp(-r^2)
    reverse SDE       1 - exp(-r^2)                   (1 - exp(-2 r^2)) / (2 r^2)
    ================  ==============================  =========================================

    with any process, as T goes to infinity and steps to 0. At tau = c / 2 the means are .80, 1.28
    and .98, and the standard deviations .45, .14 and .35 c: samples are not diverse enough, and
    deterministic samplers may overshoot the measurement. `LinearGaussianGuidance` takes the
    uncertainty into account.

    DPS divides the gradient of a squared residual by its norm. For steps of that size, whatever
    the residual, pass `lambda x0: -zeta * (y - A(x0)).flatten(1).norm(dim=1)`: its gradient is the
    same up to a factor of two, but it is no longer a likelihood.

    Args:
        model: the score model.
        log_likelihood: maps data x0 (B, *D) to log p(y | x0) (B,), up to a constant.
        scale: the factor of its gradient.

    Raises:
        ValueError: unless scale is finite; in a call, if log_likelihood does not return (B,) or
            has no gradient.
        TypeError: if model is not a ScoreModel, log_likelihood not callable, or scale not a
            number.

    Source: Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2023,
    arXiv 2209.14687.

    >>> import torch
    >>> from diffusionkit import VPSDE, GaussianMixtureModel, GradientGuidance
    >>> model = GaussianMixtureModel(VPSDE(), [[0.0, 0.0]], [1.0])
    >>> guided = GradientGuidance(model, lambda x0: -((x0[:, 0] - 1) ** 2))
    >>> guided(torch.ones(1, 2), torch.tensor([0.1])).detach()
    tensor([[-0.8991, -1.0000]])
    """

    def __init__(
        self, model: ScoreModel, log_likelihood: Callable[[Tensor], Tensor], scale: float = 1.0
    ) -> None:
        """Keep the model and the log-likelihood."""
        super().__init__(model)
        check_callable(log_likelihood, "log_likelihood")
        check_scale(scale)
        self.log_likelihood = log_likelihood
        self.scale = scale

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        inside, at = self._with_signal(x, t)
        with self._differentiable(inside, at, cond) as (leaf, time, saved, keep):
            prediction = self.model.predict(leaf, time, **saved)
            alpha, sigma = kernel(self.sde, inside, at)
            log_p = self.log_likelihood(prediction.x0)
            if not isinstance(log_p, Tensor) or log_p.shape != (len(x),):
                raise ValueError(
                    f"log_likelihood: expected one number for each sample, shape ({len(x)},), "
                    f"got {shape_or_type(log_p)}"
                )
            factor = self._factor(leaf, alpha, sigma)
            grad = gradient(log_p, leaf, "log_likelihood", factor=factor, keep=keep)
        if at is not t:
            prediction = self.model.predict(x, t, **cond)
        return self._shifted(prediction, x, t, self.scale * grad, at)
