"""A score model whose predicted data are modified: clipped, thresholded or by a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import check_callable, check_interval, check_number
from .._grid_times import kernel
from .._model_checks import check_model
from ..interfaces import ScoreModel
from ..values import Prediction


class DenoisedModel(ScoreModel):
    r"""A score model that applies a function to the predicted data of another model.

    .. math::
        \hat x_0' = f(\hat x_0), \quad \hat\epsilon' = (x - \alpha \hat x_0') / \sigma

    The predicted noise, the score and sampler steps are computed from the modified data;
    `variance` and `data_range` are those of the model. With `Clip` this is the clip_denoised
    option of released samplers, with another function their denoised_fn.

    Args:
        model: the score model.
        fn: maps predicted data (B, *D) to data of the same shape and dtype.

    Raises:
        TypeError: if model is not a ScoreModel or fn is not callable.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239; Nichol and
    Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (released code).

    >>> import torch
    >>> from diffusionkit import VPSDE, Clip, DenoisedModel, EpsModel
    >>> model = EpsModel(lambda x, noise_label: 0 * x, VPSDE())
    >>> model = DenoisedModel(model, Clip(-1.0, 1.0))
    >>> model.predict(torch.tensor([[3.0, -0.1]]), torch.tensor([0.01])).x0
    tensor([[ 1.0000, -0.1001]])
    """

    def __init__(self, model: ScoreModel, fn: Callable[[Tensor], Tensor]) -> None:
        """Validate and store the model and the function."""
        super().__init__()
        check_model(model)
        check_callable(fn, "fn")
        self.model = model
        self.sde = model.sde
        self.fn = fn
        self.data_range = getattr(model, "data_range", None)
        self.variance = getattr(model, "variance", None)

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        """Predict data and noise of a state x (B, *D) at times t (B,).

        Raises:
            ValueError: if the function changes the shape or the dtype.
        """
        prediction = self.model.predict(x, t, **cond)
        x0 = self.fn(prediction.x0)
        if x0.shape != x.shape or x0.dtype != prediction.x0.dtype:
            raise ValueError(
                f"fn: expected data of shape {tuple(x.shape)}, {prediction.x0.dtype}, "
                f"got {tuple(x0.shape)}, {x0.dtype}"
            )
        alpha, sigma = kernel(self.sde, x, t)
        return Prediction.from_output(
            x,
            x0,
            alpha,
            sigma,
            a=1.0,
            b=0.0,
            log_var=prediction.log_var,
            log_var_fraction=prediction.log_var_fraction,
        )


@dataclass(frozen=True)
class Clip:
    """Static thresholding: clip data to a range.

    Args:
        low: the lower end of the range.
        high: the upper end of the range.

    Raises:
        ValueError: if low >= high.

    >>> import torch
    >>> from diffusionkit import Clip
    >>> Clip()(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.low, "low")
        check_number(self.high, "high")
        if not self.low < self.high:
            raise ValueError(f"low, high: expected low < high, got {self.low} and {self.high}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the data clipped to the range."""
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    r"""Dynamic thresholding: rescale each sample so that a quantile of its values is in range.

    .. math::
        x_0' = c + h \frac{\mathrm{clip}(z, -s, s)}{s}, \quad z = \frac{x_0 - c}{h}, \quad
        s = \min(\max(1, \mathrm{quantile}_q |z|), s_{max}),

    where c is the center of the range, h half its width, and s is computed per sample. Prevents
    saturation under strong guidance.

    Args:
        quantile: the quantile q of a sample's absolute values.
        low: the lower end of the range.
        high: the upper end of the range.
        largest: the largest s; what is further outside the range is clipped.

    Raises:
        ValueError: if quantile is outside (0, 1], low >= high, a bound is not finite or largest
            is below 1.

    Source: Saharia et al., Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding, 2022, arXiv 2205.11487 (section 2.3).

    >>> import torch
    >>> from diffusionkit import DynamicThreshold
    >>> DynamicThreshold(quantile=0.5)(torch.tensor([[-8.0, 2.0, 1.0]]))
    tensor([[-1.0000,  1.0000,  0.5000]])
    """

    quantile: float = 0.995
    low: float = -1.0
    high: float = 1.0
    largest: float = math.inf

    def __post_init__(self) -> None:
        check_number(self.quantile, "quantile")
        check_interval(self.low, self.high, "low", "high")
        check_number(self.largest, "largest")
        if not self.largest >= 1.0:
            raise ValueError(f"largest: expected a number >= 1, got {self.largest}")
        if not 0.0 < self.quantile <= 1.0:
            raise ValueError(f"quantile: expected a number in (0, 1], got {self.quantile}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the data (B, *D) thresholded to the range."""
        center, half = 0.5 * (self.low + self.high), 0.5 * (self.high - self.low)
        z = (x0 - center) / half
        rows = z.reshape(len(z), -1).abs().to(torch.promote_types(z.dtype, torch.float32))
        # Row by row: torch.quantile accepts at most 2^24 numbers.
        size = torch.stack([torch.quantile(row, self.quantile) for row in rows])
        size = size.clamp(1.0, self.largest).to(z.dtype).view(-1, *(1,) * (z.ndim - 1))
        return center + half * (z.clamp(-size, size) / size)
