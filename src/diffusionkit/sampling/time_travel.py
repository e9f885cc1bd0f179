"""Time travel: going back to more noise and sampling the same stretch again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .._checks import check_count
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE, Step
from ..random import Generators, randn_like
from ..values import add_noise


@dataclass(frozen=True)
class TimeTravel:
    r"""Every stretch of a grid is sampled several times: RePaint's resampling.

    After each `jump` steps the state goes back to where they began, by the forward process,

    .. math::
        x_t = \frac{\alpha_t}{\alpha_s} x_s + \mathrm{std}\, z, \quad p(x_t \mid x_s), \quad s < t,

    and takes them again, until they have been taken `repeats` times. The law of an unconstrained
    run stays as it is; what a constraint has put into the state is carried back with it, and so
    the unknown part comes to agree with the known one. A stretch that is left over at the end is
    shorter. N steps cost repeats * N steps' evaluations.

    Args:
        jump: how many steps a stretch has. Short ones mix locally, long ones globally.
        repeats: how many times it is sampled in all; 1 is sampling without travel.

    Raises:
        ValueError: unless jump >= 1 and repeats >= 1.
        TypeError: if one of them is not an integer.

    Source: Lugmayr et al., RePaint: Inpainting using Denoising Diffusion Probabilistic Models,
    2022, arXiv 2201.09865 (section 4.2).

    >>> TimeTravel(jump=2, repeats=2).moves(0, 3)
    [(0, 1), (1, 2), (2, 0), (0, 1), (1, 2), (2, 3), (3, 2), (2, 3)]
    """

    jump: int = 10
    repeats: int = 10

    def __post_init__(self) -> None:
        check_count(self.jump, "jump")
        check_count(self.repeats, "repeats")

    def moves(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the moves, from which point of the grid to which, between two of its points."""
        moves: list[tuple[int, int]] = []
        for start in range(first, last, self.jump):
            end = min(start + self.jump, last)
            stretch = list(pairwise(range(start, end + 1)))
            moves += stretch + (self.repeats - 1) * [(end, start), *stretch]
        return moves


def travel_back(
    x: Tensor, sde: ForwardSDE, s: Tensor, t: Tensor, *, generator: Generators = None
) -> Step:
    """Move a state x (B, *D) from a time s () to a later one t (), by the forward process."""
    ends = torch.stack([s, t]).to(home(sde), schedule_dtype(home(sde)))
    scale, std = (c.item() for c in sde.transition(ends[:1], ends[1:]))
    mean = x * scale
    return Step(add_noise(mean, std, randn_like(x, generator)), mean)
