"""Exact models of data whose posteriors are known: Gaussians, and mixtures with classes."""

import torch

from diffusionkit import GaussianMixtureModel, Prediction, ScoreModel

DOUBLE = torch.float64


class GaussianOracle(ScoreModel):
    """The exact model of data from N(mean, cov), cov (d, d) in full."""

    def __init__(self, sde, mean, cov):
        super().__init__()
        self.sde = sde
        self.mean, self.cov = (torch.as_tensor(part, dtype=DOUBLE) for part in (mean, cov))

    def predict(self, x, t, **cond):
        alpha, sigma = (c.view(-1, 1, 1) for c in self.sde.marginal(t.double()))
        total = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=DOUBLE)
        diff = x.double().unsqueeze(2) - alpha * self.mean.unsqueeze(1)
        white = torch.linalg.solve(total, diff)
        x0 = self.mean + (alpha * self.cov @ white).squeeze(2)
        eps = (sigma * white).squeeze(2)
        return Prediction(x, x0.to(x.dtype), eps.to(x.dtype), alpha.flatten(), sigma.flatten())

    def posterior(self, A, y, noise_std):
        """The law of the data given y = A x0 + noise."""
        gain = (
            self.cov
            @ A.T
            @ torch.linalg.inv(A @ self.cov @ A.T + noise_std**2 * torch.eye(len(A), dtype=DOUBLE))
        )
        mean = self.mean + gain @ (y - A @ self.mean)
        return GaussianOracle(self.sde, mean, self.cov - gain @ A @ self.cov)


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
        """The logarithms of the joint densities of state and class, the true logits."""
        priors = [self.weights[rows].sum().log() for rows in self.rows]
        logs = [m.log_prob(x, t) + p for m, p in zip(self.of_class, priors, strict=True)]
        return torch.stack(logs, 1)

    def score(self, x, t, y):
        """The score of the data of each sample's class."""
        both = torch.stack([m(x, t) for m in self.of_class])
        return both[y, torch.arange(len(x))]


class ClassModel(ScoreModel):
    """The exact model of the data of the class asked for; 2, or none, is all of them."""

    def __init__(self, sde):
        super().__init__()
        known = Classes(sde)
        self.sde = sde
        self.parts = torch.nn.ModuleList([*known.of_class, known.model])

    def predict(self, x, t, class_labels=None):
        class_labels = torch.full((len(x),), 2) if class_labels is None else class_labels
        prediction = [part.predict(x, t) for part in self.parts]
        at = class_labels, torch.arange(len(x))
        x0, eps = (
            torch.stack([getattr(s, name) for s in prediction])[at] for name in ("x0", "eps")
        )
        return Prediction(x, x0, eps, prediction[0].alpha, prediction[0].sigma)


def states(sde, n, dims=2):
    """Times (n,) over all of a process, and states (n, dims) there."""
    ends = sde.log_snr(torch.tensor([max(sde.t_min, sde.t_stop), sde.T], dtype=DOUBLE))
    t = sde.time_at_log_snr(ends[0] + (ends[1] - ends[0]) * torch.linspace(0.05, 0.95, n).double())
    x0 = torch.randn(n, dims, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return sde.perturb(x0, t, generator=torch.Generator().manual_seed(2)).x, t
