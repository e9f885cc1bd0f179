"""What a network makes of the label (time) and of the class it is given."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionkit.networks.layers import linear


def _as_float(label: Tensor) -> Tensor:
    # Labels reach 1e3: half precision cannot hold their sines' arguments.
    return label.to(torch.promote_types(label.dtype, torch.float32))


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
        features: Even number d of features, at least 4.

    Raises:
        ValueError: If `features` is odd or below 4.

    Source:
        A. Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762;
        in this form J. Ho et al., Denoising Diffusion Probabilistic Models, 2020,
        https://arxiv.org/abs/2006.11239.
    """

    def __init__(self, features: int) -> None:
        """Keep the number of features."""
        super().__init__()
        _check_features(features)
        self.features = features

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels.

        Args:
            label: Labels (B,).

        Returns:
            Features (B, features), float64 for float64 labels, else float32.
        """
        label = _as_float(label)
        half = self.features // 2
        index = torch.arange(half, dtype=label.dtype, device=label.device)
        angle = label[:, None] * torch.exp(index * (-math.log(1e4) / (half - 1)))
        return _sines(angle)


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
        features: Even number d of features, at least 4.

    Raises:
        ValueError: If `features` is odd or below 4.
    """

    def __init__(self, features: int) -> None:
        """Keep the number of features."""
        super().__init__()
        _check_features(features)
        self.features = features

    def forward(self, label: Tensor) -> Tensor:
        """Embed labels.

        Args:
            label: Labels (B,).

        Returns:
            Features (B, features), float64 for float64 labels, else float32.
        """
        label = _as_float(label)
        half = self.features // 2
        index = torch.arange(half, dtype=label.dtype, device=label.device)
        angle = label.asinh()[:, None] * torch.exp2(index * (6 / (half - 1)) - 2)
        return _sines(angle)


class ConditionEmbedding(nn.Module):
    r"""Embedding of a label and, if there are classes, of a class.

    .. math:: \mathrm{emb} = L_2(\mathrm{SiLU}(L_1(e(l)))) + E_{\mathrm{class}}

    Args:
        label_features: Module that maps labels (B,) to features (B, features).
        features: Number of those features.
        width: Number of embedding channels.
        num_classes: Number of classes, or None for no classes.
    """

    def __init__(
        self, label_features: nn.Module, features: int, width: int, num_classes: int | None
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.label_features = label_features
        self.linear_1 = linear(features, width)
        self.linear_2 = linear(width, width)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)

    def forward(self, label: Tensor, labels: Tensor | None) -> Tensor:
        """Embed labels and classes that have been checked already.

        Args:
            label: Labels (B,).
            labels: Classes (B,), int64, or None for a network without classes.

        Returns:
            Embedding (B, width).
        """
        features: Tensor = self.label_features(label)
        emb: Tensor = self.linear_1(features.to(self.linear_1.weight.dtype))
        emb = self.linear_2(F.silu(emb))
        if self.classes is not None and labels is not None:
            emb = emb + self.classes(labels)
        return emb
