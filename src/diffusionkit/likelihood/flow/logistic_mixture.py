r"""The map x -> logit F(x) of a mixture of logistics with distribution function F.

.. math::
    F(x) = \sum_k \pi_k \, \mathrm{sigmoid}(z_k), \quad z_k = (x - \mu_k) / s_k.

F itself rounds to 0 or 1 a few scales from the center. Its logarithm and that of 1 - F do not, so
their difference, the logit, is accurate on the whole real line. The slope follows from
1 / (F (1 - F)) = 1 / F + 1 / (1 - F), with positive terms only:

.. math::
    \frac{dy}{dx} = \sum_k \frac{1}{s_k} \left(
        \frac{\pi_k \mathrm{sigmoid}(z_k)}{F} \mathrm{sigmoid}(-z_k)
        + \frac{\pi_k \mathrm{sigmoid}(-z_k)}{1 - F} \mathrm{sigmoid}(z_k) \right).

Source: Ho et al., Flow++, 2019, arXiv 1902.00275 (section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True, eq=False)
class LogisticMixture:
    """A mixture of K logistics for each element of a state (B, *D).

    Args:
        logits: the logarithms of the weights, up to a constant, (K, B, *D).
        means: the means (K, B, *D).
        log_scales: the logarithms of the scales (K, B, *D).
    """

    logits: Tensor
    means: Tensor
    log_scales: Tensor

    def logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = logit F(x) and log dy/dx, each (B, *D), at x (B, *D)."""
        below, above = self._logs(x)
        # The weights need no normalization: a constant in the logits cancels.
        lower, upper = self.logits + below, self.logits + above
        y = lower.logsumexp(0) - upper.logsumexp(0)
        log_slope = torch.logaddexp(
            (lower.log_softmax(0) + above - self.log_scales).logsumexp(0),
            (upper.log_softmax(0) + below - self.log_scales).logsumexp(0),
        )
        return y, log_slope

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x (B, *D) at which logit F(x) = y (B, *D), differentiable once.

        The root lies between those of the components, mu_k + s_k y, and is found by bisection.
        """
        with torch.no_grad():
            low, high = (self.means + self.log_scales.exp() * y).aminmax(dim=0)
            # Enough for a root near 0 in a bracket as wide as the largest |y|.
            for _ in range(2 * torch.finfo(y.dtype).bits):
                middle = 0.5 * (low + high)
                below, above = self._logs(middle)
                under = (self.logits + below).logsumexp(0) - (self.logits + above).logsumexp(0) < y
                low, high = torch.where(under, middle, low), torch.where(under, high, middle)
            x = 0.5 * (low + high)
        found, log_slope = self.logit(x)
        # Adds 0, with the derivatives of the root by the implicit function theorem.
        error = (y - y.detach()) - (found - found.detach())
        return x + error * torch.exp(-log_slope.detach().clamp_min(-80.0))

    def _logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log F_k and log(1 - F_k) of each component, (K, B, *D)."""
        z = (x - self.means) * torch.exp(-self.log_scales)
        return logsigmoid(z), logsigmoid(-z)
