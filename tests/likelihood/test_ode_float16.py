"""Likelihoods through networks in float16, whose gradients overflow unless they are scaled."""

import pytest
import torch
from torch import nn

from diffusionkit import VESDE, EpsModel, ExactDivergence, Hutchinson, ODELikelihood, RawScoreModel


class Gaussian(nn.Module):
    """The exact score, or noise, of N(0, 1) data under VE."""

    def __init__(self, dtype: torch.dtype, *, score: bool) -> None:
        super().__init__()
        self.weight, self.score = nn.Parameter(torch.ones(1, dtype=dtype)), score

    def forward(self, x, sigma):
        factor = -1 / (1 + sigma**2) if self.score else sigma / (1 + sigma**2)
        return (self.weight * x).mul(factor.to(x.dtype).unsqueeze(1))


@pytest.mark.parametrize("divergence", [Hutchinson(), ExactDivergence()], ids=repr)
@pytest.mark.parametrize(("kind", "sigma_max"), [(RawScoreModel, 50.0), (EpsModel, 300.0)])
def test_log_densities_of_networks_in_float16(kind, sigma_max, divergence) -> None:
    """The velocity is up to sigma (1 + sigma^2) times as large as the output."""
    sde, x = VESDE(sigma_max=sigma_max), torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    label = lambda sde, t: sde.marginal(t.double())[1]  # noqa: E731
    score = kind is RawScoreModel

    def log_prob(dtype):
        model = kind(Gaussian(dtype, score=score), sde, label=label)
        return ODELikelihood(model, divergence=divergence, rtol=1e-2, atol=1e-2)(x).log_prob

    found, wanted = log_prob(torch.float16), log_prob(torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
