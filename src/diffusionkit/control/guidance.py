r"""Guidance: models whose score is pushed towards what is asked for.

Each wraps a ScoreModel and is one: every sampler, corrector and likelihood takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_times, readable
from .._grid_times import instant
from ..interfaces import ScoreModel
from ..training.conditions import null_like
from ..values import Coefficient, Prediction, expand, linear
from ._guided import (
    GuidedModel,
    GuidedPrediction,
    check_scale,
    gradient,
    held_share,
    leaf,
    recordable,
    wide_data,
    widened,
)
from .classifier import check_process, class_log_probs


class ClassifierGuidance(GuidedModel):
    r"""A model guided by the gradient of a classifier of noisy data.

    .. math::
        s(x, t, y) = \nabla \log p_t(x) + \mathrm{scale}\; \nabla_x \log p(y \mid x, t)

    With the true classifier, scale 1 is the score of the data of class y; a larger one is that
    of p_t(x) p(y | x)^scale, which favours what the classifier is sure of. The labels y (B,) are
    handed in when sampling, `sampler(shape, y=y)`, and are the classifier's alone; whatever else
    is handed in is the model's. So one cannot go around another: the outer takes y, and the inner
    is left without.

    Args:
        model: the score model.
        classifier: maps (x (B, *D), t (B,)) to logits (B, K), such as a `NoiseClassifier`.
        scale: the factor of the classifier's gradient.

    Raises:
        ValueError: unless scale is finite, or if classifier is a `NoiseClassifier` of another
            process than the model's; when asked, if y is not (B,) or not of the classifier's
            labels, the logits are not (B, K), or alpha is 0.
        TypeError: if model is not a ScoreModel, classifier not callable, or scale not a number;
            when asked, if y is missing or does not hold integers.

    Source: Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456
    (section 5); Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021,
    arXiv 2105.05233.

    >>> from diffusionkit import GaussianMixtureModel, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[-2.0], [2.0]], stds=[0.5, 0.5])
    >>> guided = ClassifierGuidance(model, lambda x, t: torch.cat([-4 * x, 4 * x], 1), scale=2.0)
    >>> guided(torch.zeros(2, 1), torch.tensor([0.5, 0.5]), y=torch.tensor([0, 1])).detach()
    tensor([[-8.],
            [ 8.]])
    """

    def __init__(
        self,
        model: ScoreModel,
        classifier: Callable[[Tensor, Tensor], Tensor],
        scale: float = 1.0,
    ) -> None:
        """Join the model and the classifier."""
        super().__init__(model)
        if not callable(classifier):
            raise TypeError(f"classifier: expected a callable, got {type(classifier).__name__}")
        check_scale(scale)
        check_process(classifier, self.sde)
        self.classifier = classifier
        self.scale = scale

    def extra_repr(self) -> str:
        """Return the scale."""
        return f"scale={self.scale}"

    def predict(self, x: Tensor, t: Tensor, *, y: Any = None, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,), for labels y (B,)."""
        prediction = self.model.predict(x, t, **cond)
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            at = leaf(x)
            log_p = class_log_probs(self.classifier, at, recordable(t, self.sde), recordable(y))
            push = gradient(log_p, at, "classifier", keep=keep)
        return self._pushed(prediction, x, t, self.scale * push)


class GradientGuidance(GuidedModel):
    r"""A model guided by any differentiable log p(y | x0), taken at the predicted data (DPS).

    .. math::
        s(x, t) = \nabla \log p_t(x) + \mathrm{scale}\; \nabla_x \log p(y \mid \hat x_0(x, t))

    The gradient goes through the model, which costs about two evaluations more. It is an
    approximation: the predicted data are taken for the data, as if nothing were uncertain of
    them, so the push is too strong while there is much noise. For data N(0, c^2), y = x0 + noise
    of standard deviation tau, r = c / tau and Dawson's function D, the law of the samples is

    ================  ==============================  =========================================
    \                 mean / y                        variance / c^2
    ================  ==============================  =========================================
    true posterior    r^2 / (1 + r^2)                 1 / (1 + r^2)
    probability flow  sqrt(2) r D(r / sqrt(2))        exp(-r^2)
    reverse SDE       1 - exp(-r^2)                   (1 - exp(-2 r^2)) / (2 r^2)
    ================  ==============================  =========================================

    with any process, as T goes to infinity and steps to 0. At tau = c / 2 these are means of
    .80, 1.28 and .98, and standard deviations of .45, .14 and .35 c: samples are too much alike,
    and with a deterministic sampler may go beyond the measurement. `LinearGaussianGuidance`
    takes the uncertainty into account.

    DPS divides the gradient of a squared residual by its norm. For steps of its size whatever
    the residual, hand in `lambda x0: -zeta * (y - A(x0)).flatten(1).norm(dim=1)`, which is that
    gradient up to a factor of two; but no likelihood any more.

    Args:
        model: the score model.
        log_likelihood: maps data x0 (B, *D) to log p(y | x0) (B,), up to a constant.
        scale: the factor of its gradient.

    Raises:
        ValueError: unless scale is finite; when asked, if log_likelihood is not (B,) or has no
            gradient, or alpha is 0.
        TypeError: if model is not a ScoreModel, log_likelihood not callable, or scale not a
            number.

    Source: Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2023,
    arXiv 2209.14687.

    >>> from diffusionkit import GaussianMixtureModel, VPSDE
    >>> model = GaussianMixtureModel(VPSDE(), means=[[0.0, 0.0]], stds=[1.0])
    >>> guided = GradientGuidance(model, lambda x0: -((x0[:, 0] - 1.0) ** 2))
    >>> guided(torch.ones(1, 2), torch.tensor([0.1])).detach()
    tensor([[-0.8991, -1.0000]])
    """

    def __init__(
        self, model: ScoreModel, log_likelihood: Callable[[Tensor], Tensor], scale: float = 1.0
    ) -> None:
        """Join the model and the log-likelihood."""
        super().__init__(model)
        if not callable(log_likelihood):
            raise TypeError(
                f"log_likelihood: expected a callable, got {type(log_likelihood).__name__}"
            )
        check_scale(scale)
        self.log_likelihood = log_likelihood
        self.scale = scale

    def extra_repr(self) -> str:
        """Return the scale."""
        return f"scale={self.scale}"

    def predict(self, x: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,)."""
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            at = leaf(x)
            known = {name: recordable(value) for name, value in cond.items()}
            prediction = self.model.predict(at, recordable(t, self.sde), **known)
            alpha, _ = self._kernel(t)
            log_p = self.log_likelihood(wide_data(prediction, alpha).to(x.dtype))
            if not isinstance(log_p, Tensor) or log_p.shape != (len(x),):
                got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
                raise ValueError(
                    f"log_likelihood: expected one number for each sample, shape ({len(x)},), "
                    f"got {got}"
                )
            share = held_share(x, alpha, 64.0)
            push = gradient(log_p, at, "log_likelihood", share=share, keep=keep)
        return self._pushed(prediction, x, t, self.scale * push)


class ClassifierFreeGuidance(GuidedModel):
    r"""A conditional model guided away from what it says without the condition.

    .. math::
        \hat x_0 = \hat x_0(x, \varnothing) + \mathrm{scale}\,
        (\hat x_0(x, c) - \hat x_0(x, \varnothing))

    and the same for the noise: scale 0 is the unconditional model, 1 the conditional one, each in
    one evaluation; all others take two, and beyond 1 go further than the condition asks.
    Train the model with `drop_conditions`.

    Args:
        model: a score model that takes conditions.
        scale: the factor of the difference.
        interval: the noise levels, low < sigma / alpha <= high, in which to guide. Outside, the
            conditional model is taken as it is; in one evaluation, where no sample is inside.
        rescale: how far, in [0, 1], each sample's predicted data are brought to the standard
            deviation that the conditional model's have: against the saturation that a large
            scale brings. The paper does it to a network's output, which is not the same thing
            for every model; here it is the data, whatever the model predicts.
        null: what the conditions are without a condition, such as {"class_labels": 10}: numbers, or
            tensors like the condition, in whole or of one sample. All other conditions stay as
            they are. None leaves all of them out.

    Raises:
        ValueError: unless scale is finite, interval a pair with 0 <= low < high, rescale in
            [0, 1], and null not empty; when asked, if there is no condition, or one that null
            names is missing, None or of another shape.
        TypeError: if a part or a number has the wrong type, or null is not a mapping of names.

    Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598;
    Kynkaanniemi et al., Applying Guidance in a Limited Interval, 2024, arXiv 2404.07724;
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023,
    arXiv 2305.08891 (section 3.4).

    >>> from diffusionkit import VPSDE, X0Model
    >>> network = lambda x, noise_label, class_labels: 0 * x + class_labels.unsqueeze(1)
    >>> model = X0Model(network, VPSDE())
    >>> guided = ClassifierFreeGuidance(model, 3.0, null={"class_labels": 0})
    >>> guided.predict(torch.zeros(1, 2), torch.tensor([0.5]), class_labels=torch.tensor([2])).x0
    tensor([[6., 6.]])
    """

    def __init__(
        self,
        model: ScoreModel,
        scale: float,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        *,
        null: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the model and the numbers."""
        super().__init__(model)
        check_scale(scale)
        if interval is not None:
            if not isinstance(interval, (tuple, list)):
                raise TypeError(f"interval: expected a pair (low, high), got {interval!r}")
            if len(interval) != 2:
                raise ValueError(f"interval: expected a pair (low, high), got {interval}")
            low, high = interval
            check_number(low, "interval")
            check_number(high, "interval")
            if not 0 <= low < high:
                raise ValueError(f"interval: expected 0 <= low < high, got {low} and {high}")
        if rescale is not None:
            check_number(rescale, "rescale")
            if not 0 <= rescale <= 1:
                raise ValueError(f"rescale: expected a number in [0, 1], got {rescale}")
        if null is not None:
            if not isinstance(null, Mapping) or not all(isinstance(name, str) for name in null):
                raise TypeError(f"null: expected a mapping of names to values, got {null!r}")
            if not null:
                raise ValueError("null: expected a name and a value at least, or None, got none")
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self.null = null

    def extra_repr(self) -> str:
        """Return the numbers, and which conditions have a null."""
        names = None if self.null is None else list(self.null)
        return f"scale={self.scale}, interval={self.interval}, rescale={self.rescale}, null={names}"

    def predict(self, x: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,), with conditions."""
        if instant(t, self.sde) is None:
            check_times(t, self.sde.T, len(x), x)
        nothing = self._without(cond)
        alpha, sigma = self.sde.kernel(t)
        scale = self._scale(alpha, sigma)
        if not isinstance(scale, Tensor) and scale in (0.0, 1.0):
            return self.model.predict(x, t, **(cond if scale else nothing))
        without, prediction = self.model.predict(x, t, **nothing), self.model.predict(x, t, **cond)
        start, end = wide_data(without, alpha), wide_data(prediction, alpha)
        x0 = linear(1.0, start, scale, end - start)
        learned = {"log_var": prediction.log_var, "log_var_fraction": prediction.log_var_fraction}
        if self.rescale:
            x0 = _rescaled(x0, end, self.rescale)
            return GuidedPrediction.from_output(x, x0, alpha, sigma, a=1.0, b=0.0, **learned)
        start, end = widened(without.eps), widened(prediction.eps)
        eps = linear(1.0, start, scale, end - start)
        return GuidedPrediction(x, x0, eps, alpha, sigma, **learned)

    def _without(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conditions of the unconditional model."""
        if self.null is None:
            if all(value is None for value in cond.values()):
                raise ValueError("expected a condition to guide by, got none")
            return {}
        given = [name for name, value in cond.items() if value is not None]
        missing = [name for name in self.null if name not in given]
        if missing:
            raise ValueError(
                f"expected a condition {missing[0]}=..., got {given} that are not None"
            )
        values = {
            name: null_like(value, cond[name], name) if isinstance(cond[name], Tensor) else value
            for name, value in self.null.items()
        }
        return {**cond, **values}

    def _scale(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        """Return the scale at a noise level: a float, or (B,) where samples differ in it."""
        scale = float(self.scale)
        if self.interval is None:
            return scale
        low, high = self.interval
        if not isinstance(sigma, Tensor) or not isinstance(alpha, Tensor):
            return scale if sigma > low * alpha and alpha >= sigma / high else 1.0
        # Not as sigma / alpha: alpha may be 0, and high infinite.
        inside = (sigma > low * alpha) & (alpha >= sigma / high)
        if readable(inside) and not bool(inside.any()):
            return 1.0
        return torch.where(inside, scale, torch.ones_like(sigma))


def _rescaled(x0: Tensor, like: Tensor, share: float) -> Tensor:
    """Return data (B, *D) brought, to a share, to the standard deviation of other ones."""
    rows = (
        y.reshape(len(y), -1).to(torch.promote_types(y.dtype, torch.float32)) for y in (x0, like)
    )
    now, wanted = (y.std(1, correction=0) for y in rows)
    factor = torch.where(now > 0, wanted / now, 1.0)  # nothing to bring where all are equal
    return (x0 * expand(share * factor + 1 - share, x0)).to(x0.dtype)
