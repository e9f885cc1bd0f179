"""The handwritten digits of scikit-learn, and quality measures for samples of them.

1797 real images of 8x8 pixels with values from 0 to 16. Other examples import this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from helpers import energy_distance
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

SHAPE = (1, 8, 8)
CONFIDENT = 0.9  # the class probability from which a classification counts as confident

Pixels = NDArray[np.float64]


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) scaled to [-1, 1], and the classes of the training images (n,)."""

    train: Tensor
    test: Tensor
    class_labels: Tensor


def load() -> Digits:
    """Return the digits, split 80:20 into training and test images with a fixed seed."""
    images, class_labels = load_digits(return_X_y=True)
    train, test, class_labels, _ = train_test_split(
        images, class_labels, test_size=0.2, random_state=0, stratify=class_labels
    )
    return Digits(_scaled(train), _scaled(test), torch.tensor(class_labels))


def _scaled(images: Pixels) -> Tensor:
    return torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, *SHAPE)


def pixels(images: Tensor) -> Pixels:
    """Return images (n, 64) on the scale of the data set: integers from 0 to 16."""
    return np.asarray(((images.cpu().double().flatten(1) + 1) * 8).round().clamp(0, 16).numpy())


class Quality:
    """Quality measures of images (n, 64) with pixels from 0 to 16.

    Attributes:
        train: the training digits (n, 64).
        test: the test digits (m, 64).
    """

    def __init__(self, digits: Digits) -> None:
        """Fit the classifier to the training digits."""
        self.train, self.test = pixels(digits.train), pixels(digits.test)
        self._classifier = LogisticRegression(C=10, max_iter=1000)
        self._classifier.fit(self.train / 16, digits.class_labels.numpy())
        self._typical = np.median(self._nearest(self.test))

    def confident(self, images: Pixels) -> float:
        """Return the share of images that a logistic regression classifies confidently."""
        return float((self._classifier.predict_proba(images / 16).max(1) >= CONFIDENT).mean())

    def shares(self, images: Pixels) -> Pixels:
        """Return the share of images classified as each digit (10,)."""
        found = self._classifier.predict(images / 16)
        return np.asarray(np.bincount(found, minlength=10) / len(images))

    def energy_distance(self, images: Pixels) -> float:
        """Return the energy distance to the test digits, with pixels scaled to [0, 1]."""
        return energy_distance(torch.tensor(images / 16), torch.tensor(self.test / 16))

    def near_training(self, images: Pixels) -> float:
        """Return the share of images closer to the training digits than the median test digit."""
        return float((self._nearest(images) < self._typical).mean())

    def attainable_energy_distance(self, n: int, draws: int = 10) -> float:
        """Return the mean energy distance of random subsets of n training digits."""
        rng = np.random.default_rng(0)
        chosen = (rng.permutation(len(self.train))[:n] for _ in range(draws))
        return float(np.mean([self.energy_distance(self.train[rows]) for rows in chosen]))

    def gaussian(self, n: int) -> Pixels:
        """Return n samples of a Gaussian with the mean and covariance of the training digits."""
        rng = np.random.default_rng(0)
        draws = rng.multivariate_normal(self.train.mean(0), np.cov(self.train.T), n)
        return np.asarray(draws.round().clip(0, 16))

    def table(self, images: Pixels) -> str:
        """Return a table of samples against real digits and a fitted Gaussian."""
        sets = [images, self.test, self.gaussian(len(images))]
        confident = [f"{self.confident(y):.1%}" for y in sets]
        rarest = [f"{self.shares(y).min():.1%}" for y in sets]
        near = [f"{self.near_training(y):.1%}" for y in sets]
        energy = [f"{self.energy_distance(y):.4f}" for y in sets]
        energy[1] = f"{self.attainable_energy_distance(len(images)):.4f}"
        shares = [f"{digit}: {share:.1%}" for digit, share in enumerate(self.shares(images))]
        lines = [
            _row("", ["samples", "real", "Gaussian"]),
            _row(f"confidently classified (p >= {CONFIDENT})", confident),
            _row("share of the rarest digit", rarest),
            _row("closer to training data than test median", near),
            _row("energy distance to the test digits", energy),
            "",
            "class shares of the samples    " + "  ".join(shares),
            "real: test digits; for the energy distance, as many training digits as samples",
        ]
        return "\n".join(lines)

    def _nearest(self, images: Pixels) -> Pixels:
        return np.asarray(_distances(images, self.train).min(1))


def _distances(a: Pixels, b: Pixels) -> Pixels:
    return np.asarray(torch.cdist(torch.tensor(a / 16), torch.tensor(b / 16)).numpy())


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<40}" + "".join(f"{cell:>10}" for cell in cells)
