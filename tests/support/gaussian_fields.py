"""Exact models of stationary Gaussian fields, along one axis or separable along several."""

from typing import Any

import torch

from diffusionkit import ForwardSDE, Prediction, ScoreModel


def covariance(n: int, length: float) -> torch.Tensor:
    """The covariance (n, n) of a stationary series of variance 1 (Matern, smoothness 3/2)."""
    at = torch.arange(n, dtype=torch.float64)
    far = (at[:, None] - at).abs() / length
    return (1 + far) * torch.exp(-far)


class GaussianFieldModel(ScoreModel):
    """The exact model of Gaussian fields (B, C, *size): x0 = alpha K (alpha^2 K + sigma^2)^-1 x.

    K is the product of a covariance along each axis.
    """

    def __init__(self, sde: ForwardSDE, size: tuple[int, ...], length: float) -> None:
        super().__init__()
        self.sde = sde
        spectra = [torch.linalg.eigh(covariance(n, length)) for n in size]
        self.axes = [vectors for _, vectors in spectra]
        variance = torch.ones((), dtype=torch.float64)
        for values, _ in spectra:
            variance = variance[..., None] * values
        self.variance_of_modes = variance

    def rotated(self, x: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        for k, vectors in enumerate(self.axes):
            turn = vectors if back else vectors.T
            x = torch.tensordot(x, turn.to(x), ([2 + k], [1])).movedim(-1, 2 + k)
        return x

    def predict(self, x: torch.Tensor, t: torch.Tensor, /, **cond: Any) -> Prediction:
        kernel = self.sde.perturbation_kernel(x, t)
        alpha, sigma = (c.view(-1, *(1,) * (x.ndim - 1)) for c in kernel)
        values = self.variance_of_modes
        modes = self.rotated(x.double())
        total = alpha**2 * values + sigma**2
        x0 = self.rotated(alpha * values / total * modes, back=True).to(x.dtype)
        return Prediction.from_x0(x, x0, *kernel)
