"""The default grid of multistep solvers: good in few steps, convergent in many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_count, check_part, check_positive
from .._log_snr import with_signal
from .._schedules import home, schedule_dtype
from ..interfaces import ForwardSDE
from .grids import MOST_STEPS


@dataclass(frozen=True)
class TangentGrid:
    r"""Times equally spaced in an angle: most steps where the noise is as large as the data.

    .. math::
        \frac{\sigma}{\alpha} = \mathrm{scale} \cdot \tan(\phi)^{\mathrm{power}},
        \qquad \phi_k = \phi_T\, (1 - k / N)

    down to time 0. Steps in log-SNR are shortest where sigma / alpha is `scale`, where images form,
    and longer at both ends. The last ratio before 0 falls as N^-power, so that the error of the
    step from there to 0, which is proportional to the square of the ratio, falls as N^(-2 power);
    the ratio is never less than at the process's t_stop. At power 1 and scale 1 the angle is that
    of `ProbabilityFlow`; larger powers come closer to equal steps in log-SNR.

    It is the default of multistep solvers, `DPMSolver2S` and `DPMSolver2SAncestral`. Where
    alpha(T) = 0 the first time is T, and the others are spaced from sigma / alpha = 160. If
    sigma(0) > 0, as in a `VESDE`, a sampler removes the noise that remains there.

    Args:
        scale: the ratio sigma / alpha around which steps are shortest; about the standard deviation
            of the data.
        power: the exponent.

    Raises:
        ValueError: unless scale and power are finite and positive.
        TypeError: if one of them is not a number.

    >>> from diffusionkit import EDMSDE, TangentGrid
    >>> for steps in (4, 8):
    ...     times = TangentGrid()(EDMSDE(), steps)
    ...     print([round(s, 2) for s in times.tolist()])
    [80.0, 2.3, 0.66, 0.18, 0.0]
    [80.0, 6.04, 2.3, 1.18, 0.66, 0.36, 0.18, 0.06, 0.0]
    """

    scale: float = 0.7
    power: float = 1.5

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")
        check_positive(self.power, "power")

    def __call__(self, sde: ForwardSDE, steps: int) -> Tensor:
        """Return decreasing times (steps + 1,) in float64, where the process's device has it.

        Raises:
            ValueError: unless steps >= 1.
        """
        check_part(sde, ForwardSDE, "sde")
        check_count(steps, "steps", most=MOST_STEPS)
        here = home(sde)
        ends = torch.tensor([sde.T, sde.t_stop], dtype=schedule_dtype(here), device=here)
        ratios = torch.exp(-0.5 * with_signal(sde.log_snr(ends).detach()))
        first, stop = torch.atan((ratios / self.scale) ** (1 / self.power))
        last = (first / steps).maximum(stop).minimum(first)
        angles = torch.lerp(first, last, torch.linspace(0, 1, steps).to(ends))
        ratio = self.scale * torch.tan(angles) ** self.power
        times = sde.time_at_log_snr(-2 * torch.log(ratio)).detach()
        times[0] = ends[0]
        return torch.cat([times, times.new_zeros(1)])
