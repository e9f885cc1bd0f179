"""Models with exactly known scores, for testing, teaching and developing solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from .._checks import (
    check_count,
    check_finite,
    check_floating_dtype,
    check_known,
    check_part,
    check_state,
    check_times,
    numbers,
)
from .._coefficients import expand
from .._keywords import check_foreign
from .._precision import at_least_float32
from .._schedules import exact, schedule_dtype
from ..interfaces import ForwardSDE, ScoreModel
from ..random import Generators, rand, randn
from ..values import Prediction


def _least(x: Tensor) -> float:
    """Return the least of standard deviations whose squares and ratios are finite."""
    return 1e-100 if x.dtype == torch.float64 else 1e-15


class _ExactModel(ScoreModel):
    """A model whose buffers are in float64, or in float32 on a device without it."""

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                x = x.to(schedule_dtype(fn(x.new_empty(0, dtype=torch.float32)).device))
            return fn(x)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


def _check_query(sde: ForwardSDE, x: Tensor, t: Tensor, points: Tensor) -> None:
    """Raise unless x (B, *D) is a state at times t (B,) with the shape D of points (n, *D)."""
    check_state(x)
    check_times(t, sde.T, x.shape[0], x)
    if x.shape[1:] != points.shape[1:]:
        shape = tuple(points.shape[1:])
        raise ValueError(f"x: expected shape (B, *{shape}), got {tuple(x.shape)}")


class GaussianMixtureModel(_ExactModel):
    r"""The exact score model of a mixture of isotropic Gaussians.

    .. math::
        p_t(x) = \sum_k w_k N(x; \alpha m_k, V_k I), \quad V_k = \alpha^2 s_k^2 + \sigma^2, \quad
        \epsilon = \sum_k r_k(x) \frac{\sigma (x - \alpha m_k)}{V_k}

    with the posterior weights r_k of the components. Always computed in float64
    where the device has it.

    Args:
        sde: the forward process.
        means: the means m_k (K, *D).
        stds: the standard deviations s_k (K,), 0 allowed.
        weights: the weights w_k (K,), normalized automatically; equal by default.

    Raises:
        ValueError: if shapes do not match, a standard deviation or a weight is negative, or no
            weight is positive.

    >>> import torch
    >>> from diffusionkit import VPSDE, GaussianMixtureModel
    >>> model = GaussianMixtureModel(VPSDE(), [[-2.0], [2.0]], [0.5, 0.5])
    >>> model(torch.zeros(1, 1), torch.tensor([0.5]))
    tensor([[-0.]])
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        sde: ForwardSDE,
        means: Tensor | Sequence[Any],
        stds: Tensor | Sequence[float],
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Store the mixture in float64."""
        super().__init__()
        check_part(sde, ForwardSDE, "sde")
        self.sde = sde
        m, s = numbers(means, "means"), numbers(stds, "stds")
        w = torch.ones_like(s) if weights is None else numbers(weights, "weights")
        if m.ndim < 2 or s.shape != m.shape[:1] or w.shape != s.shape:
            raise ValueError(
                "means, stds, weights: expected shapes (K, *D), (K,) and (K,), "
                f"got {tuple(m.shape)}, {tuple(s.shape)} and {tuple(w.shape)}"
            )
        for name, part in (("means", m), ("stds", s), ("weights", w)):
            check_finite(part, name)
        if (s < 0).any() or (w < 0).any() or not (w > 0).any():
            got = f"{s.tolist()} and {w.tolist()}"
            raise ValueError(
                f"stds, weights: expected stds >= 0 and weights >= 0, not all 0, got {got}"
            )
        here = means.device if isinstance(means, Tensor) else m.device
        for name, part in (("means", m), ("stds", s), ("weights", w / w.sum())):
            self.register_buffer(name, part.to(here, schedule_dtype(here)))

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return alpha, sigma (B, 1), variances, differences (B, K, d) and log joint densities."""
        alpha, sigma = (c.unsqueeze(1) for c in self.sde.marginal(exact(t)))
        # Not 0, without noise: the densities' ratios then select the nearest mean.
        variance = ((alpha * self.stds) ** 2 + sigma**2).clamp_min(_least(sigma) ** 2)
        diff = exact(x).flatten(1).unsqueeze(1) - alpha.unsqueeze(2) * self.means.flatten(1)
        d = diff.shape[2]
        log = torch.log(self.weights) - 0.5 * diff.square().sum(2) / variance
        return alpha, sigma, variance, diff, log - 0.5 * d * torch.log(2 * math.pi * variance)

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        check_foreign(self, cond)
        _check_query(self.sde, x, t, self.means)
        x = at_least_float32(x)
        alpha, sigma, variance, diff, log = self._components(x, t)
        weight = (torch.softmax(log, 1) / variance).unsqueeze(2)
        eps = sigma * (weight * diff).sum(1)
        # A separate sum for x0: (x - sigma eps) / alpha loses all digits where alpha is tiny.
        within = alpha.unsqueeze(2) * self.stds.square().unsqueeze(1) * diff
        means = self.means.flatten(1) * variance.unsqueeze(2)
        x0 = (weight * (means + within)).sum(1)
        eps, x0 = (y.view(x.shape).to(x.dtype) for y in (eps, x0))
        return Prediction(x, x0, eps, alpha.squeeze(1), sigma.squeeze(1))

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(x) in nats (B,), for a state x (B, *D) at times t (B,).

        In at least float32: the density of an image overflows float16.
        """
        _check_query(self.sde, x, t, self.means)
        return torch.logsumexp(self._components(x, t)[-1], 1).to(at_least_float32(x).dtype)

    def sample(
        self, n: int, *, generator: Generators = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Draw n data points from the mixture, (n, *D)."""
        check_count(n, "n")
        check_floating_dtype(dtype)
        device, exactly = self.means.device, self.means.dtype
        u = rand(n, generator=generator, device=device, dtype=exactly)
        edges = self.weights.cumsum(0)[:-1]
        k = torch.bucketize(u, edges, right=True)
        noise = randn((n, *self.means.shape[1:]), generator=generator, device=device, dtype=exactly)
        x: Tensor = self.means[k] + expand(self.stds[k], noise) * noise
        return x.to(dtype or torch.get_default_dtype())


class EmpiricalModel(_ExactModel):
    r"""The optimal model of a finite data set, which a network of unlimited capacity would learn.

    .. math::
        x_0(x) = \sum_i r_i x_i, \quad
        r = \mathrm{softmax}_i\!\left(-\|x - \alpha x_i\|^2 / (2 \sigma^2)\right)

    Computed in float64 as matrix products over blocks of the data, so memory grows with B times
    the block size and not with B N D.

    Args:
        sde: the forward process.
        data: the data set (N, *D).
        block: the number of data points per block.

    Raises:
        ValueError: if the data set is empty, not finite or one-dimensional.
        TypeError: if data is not a floating-point tensor.

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    2022, arXiv 2206.00364 (appendix B.3).

    >>> import torch
    >>> from diffusionkit import VESDE, EmpiricalModel
    >>> model = EmpiricalModel(VESDE(), torch.tensor([[-1.0], [1.0]]))
    >>> model.predict(torch.tensor([[0.9]]), torch.tensor([0.0])).x0
    tensor([[1.]])
    """

    data: Tensor
    _center: Tensor

    def __init__(self, sde: ForwardSDE, data: Tensor, *, block: int = 8192) -> None:
        """Store the data in float64."""
        super().__init__()
        check_part(sde, ForwardSDE, "sde")
        check_state(data, "data")
        check_known(data, "data")
        check_finite(data, "data")
        check_count(block, "block")
        if data.ndim < 2:
            raise ValueError(f"data: expected shape (N, *D), got {tuple(data.shape)}")
        self.sde = sde
        self.block = block
        self.register_buffer("data", exact(data.detach()))
        # Relative to any point amid the data, a large common value costs no digits.
        self.register_buffer("_center", self.data.mean(0).flatten(), persistent=False)

    @override
    def predict(self, x: Tensor, t: Tensor, /, **cond: Any) -> Prediction:
        check_foreign(self, cond)
        _check_query(self.sde, x, t, self.data)
        x = at_least_float32(x)
        alpha, sigma = (c.unsqueeze(1) for c in self.sde.marginal(exact(t)))
        noise, sigma = (
            sigma,
            sigma.clamp_min(_least(sigma)),
        )
        query = exact(x).flatten(1) - alpha * self._center
        blocks = (rows - self._center for rows in torch.split(self.data.flatten(1), self.block))
        # Squared distances over -2 sigma^2, up to a term independent of i.
        parts = (
            (alpha * (query @ rows.T - 0.5 * alpha * rows.square().sum(1)) / sigma**2, rows)
            for rows in blocks
        )
        mean = softmax_mean(parts)
        eps = torch.where(noise > 0, (query - alpha * mean) / sigma, 0.0)
        eps, x0 = (y.view(x.shape).to(x.dtype) for y in (eps, mean + self._center))
        return Prediction(x, x0, eps, alpha.squeeze(1), noise.squeeze(1))


def softmax_mean(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    r"""Return the softmax-weighted mean, (B, D), of values given in parts.

    .. math::
        \frac{\sum_k e^{l_{bk}} v_k}{\sum_k e^{l_{bk}}}

    Args:
        parts: logits (B, m), with values (m, D), or (B, m, D) if they differ by row. A logit of
            minus infinity excludes a value; every row must include at least one. The logits are
            overwritten where no gradients are recorded.
    """
    top: Tensor | None = None
    total: Any = 0.0
    mean: Any = 0.0
    for logits, values in parts:
        peak = (logits.detach() if logits.requires_grad else logits).amax(1, keepdim=True)
        # Finite: no inf - inf.
        peak = peak.clamp_min(torch.finfo(torch.float32).min) if top is None else peak.maximum(top)
        # Weights that are effectively 0 stay normal numbers: exponentials that underflow take five
        # times as long on a CPU.
        least = math.log(torch.finfo(logits.dtype).tiny) + 1
        shifted = logits - peak if torch.is_grad_enabled() else logits.sub_(peak)
        weights = shifted.clamp_min_(least).exp_()
        part = weights @ values if values.ndim == 2 else (weights.unsqueeze(1) @ values).squeeze(1)
        if top is None:
            total, mean = weights.sum(1, keepdim=True), part
        else:
            decay = torch.exp(top - peak)
            total = decay * total + weights.sum(1, keepdim=True)
            mean = decay * mean + part
        top = peak
    found: Tensor = mean / total
    return found
