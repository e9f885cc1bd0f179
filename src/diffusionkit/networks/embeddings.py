"""What a network makes of the label (time) and of the class it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ._arguments import check_level_index, check_optional_counts
from .layers import Style, linear

LabelEmbedding = Literal["fourier", "fourier_linear", "positional"]


def _as_float(noise_label: Tensor) -> Tensor:
    # Labels reach 1e3: half precision cannot hold their sines' arguments.
    return noise_label.to(torch.promote_types(noise_label.dtype, torch.float32))


def _sines(angle: Tensor) -> Tensor:
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _check_features(features: int) -> None:
    if features < 4 or features % 2:
        raise ValueError(f"features must be even and at least 4, got {features}")


class PositionalEmbedding(nn.Module):
    r"""Sines and cosines of the label at geometrically spaced frequencies.

    .. math::
        e(l) = [\sin(\omega_i l), \cos(\omega_i l)]_i, \qquad
        \omega_i = \exp\Big(-\frac{i \ln 10^4}{d/2 - 1}\Big), \quad i = 0, \dots, d/2 - 1

    all sines first. Meant for labels of the order of a step index, 0 to about 1000. The
    frequencies are computed in the precision of the label, at least float32.

    Args:
        features: even number d of features, at least 4.
        endpoint: whether 1e-4 itself is the last frequency, as above. If not, d/2 - 1 is d/2.

    Raises:
        ValueError: if `features` is odd or below 4.

    Source: A. Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762; in this form J. Ho
    et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239; without the end point
    P. Dhariwal and A. Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv
    2105.05233.
    """

    def __init__(self, features: int, *, endpoint: bool = True) -> None:
        super().__init__()
        _check_features(features)
        self.features = features
        self.endpoint = endpoint

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Embed labels.

        Args:
            noise_label: labels (B,).

        Returns:
            Features (B, features), float64 for float64 labels, else float32.
        """
        noise_label = _as_float(noise_label)
        half = self.features // 2
        index = torch.arange(half, dtype=noise_label.dtype, device=noise_label.device)
        last = half - 1 if self.endpoint else half
        angle = noise_label[:, None] * torch.exp(index * (-math.log(1e4) / last))
        return _sines(angle)


class FourierEmbedding(nn.Module):
    r"""Sines and cosines of the label, or of its logarithm, at fixed random frequencies.

    .. math:: e(l) = [\sin(2 \pi w_i u), \cos(2 \pi w_i u)]_i, \qquad
        w_i \sim N(0, \mathrm{scale}^2), \quad u = \ln l \text{ or } l

    all sines first. The frequencies are a parameter that is not trained: saved and loaded with
    the network, averaged to itself, without a gradient. They stay in float32 where the network
    goes to half precision.

    Args:
        features: even number d of features, at least 4; there are d/2 frequencies.
        scale: standard deviation of the frequencies.
        log: whether the logarithm of the label is embedded: for labels that are a noise level.

    Raises:
        ValueError: if `features` is odd or below 4, or the scale is not positive and finite.

    Source: M. Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low
    Dimensional Domains, 2020, arXiv 2006.10739; of log sigma Y. Song et al., 2021, arXiv
    2011.13456.
    """

    def __init__(self, features: int, *, scale: float = 16.0, log: bool = True) -> None:
        super().__init__()
        _check_features(features)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.log = log
        self.frequencies = nn.Parameter(torch.randn(features // 2) * scale, requires_grad=False)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Half precision could not hold frequencies: angles would be off by whole radians.
        exact = self.frequencies.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.frequencies.dtype.itemsize < exact.dtype.itemsize < 8:
            self.frequencies.data = exact.to(self.frequencies.device)
        return self

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Embed labels.

        Args:
            noise_label: labels (B,), positive where their logarithm is embedded.

        Returns:
            Features (B, features), float64 for float64 labels, else float32.
        """
        noise_label = _as_float(noise_label)
        frequencies = self.frequencies.to(noise_label.dtype)
        # Angles reach hundreds, where rounding shows: products in the order of the networks that
        # were published with the one and with the other.
        if self.log:
            return _sines(noise_label.log()[:, None] * frequencies * 2 * math.pi)
        return _sines(noise_label[:, None] * (2 * math.pi * frequencies))


class SignedLogEmbedding(nn.Module):
    r"""Sines and cosines of the label on a signed logarithmic scale.

    .. math::
        e(l) = [\sin(\omega_i u), \cos(\omega_i u)]_i, \qquad u = \operatorname{asinh}(l), \quad
        \omega_i = 2^{-2 + 6 i / (d/2 - 1)}

    all sines first, with frequencies from 1/4 to 16. The scale is linear for labels within
    about one of zero, where :math:`\tfrac14\log\sigma` lives, and logarithmic up to thousands,
    where :math:`999\,t` lives: both span a few units of u, so neither is lost in the lowest
    frequency nor scrambled by the highest.

    Args:
        features: even number d of features, at least 4.

    Raises:
        ValueError: if `features` is odd or below 4.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        _check_features(features)
        self.features = features

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Embed labels.

        Args:
            noise_label: labels (B,).

        Returns:
            Features (B, features), float64 for float64 labels, else float32.
        """
        noise_label = _as_float(noise_label)
        half = self.features // 2
        index = torch.arange(half, dtype=noise_label.dtype, device=noise_label.device)
        angle = noise_label.asinh()[:, None] * torch.exp2(index * (6 / (half - 1)) - 2)
        return _sines(angle)


class ConditionEmbedding(nn.Module):
    r"""Embedding of a label, of a class and of a vector, whichever the network is given.

    .. math:: \mathrm{emb} = \mathrm{SiLU}(L_2(\mathrm{SiLU}(L_1(e(l) + E_c + W v))) )

    with the class embedding added there, or to the output of :math:`L_2` (`late_classes`).

    Args:
        noise_features: module that maps labels (B,) to features (B, features).
        features: number of those features.
        width: number of embedding channels.
        num_classes: number of classes, or None for no classes.
        condition_features: size of the condition vector, or None for no condition.
        late_classes: whether the class embedding is added after both linear layers.
        style: whose initialiser and activation are taken, or None for fan-averaged and SiLU.

    Raises:
        TypeError: if a count is not an int.
        ValueError: if a count is below 1.

    Source: Late classes as P. Dhariwal and A. Nichol, 2021, arXiv 2105.05233; early ones and the
    vector as T. Karras et al., 2022, arXiv 2206.00364.
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
        self.classes = None if num_classes is None else nn.Embedding(num_classes, at)
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
        """Embed labels, classes and vectors that have been checked already.

        Args:
            noise_label: labels (B,).
            class_labels: classes (B,), int64, or None for a network without classes.
            condition: vectors (B, condition_features), or None for vectors of zeros.

        Returns:
            Embedding (B, width).
        """
        features: Tensor = self.noise_features(noise_label).to(self.linear_1.weight.dtype)
        classes = None
        if self.classes is not None and class_labels is not None:
            classes = self.classes(class_labels)
        if classes is not None and not self.late_classes:
            features = features + classes
        if self.condition is not None and condition is not None:
            features = features + self.condition(condition)
        emb: Tensor = self.linear_2(self.activation(self.linear_1(features)))
        if classes is not None and self.late_classes:
            emb = emb + classes
        return self.activation(emb)


class SigmaTable(nn.Module):
    """The noise level of a numbered label.

    Args:
        sigmas: noise levels by number.

    Raises:
        ValueError: if a noise level is not positive and finite.
    """

    sigmas: Tensor

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
            raise ValueError(f"sigmas must be positive, finite numbers, got {list(sigmas)[:6]}")
        self.values = tuple(sigmas)
        # Part of the configuration, not of the state.
        self.register_buffer("sigmas", self._table(torch.device("cpu")), persistent=False)

    def _table(self, device: torch.device) -> Tensor:
        exact = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(self.values, dtype=exact, device=device)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Noise levels move with the network; its precision is not theirs.
        device = fn(self.sigmas.new_empty(0, dtype=torch.float32)).device
        self.sigmas = self._table(device)
        return self

    @override
    def forward(self, noise_label: Tensor) -> Tensor:
        """Look up noise levels.

        Args:
            noise_label: numbers (B,) of noise levels, which may be floating-point.

        Returns:
            Noise levels (B,).

        Raises:
            ValueError: if a label is out of range, on the CPU.
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
    """Make the embedding of the networks of Song et al., with all classes and conditions early.

    Args:
        kind: what it is made of: "fourier", "fourier_linear" or "positional"; None for none.
        width: width of the network; the embedding has four times as many channels.
        style: whose initialiser and activation are taken.
        fourier_scale: standard deviation of the frequencies of Fourier features.
        num_classes: number of classes, or None.
        condition_features: size of the condition vector, or None.

    Returns:
        The embedding, or None.
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
