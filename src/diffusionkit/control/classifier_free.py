"""Classifier-free guidance: a conditional model against itself without the condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from .._keywords import explained
from ..interfaces import ScoreModel
from ..training.conditions import null_like
from ..values import Prediction
from .extrapolation import ExtrapolatedModel, Projection


@explained
class ClassifierFreeGuidance(ExtrapolatedModel):
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
        projection: changes the difference before it is scaled, such as `AdaptiveProjection`, for
            adaptive projected guidance (APG). None keeps the difference.

    Raises:
        ValueError: unless scale is finite, interval a pair with 0 <= low < high, rescale in
            [0, 1], and null not empty; in a call, if there is no condition, one named in null is
            missing, None or of another shape, or the projection changes the shape.
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
        projection: Projection | None = None,
    ) -> None:
        """Keep the model and the options."""
        super().__init__(model, scale, interval, rescale, projection)
        if null is not None:
            if not isinstance(null, Mapping) or not all(isinstance(name, str) for name in null):
                raise TypeError(f"null: expected a mapping of names to values, got {null!r}")
            if not null:
                raise ValueError("null: expected at least one name and value, or None, got none")
        self.null = null

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        null = self._null_conditions(cond)
        return self._extrapolated(
            x,
            t,
            weak=lambda: self.model.predict(x, t, **null),
            strong=lambda: self.model.predict(x, t, **cond),
            alone=True,
        )

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
                "null: expected the class that stands for no class, for a network with "
                f'num_classes={classes}, got None; pass null={{"class_labels": {classes - 1}}} '
                "if its last class does, and train it so with drop_conditions"
            )
