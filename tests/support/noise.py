"""Noise that a test gives to a predictor."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusionkit.random import NoisePath


class GivenNoise(NoisePath):
    """The given noise in every step, or that of a function of the step number 1, 2, ..."""

    def __init__(self, noise: Tensor | Callable[[int], Tensor], batch: int | None = None) -> None:
        self.noise, self.steps = noise, 0
        self.batch = len(noise) if isinstance(noise, Tensor) else batch

    def __len__(self):
        return self.batch

    def __getitem__(self, index):
        return ([torch.Generator()] * self.batch)[index]

    def increment(self, x, sde, t, s):
        self.steps += 1
        noise = self.noise if isinstance(self.noise, Tensor) else self.noise(self.steps)
        return noise.view_as(x).clone()
