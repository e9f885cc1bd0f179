"""Exact models of data whose posteriors are known: Gaussians, and mixtures with classes."""

import torch

from diffusionkit import GaussianMixtureModel, Prediction, ScoreModel
from support import seeded

DOUBLE = torch.float64


def randn64(*shape, seed=0):
    """Return standard normal numbers in float64."""
    return torch.randn(shape, generator=seeded(seed), dtype=DOUBLE)


class GaussianOracle(ScoreModel):
    """The exact model of data from N(mean, cov): mean (*D), cov over its flattened entries."""

    def __init__(self, sde, mean, cov):
        super().__init__()
        self.sde = sde
        self.mean, self.cov = (torch.as_tensor(part, dtype=DOUBLE) for part in (mean, cov))
        variances, self.axes = torch.linalg.eigh(self.cov)
        self.variances = torch.where(variances > 1e-14 * variances[-1], variances, 0.0)

    def predict(self, x, t, **cond):
        alpha, sigma = (c.unsqueeze(1) for c in self.sde.marginal(t.double()))
        mean = self.mean.flatten()
        white = (x.double().flatten(1) - alpha * mean) @ self.axes
        white = white / (alpha**2 * self.variances + sigma**2)
        x0 = mean + (alpha * self.variances * white) @ self.axes.T
        eps = sigma * white @ self.axes.T
        x0, eps = (part.view_as(x).to(x.dtype) for part in (x0, eps))
        return Prediction(x, x0, eps, alpha.flatten(), sigma.flatten())

    def posterior(self, A, y, noise_std=0.0):
        """Return the model of the data given y = A x0 + noise."""
        total = A @ self.cov @ A.T + noise_std**2 * torch.eye(len(A), dtype=DOUBLE)
        gain = self.cov @ A.T @ torch.linalg.inv(total)
        mean = self.mean.flatten() + gain @ (y - A @ self.mean.flatten())
        return GaussianOracle(self.sde, mean.view_as(self.mean), self.cov - gain @ A @ self.cov)


class Classes:
    """Three Gaussians in the plane and two classes: the first two are class 0, the third is 1."""

    means = torch.tensor([[-1.0, 0.5], [-0.5, -1.0], [0.8, 0.2]], dtype=DOUBLE)
    stds = torch.tensor([0.25, 0.2, 0.4], dtype=DOUBLE)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    rows = ([0, 1], [2])

    def __init__(self, sde):
        self.sde = sde
        self.model = self._mixture([0, 1, 2])
        self.of_class = [self._mixture(rows) for rows in self.rows]

    def _mixture(self, rows):
        return GaussianMixtureModel(self.sde, self.means[rows], self.stds[rows], self.weights[rows])

    def classifier(self, x, t):
        """Return the true logits, the log joint densities of state and class."""
        priors = [self.weights[rows].sum().log() for rows in self.rows]
        logs = [m.log_prob(x, t) + p for m, p in zip(self.of_class, priors, strict=True)]
        return torch.stack(logs, 1)

    def score(self, x, t, class_labels):
        """Return the score of the data of each sample's class."""
        both = torch.stack([m(x, t) for m in self.of_class])
        return both[class_labels, torch.arange(len(x))]


class ClassModel(ScoreModel):
    """The exact class-conditional model; class 2, or no condition, is all data."""

    def __init__(self, sde):
        super().__init__()
        classes = Classes(sde)
        self.sde = sde
        self.parts = torch.nn.ModuleList([*classes.of_class, classes.model])

    def predict(self, x, t, class_labels=None):
        class_labels = torch.full((len(x),), 2) if class_labels is None else class_labels
        parts = [part.predict(x, t) for part in self.parts]
        at = class_labels, torch.arange(len(x))
        x0, eps = (torch.stack([getattr(p, name) for p in parts])[at] for name in ("x0", "eps"))
        return Prediction(x, x0, eps, parts[0].alpha, parts[0].sigma)


def random_states(sde, n, dims=2):
    """Return noisy states (n, dims) and their times (n,), from all of a process."""
    ends = sde.log_snr(torch.tensor([max(sde.t_min, sde.t_stop), sde.T], dtype=DOUBLE))
    ends = ends.clamp_min(-10.0)  # of a process without signal at T
    t = sde.time_at_log_snr(ends[0] + (ends[1] - ends[0]) * torch.linspace(0.05, 0.95, n).double())
    return sde.perturb(randn64(n, dims, seed=1), t, generator=seeded(2)).x, t
