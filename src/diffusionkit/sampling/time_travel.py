"""Time travel: going back to more noise and sampling the same segment again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .._checks import check_count
from .._coefficients import add_noise
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, Step
from ..random import Generators, randn_like


@dataclass(frozen=True)
class TimeTravel:
    r"""Sampling every segment of a grid several times: RePaint's resampling.

    After each `jump` steps the forward process takes the state back to where they began,

    .. math::
        x_t = \frac{\alpha_t}{\alpha_s} x_s + \mathrm{std}\, z, \quad p(x_t \mid x_s), \quad s < t,

    and the steps are taken again, `repeats` times in all. The distribution of an unconstrained run
    does not change; with a constraint, the known part is carried back with the state, and the
    unknown part becomes consistent with it. The last segment may be shorter. N steps cost as many
    evaluations as repeats * N.

    Args:
        jump: the number of steps of a segment. Short segments mix locally, long ones globally.
        repeats: the number of times each is sampled; 1 is sampling without time travel.

    Raises:
        ValueError: unless jump >= 1 and repeats >= 1.
        TypeError: if jump or repeats is not an integer.

    Source: Lugmayr et al., RePaint: Inpainting using Denoising Diffusion Probabilistic Models,
    2022, arXiv 2201.09865 (section 4.2).

    >>> from diffusionkit import TimeTravel
    >>> TimeTravel(jump=2, repeats=2).steps(0, 3)
    [(0, 1), (1, 2), (2, 0), (0, 1), (1, 2), (2, 3), (3, 2), (2, 3)]
    """

    jump: int = 10
    repeats: int = 10

    def __post_init__(self) -> None:
        check_count(self.jump, "jump")
        check_count(self.repeats, "repeats")

    def steps(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the steps between two points of the grid, as pairs of points."""
        check_count(first, "first", least=0)
        check_count(last, "last", least=first, most=2**20)
        steps: list[tuple[int, int]] = []
        for start in range(first, last, self.jump):
            end = min(start + self.jump, last)
            segment = list(pairwise(range(start, end + 1)))
            steps += segment + (self.repeats - 1) * [(end, start), *segment]
        return steps


def travel_back(
    x: Tensor,
    sde: ForwardSDE,
    s: Tensor,
    t: Tensor,
    *,
    s_noise: float = 1.0,
    generator: Generators = None,
) -> Step:
    """Take a state x (B, *D) from a time s () to a later one t () by the forward process.

    Its noise is multiplied by s_noise.
    """
    ends = torch.stack([s, t]).to(home(sde), schedule_dtype(home(sde)))
    scale, std = (c.item() for c in sde.transition(ends[:1], ends[1:]))
    mean = x * scale
    return Step(add_noise(mean, s_noise * std, randn_like(x, generator)), mean)
