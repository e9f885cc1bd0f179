"""A residual multi-layer perceptron for vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .._checks import check_count
from .._repr import configuration
from ._arguments import (
    check_class_labels,
    check_counts,
    check_noise_label,
    check_optional_counts,
    network_condition,
    network_input,
)
from .config import remembers
from .embeddings import ConditionEmbedding, SignedLogEmbedding
from .layers import linear

_LABEL_FEATURES = 32


class _ResidualLayer(nn.Module):
    """Residual branch of two linear layers on the normalized input, modulated by the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = linear(width, 2 * width)
        self.linear_1 = linear(width, width)
        self.linear_2 = linear(width, width, scale=0)

    @override
    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        r: Tensor = self.linear_1(self.norm(h) * (1 + scale) + shift)
        r = self.linear_2(F.silu(r))
        return h + r


class MLP(nn.Module):
    r"""Residual multi-layer perceptron for vectors, conditioned on a noise label.

    .. math::
        h &\leftarrow h + L_2(\mathrm{SiLU}(L_1(\mathrm{LN}(h) \odot (1 + a) + b))), \qquad
        (a, b) = L(\mathrm{emb})

    for each of `depth` layers, between a linear input layer and a normalized, almost zero linear
    output layer. A condition vector is concatenated to the input. The noise label l is embedded as
    asinh(l) by sines of frequency 1/4 to 16: linear for \|l\| < 1 and logarithmic beyond, so
    labels of either sign and of magnitude 1e-2 to 1e3 work equally well (999 t, log sigma / 4 or
    sigma).

    Args:
        features: size F of the input vectors.
        out_features: size of the output vectors; F if None.
        width: number of hidden units, at least 2.
        depth: number of residual layers, of two linear maps each.
        num_classes: number of classes, or None for a network without classes.
        condition_features: size of a condition vector, such as an observation, or None.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if an argument is out of range.

    Source: feature-wise modulation of E. Perez et al., FiLM: Visual Reasoning with a
    General Conditioning Layer, 2018, arXiv 1709.07871.

    >>> import torch
    >>> from diffusionkit.networks import MLP
    >>> net = MLP(2, num_classes=3)
    >>> x, t = torch.randn(5, 2), torch.rand(5)
    >>> net(x, 999 * t, class_labels=torch.tensor([0, 1, 2, 0, 1])).shape
    torch.Size([5, 2])

    A network of p(theta | x), for one observation of three numbers:

    >>> net = MLP(2, condition_features=3)
    >>> net(x, 999 * t, condition=torch.randn(3)).shape
    torch.Size([5, 2])
    """

    config: dict[str, Any]

    @remembers
    def __init__(
        self,
        features: int,
        *,
        out_features: int | None = None,
        width: int = 128,
        depth: int = 3,
        num_classes: int | None = None,
        condition_features: int | None = None,
    ) -> None:
        super().__init__()
        out_features = features if out_features is None else out_features
        check_counts(features=features, out_features=out_features, depth=depth, width=width)
        check_count(width, "width", least=2)  # normalizing a single unit would yield zero
        check_optional_counts(condition_features=condition_features)
        self.features = features
        self.num_classes = num_classes
        self.condition_features = condition_features
        self.embedding = ConditionEmbedding(
            SignedLogEmbedding(_LABEL_FEATURES), _LABEL_FEATURES, width, num_classes=num_classes
        )
        self.input = linear(features + (condition_features or 0), width)
        self.layers = nn.ModuleList(_ResidualLayer(width) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)
        self.output = linear(width, out_features, scale=0)

    @override
    def extra_repr(self) -> str:
        return ", ".join(configuration(self))

    @override
    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_labels: Tensor | None = None,
        *,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: input (B, features).
            noise_label: noise label (B,).
            class_labels: class labels (B,), int64, if and only if the network has classes.
            condition: condition vectors (B, condition_features), or (condition_features,) for one
                that all samples have, if and only if the network takes them.

        Returns:
            Output (B, out_features).

        Raises:
            TypeError: if a dtype is wrong, or class labels or condition are missing or unexpected.
            ValueError: if a shape, a device or a class label is wrong.
        """
        x = network_input(x, self.features, 0, self.input.weight)
        check_noise_label(x, noise_label)
        check_class_labels(x, class_labels, self.num_classes)
        condition = network_condition(x, condition, self.condition_features, required=True)
        emb = self.embedding(noise_label, class_labels)
        h: Tensor = self.input(x if condition is None else torch.cat([x, condition.to(x)], 1))
        for layer in self.layers:
            h = layer(h, emb)
        h = self.output(F.silu(self.output_norm(h)))
        return h
