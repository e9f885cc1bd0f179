"""Processes for the checks of `diffusionkit.testing`, built-in ones and a user's own."""

import torch

from diffusionkit import EDMSDE, VESDE, VPSDE, ForwardSDE, ScoreModel, SubVPSDE


class Cosine(ForwardSDE):
    """Nichol and Dhariwal's schedule up to t = .99, defined by `marginal` alone."""

    T = 0.99

    def marginal(self, t):
        return torch.cos(0.5 * torch.pi * t), torch.sin(0.5 * torch.pi * t)


class Linear(ForwardSDE):
    """The interpolation of flow matching: alpha = 1 - t, sigma = t."""

    T, t_min = 0.999, 1e-3

    def marginal(self, t):
        return 1 - t, t


def class_name(value: object) -> str:
    """Return the class name of a process or model as a test id, or nothing."""
    return type(value).__name__ if isinstance(value, (ForwardSDE, ScoreModel)) else ""


PROCESSES = [
    VPSDE(),
    VPSDE(1.0, 30.0),
    SubVPSDE(),
    VESDE(),
    VESDE(1e-3, 1e3),
    EDMSDE(),
    EDMSDE(1e-4, 2e3),
    Cosine(),
    Linear(),
]
