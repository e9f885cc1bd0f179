"""Embeddings of the noise label, class labels and condition vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .._checks import check_number, check_sequence
from ._arguments import check_level_index, check_optional_counts
from .exact_frequencies import ExactFrequencies, as_float
from .layers import Style, linear

LabelEmbedding = Literal["fourier", "fourier_linear", "positional"]


def _sines(angle: Tensor) -> Tensor:
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _check_features(features: int) -> None:
    if features < 4 or features % 2:
        raise ValueError(f"features: expected an even number >= 4, got {features}")


class PositionalEmbedding(nn.Module):
    r"""Sines and cosines of the noise label at geometrically spaced frequencies.

    .. math::
        e(l) = [\sin(\omega_i l), \cos(\omega_i l)]_i, \qquad
        \omega_i = \exp\Big(-\frac{i \ln 10^4}{d/2 - 1}\Big), \quad i = 0, \dots, d/2 - 1

    all sines first. Intended for labels in the range of a step index, 0 to about 1000. The
    frequencies are computed in the precision of the label, at least float32.

    Args:
        features: even number d of features, at least 4.
        endpoint: whether the last frequency is 1e-4, as above; otherwise d/2 replaces d/2 - 1.

    Raises:
        ValueError: if `features` is odd or below 4; when called, if a label is not finite (read on
            the CPU only).

    Source: A. Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762; this form:
    J. Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239; without the
    endpoint: P. Dhariwal, A. Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv
    2105.05233.
    """

    def __init__(self, features: int, *, endpoint: bool = True) -> None:
        super().__init__()
        _check_features(features)
        self.features = features
        self.endpoint = endpoint

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Map noise labels (B,) to features (B, features), in float64 or else float32."""
        noise_label = as_float(noise_label)
        half = self.features // 2
        index = torch.arange(half, dtype=noise_label.dtype, device=noise_label.device)
        last = half - 1 if self.endpoint else half
        angle = noise_label[:, None] * torch.exp(index * (-math.log(1e4) / last))
        return _sines(angle)


class FourierEmbedding(ExactFrequencies):
    r"""Sines and cosines of the noise label, or of its logarithm, at fixed random frequencies.

    .. math:: e(l) = [\sin(2 \pi w_i u), \cos(2 \pi w_i u)]_i, \qquad
        w_i \sim N(0, \mathrm{scale}^2), \quad u = \ln l \text{ or } l

    all sines first. The frequencies are fixed, see `ExactFrequencies`.

    Args:
        features: even number d of features, at least 4; there are d/2 frequencies.
        scale: standard deviation of the frequencies.
        log: whether to embed the logarithm of the label, for labels that are a noise level.

    Raises:
        ValueError: if `features` is odd or below 4, or the scale is not positive and finite; when
            called, if a label is not finite, or not positive if `log` (read on the CPU only).

    Source: M. Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low
    Dimensional Domains, 2020, arXiv 2006.10739; of log sigma: Y. Song et al., 2021, arXiv
    2011.13456.
    """

    def __init__(self, features: int, *, scale: float = 16.0, log: bool = True) -> None:
        _check_features(features)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: expected a finite number > 0, got {scale}")
        super().__init__(features // 2)
        self.log = log
        self.scale = scale
        self.reset_parameters()

    @override
    def _draw(self) -> None:
        self.frequencies.normal_().mul_(self.scale)

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Map noise labels (B,), positive if `log`, to features (B, features)."""
        noise_label = as_float(noise_label, log=self.log)
        frequencies = self.exact(noise_label.dtype)
        # Angles reach hundreds, where rounding matters: multiply in the order of the released
        # networks that use each form.
        if self.log:
            return _sines(noise_label.log()[:, None] * frequencies * 2 * math.pi)
        return _sines(noise_label[:, None] * (2 * math.pi * frequencies))


class SignedLogEmbedding(nn.Module):
    r"""Sines and cosines of the noise label on a signed logarithmic scale.

    .. math::
        e(l) = [\sin(\omega_i u), \cos(\omega_i u)]_i, \qquad u = \operatorname{asinh}(l), \quad
        \omega_i = 2^{-2 + 6 i / (d/2 - 1)}

    all sines first, with frequencies from 1/4 to 16. The scale is linear for labels within
    about one of zero, the range of :math:`\tfrac14\log\sigma`, and logarithmic up to thousands,
    the range of :math:`999\,t`: both span a few units of u, so the lowest frequency resolves
    both and the highest aliases neither.

    Args:
        features: even number d of features, at least 4.

    Raises:
        ValueError: if `features` is odd or below 4; when called, if a label is not finite (read on
            the CPU only).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        _check_features(features)
        self.features = features

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Map noise labels (B,) to features (B, features), in float64 or else float32."""
        noise_label = as_float(noise_label)
        half = self.features // 2
        index = torch.arange(half, dtype=noise_label.dtype, device=noise_label.device)
        angle = noise_label.asinh()[:, None] * torch.exp2(index * (6 / (half - 1)) - 2)
        return _sines(angle)


class _ClassEmbedding(nn.Embedding):
    """A table of classes, drawn from a Gaussian."""

    def __init__(self, classes: int, features: int, std: float) -> None:
        self.std = std
        super().__init__(classes, features)

    @override
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class ConditionEmbedding(nn.Module):
    r"""Embedding of the noise label and, optionally, of a class and a condition vector.

    .. math:: \mathrm{emb} = \mathrm{SiLU}(L_2(\mathrm{SiLU}(L_1(e(l) + E_c + W v))) )

    with the class embedding added as shown, or to the output of :math:`L_2` (`late_classes`).

    Args:
        noise_features: module that maps noise labels (B,) to features (B, features).
        features: number of those features.
        width: number of embedding channels.
        num_classes: number of classes, or None.
        condition_features: size of the condition vector, or None.
        late_classes: whether the class embedding is added after both linear layers.
        class_std: standard deviation of the class embedding at initialization.
        style: provides initializer and activation; None for fan-averaged and SiLU.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if a count is below 1.

    Source: late classes: P. Dhariwal, A. Nichol, 2021, arXiv 2105.05233; early classes and the
    vector: T. Karras et al., 2022, arXiv 2206.00364.
    """

    def __init__(
        self,
        noise_features: nn.Module,
        features: int,
        width: int,
        *,
        num_classes: int | None = None,
        condition_features: int | None = None,
        late_classes: bool = False,
        class_std: float = 1.0,
        style: Style | None = None,
    ) -> None:
        super().__init__()
        check_optional_counts(num_classes=num_classes, condition_features=condition_features)
        make = linear if style is None else style.linear
        self.activation = F.silu if style is None else style.activation
        self.noise_features = noise_features
        self.linear_1 = make(features, width)
        self.linear_2 = make(width, width)
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.late_classes = late_classes
        at = width if late_classes else features
        self.classes: nn.Embedding | None = None
        if num_classes is not None:
            self.classes = _ClassEmbedding(num_classes, at, class_std)
        self.condition: nn.Linear | None = None
        if condition_features is not None:
            self.condition = nn.Linear(condition_features, features, bias=False)

    @override
    def forward(
        self,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding (B, width) of validated arguments.

        Args:
            noise_label: noise labels (B,).
            class_labels: class labels (B,), int64, or None for a network without classes.
            condition: vectors (B, condition_features), or None for zeros.
        """
        features: Tensor = self.noise_features(noise_label).to(self.linear_1.weight.dtype)
        classes = None
        if self.classes is not None and class_labels is not None:
            classes = self.classes(class_labels)
        if classes is not None and not self.late_classes:
            features = features + classes
        if self.condition is not None and condition is not None:
            features = features + self.condition(condition.to(features.dtype))
        emb: Tensor = self.linear_2(self.activation(self.linear_1(features)))
        if classes is not None and self.late_classes:
            emb = emb + classes
        return self.activation(emb)


class SigmaTable(nn.Module):
    """Table of noise levels, indexed by the noise label.

    Args:
        sigmas: noise levels by index.

    Raises:
        ValueError: if a noise level is not positive and finite.
    """

    sigmas: Tensor

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        check_sequence(sigmas, "sigmas")
        for sigma in sigmas:
            check_number(sigma, "sigmas")
        if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
            raise ValueError(f"sigmas: expected finite numbers > 0, got {list(sigmas)[:6]}")
        self.values = tuple(sigmas)
        # Not persistent: part of the configuration.
        here = torch.empty(0).device  # that of the weights, also inside `with torch.device(...)`
        self.register_buffer("sigmas", self._table(here), persistent=False)

    def _table(self, device: torch.device) -> Tensor:
        exact = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(self.values, dtype=exact, device=device)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Noise levels follow the network's device, not its dtype.
        device = fn(self.sigmas.new_empty(0, dtype=torch.float32)).device
        self.sigmas = self._table(device)
        return self

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Return the noise levels (B,).

        Args:
            noise_label: indices (B,) of noise levels, which may be floating-point.

        Raises:
            ValueError: if a label is out of range (read on the CPU only).
        """
        check_level_index(noise_label, len(self.values))
        return self.sigmas[noise_label.long()]


def make_embedding(
    kind: LabelEmbedding | None,
    width: int,
    style: Style,
    fourier_scale: float,
    num_classes: int | None,
    condition_features: int | None,
) -> ConditionEmbedding | None:
    """Make the embedding of the networks of Song et al., with early classes and conditions.

    Args:
        kind: "fourier", "fourier_linear" or "positional", see `NCSNpp`; None for no embedding.
        width: width of the network; the embedding has four times as many channels.
        style: provides initializer and activation.
        fourier_scale: standard deviation of the frequencies of Fourier features.
        num_classes: number of classes, or None.
        condition_features: size of the condition vector, or None.
    """
    if kind is None:
        return None
    features = width if kind == "positional" else 2 * width
    noise_features: nn.Module = PositionalEmbedding(features)
    if kind != "positional":
        noise_features = FourierEmbedding(features, scale=fourier_scale, log=kind == "fourier")
    return ConditionEmbedding(
        noise_features,
        features,
        4 * width,
        num_classes=num_classes,
        condition_features=condition_features,
        style=style,
    )
