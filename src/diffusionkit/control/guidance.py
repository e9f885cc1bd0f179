r"""Guidance: models whose score is shifted towards a condition.

Each wraps a ScoreModel and is one, so every sampler, corrector and likelihood accepts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_callable, check_flag, check_number, readable
from .._coefficients import Coefficient, expand, linear
from .._grid_times import kernel
from .._keywords import explained
from ..interfaces import ScoreModel
from ..training.conditions import null_like
from ..values import Prediction
from ._guided import (
    GuidedModel,
    check_scale,
    gradient,
    shape_or_type,
)
from .classifier import check_process, class_log_probs


@explained
class ClassifierGuidance(GuidedModel):
    r"""A model guided by the gradient of a classifier of noisy data.

    .. math::
        s(x, t, y) = \nabla \log p_t(x) + \mathrm{scale}\; \nabla_x \log p(y \mid x, t)

    With the true classifier, scale 1 gives the score of the data of class y. A larger scale gives
    that of p_t(x) p(y | x)^scale, which favors samples that the classifier is sure of. Pass the
    class labels y (B,) when sampling, `sampler(shape, class_labels=y)`; all other conditions go to
    the model.

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
        check_process(classifier, self.sde)
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


@explained
class ClassifierFreeGuidance(GuidedModel):
    r"""A conditional model extrapolated away from its unconditional prediction.

    .. math::
        \hat x_0 = \hat x_0(x, \varnothing) + \mathrm{scale}\,
        (\hat x_0(x, c) - \hat x_0(x, \varnothing))

    and the same for the noise. Scale 0 is the unconditional model and 1 the conditional one, each
    in one evaluation; all other scales take two. Above 1, samples are more typical of the
    condition and less diverse. Train the model with `drop_conditions`.

    Args:
        model: a conditional score model.
        scale: the factor of the difference.
        interval: the noise levels, low < sigma / alpha <= high, in which to guide. Outside, the
            conditional model is used, in one evaluation where no sample of the batch is inside.
        rescale: how far, in [0, 1], to bring the standard deviation of each sample's predicted
            data to that of the conditional prediction, against the saturation at large scales. The
            paper rescales the network's output; this rescales the data for every model.
        null: values of conditions that stand for no condition, such as {"class_labels": 10}:
            numbers, or tensors like the condition or one sample of it. Other conditions are
            passed unchanged. None leaves all conditions out.

    Raises:
        ValueError: unless scale is finite, interval a pair with 0 <= low < high, rescale in
            [0, 1], and null not empty; in a call, if there is no condition, or one named in null
            is missing, None or of another shape.
        TypeError: if a part or a number has the wrong type, or null is not a mapping of names.

    Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598;
    Kynkaanniemi et al., Applying Guidance in a Limited Interval Improves Sample and Distribution
    Quality in Diffusion Models, 2024, arXiv 2404.07724; Lin et al., Common Diffusion Noise
    Schedules and Sample Steps are Flawed, 2023, arXiv 2305.08891 (section 3.4).

    >>> import torch
    >>> from diffusionkit import VPSDE, ClassifierFreeGuidance, X0Model
    >>> def network(x, noise_label, class_labels):
    ...     return 0 * x + class_labels[:, None]
    >>> model = X0Model(network, VPSDE())
    >>> null = {"class_labels": 0}
    >>> guided = ClassifierFreeGuidance(model, 3.0, null=null)
    >>> x, t = torch.zeros(1, 2), torch.tensor([0.5])
    >>> guided.predict(x, t, class_labels=torch.tensor([2])).x0
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
        """Keep the model and the options."""
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
                raise ValueError("null: expected at least one name and value, or None, got none")
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self.null = null

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        alpha, sigma = kernel(self.sde, x, t)
        null = self._null_conditions(cond)
        scale = self._scale(alpha, sigma)
        if not isinstance(scale, Tensor) and scale in (0.0, 1.0):
            return self.model.predict(x, t, **(cond if scale else null))
        without, prediction = self.model.predict(x, t, **null), self.model.predict(x, t, **cond)
        start, end = without.x0, prediction.x0
        x0 = linear(1.0, start, scale, end - start)
        learned = {"log_var": prediction.log_var, "log_var_fraction": prediction.log_var_fraction}
        if self.rescale:
            x0 = _rescaled(x0, end, self.rescale)
            return Prediction.from_output(x, x0, alpha, sigma, a=1.0, b=0.0, **learned)
        start, end = without.eps, prediction.eps
        eps = linear(1.0, start, scale, end - start)
        return Prediction(x, x0, eps, alpha, sigma, **learned)

    def _null_conditions(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conditions of the unconditional model."""
        if self.null is None:
            if all(value is None for value in cond.values()):
                raise ValueError("cond: expected a condition to guide by, got none")
            self._check_needed(cond)
            return {}
        given = [name for name, value in cond.items() if value is not None]
        missing = [name for name in self.null if name not in given]
        if missing:
            raise ValueError(
                f"cond: expected a condition {missing[0]}=..., got {given} that are not None"
            )
        values = {
            name: null_like(value, cond[name], name) if isinstance(cond[name], Tensor) else value
            for name, value in self.null.items()
        }
        return {**cond, **values}

    def _check_needed(self, cond: Mapping[str, Any]) -> None:
        """Raise if the network cannot do without class labels, as those of the library cannot."""
        network = getattr(self.model, "network", None)
        config = getattr(network, "config", None)
        classes = config.get("num_classes") if isinstance(config, dict) else None
        if classes is not None and "class_labels" in cond:
            raise ValueError(
                "null: expected the class that stands for none, for a network with "
                f'num_classes={classes}, got None; pass null={{"class_labels": {classes - 1}}} '
                "if its last class does, and train it so with drop_conditions"
            )

    def _scale(self, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
        """Return the scale at a noise level: a float, or (B,) where it differs between samples."""
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


def _rescaled(x0: Tensor, like: Tensor, amount: float) -> Tensor:
    """Return data (B, *D) with their standard deviation moved towards that of other data."""
    now, wanted = (data.reshape(len(data), -1).std(1, correction=0) for data in (x0, like))
    factor = torch.where(now > 0, wanted / now, 1.0)  # constant data have no scale
    return x0 * expand(amount * factor + 1 - amount, x0)
