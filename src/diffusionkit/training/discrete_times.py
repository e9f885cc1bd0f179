"""Distributions of training times over the steps of a discrete chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .._batch_times import Drawn
from .._checks import check_count, check_number, check_state
from .._repr import Described
from .._schedules import schedule_dtype
from ..distributed._group import gather_rows
from ..interfaces import ForwardSDE
from ..random import Generators, draw
from ..sde.chain import at_steps
from .times import DrawnTimes


def _steps(sde: ForwardSDE) -> int:
    steps = getattr(sde, "steps", None)
    if not isinstance(steps, int):
        raise TypeError(f"sde: expected a chain of steps, such as DDPMChain, got {sde}")
    return steps


@dataclass(frozen=True)
class DiscreteTimes(DrawnTimes):
    r"""Independent times, uniform over the N steps t = (i + 1) / N of a chain; weight 1.

    The expected loss is the mean over the N steps, as in DDPM, not the mean over [t_min, T].

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

    >>> from diffusionkit import DDPMChain, DiscreteTimes
    >>> t, weight = DiscreteTimes().sample(DDPMChain([0.5, 0.5]), 100)
    >>> t.unique().tolist()
    [0.5, 1.0]
    """

    unbiased = False

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        steps = _steps(sde)
        u = draw(torch.rand, (n,), generator, device, schedule_dtype(device))
        return at_steps(sde, (u * steps).long(), dtype)  # u < 1, and so rounded u steps < steps


class LossSecondMomentTimes(Described, DrawnTimes):
    r"""Steps of a chain, drawn in proportion to the root mean square of their recent losses.

    .. math::
        p_i = (1 - u) \frac{m_i}{\sum_j m_j} + \frac{u}{N}, \quad
        m_i = \sqrt{\mathrm{mean}(\ell_i^2)}, \quad \text{weight } \frac{1}{N p_i},

    with the mean over the last `history` losses of step i. Sampling is uniform until every step
    has that many. The expected loss is that of `DiscreteTimes`, the mean over the N steps.

    Objectives pass their losses to `update`, before the weights of the times are applied. With
    torch.distributed, each process records the losses of all, so that all draw from the same
    distribution; they must call `update` equally often. Losses that are not finite are ignored,
    and so are losses before the first draw, when the chain is not yet known. The history is part
    of the training state: save it with `state_dict`, restore it with `load_state_dict`.

    Args:
        history: the number of recent losses of each step to average over.
        uniform: the share u of the uniform distribution; weights are at most 1 / u.

    Raises:
        ValueError: if history < 1 or uniform is outside (0, 1].

    Source: Nichol and Dhariwal, Improved DDPM, 2021, arXiv 2102.09672 (section 3.3).

    >>> import torch
    >>> from diffusionkit import DDPMChain, LossSecondMomentTimes
    >>> chain = DDPMChain([0.5, 0.5])
    >>> times = LossSecondMomentTimes(history=1)
    >>> t, weight = times.sample(chain, 3)
    >>> times.update(torch.tensor([0.5, 1.0]), torch.tensor([3.0, 1.0]))
    >>> times.probabilities
    tensor([0.7498, 0.2503], dtype=torch.float64)
    """

    unbiased = False

    def __init__(self, history: int = 10, uniform: float = 1e-3) -> None:
        """Start without a history."""
        check_count(history, "history")
        check_number(uniform, "uniform")
        if not 0.0 < uniform <= 1.0:
            raise ValueError(f"uniform: expected a number in (0, 1], got {uniform}")
        self.history = history
        self.uniform = uniform
        self._T = 1.0
        self._empty(0)

    def _empty(self, steps: int) -> None:
        """Forget all losses, and begin with those of a number of steps."""
        # The last row takes what is not recorded, so that nothing is selected by its value, which
        # the host would have to read.
        self._losses = torch.zeros((steps + 1, self.history), dtype=torch.float64)
        self._counts = torch.zeros(steps + 1, dtype=torch.int64)

    @property
    def _steps(self) -> int:
        return len(self._counts) - 1

    @property
    def probabilities(self) -> Tensor:
        """The probabilities of the steps (N,), in float64; empty before the first draw."""
        return self._shares().to("cpu", torch.float64)

    def _shares(self) -> Tensor:
        """Return the probabilities of the steps (N,), where the history is."""
        rms = self._losses[:-1].square().mean(1).sqrt()
        share = rms / rms.sum().clamp_min(torch.finfo(rms.dtype).tiny)
        p = (1 - self.uniform) * share + self.uniform / max(self._steps, 1)
        full = (self._counts[:-1] >= self.history).all()
        return torch.where(full, p / p.sum(), 1 / max(self._steps, 1))

    def _move(self, device: torch.device | str | None) -> None:
        """Keep the history on a device, where it is read and written without the host."""
        place = torch.device(device or "cpu")
        if self._losses.device != place:
            self._losses = self._losses.to(place, schedule_dtype(place))
            self._counts = self._counts.to(place)

    @override
    def _draw(
        self,
        sde: ForwardSDE,
        n: int,
        generator: Generators,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> Drawn:
        steps = _steps(sde)
        if self._steps == 0:
            self._empty(steps)
        if self._steps != steps:
            raise ValueError(
                f"sde: expected {self._steps} steps, as in the recorded losses, got {steps}"
            )
        self._T = sde.T
        self._move(device)
        p = self._shares()
        u = draw(torch.rand, (n,), generator, device, p.dtype)
        i = torch.searchsorted(p.cumsum(0), u, right=True).clamp_max(steps - 1)
        return at_steps(sde, i, dtype, (1 / (steps * p[i])).to(dtype=dtype))

    @override
    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        """Record the losses (n,) at times (n,) in place of the oldest ones of their steps.

        The history is kept on the device of the losses; nothing is read by the host.
        """
        check_state(t, "t")
        check_state(loss, "loss")
        if t.ndim != 1 or loss.shape != t.shape:
            raise ValueError(
                "t, loss: expected one loss for each time, shapes (n,), "
                f"got {tuple(t.shape)} and {tuple(loss.shape)}"
            )
        if self._steps == 0:
            return
        dtype = torch.promote_types(loss.dtype, torch.float32)  # float16 cannot index all steps
        times, losses = gather_rows(torch.stack([t.to(dtype), loss.to(dtype)], 1)).unbind(1)
        self._move(losses.device)
        n = self._steps
        step = (times * n / self._T).round() - 1
        recorded = torch.isfinite(times) & torch.isfinite(losses) & (step >= 0) & (step < n)
        step = torch.where(recorded, step, n).long()
        # Those of one step come one after another: rank is the number of them before.
        step, order = torch.sort(step, stable=True)
        first, last = (torch.searchsorted(step, step, right=right) for right in (False, True))
        rank = torch.arange(len(step), device=step.device) - first
        slot = (self._counts[step] + rank) % self.history
        newest = rank >= last - first - self.history  # two in one slot would be in any order
        row = torch.where(newest, step, n)
        self._losses[row, slot] = losses[order].to(self._losses.dtype)
        every = torch.arange(n, device=step.device)
        before, after = (torch.searchsorted(step, every, right=right) for right in (False, True))
        self._counts[:-1] += after - before

    def state_dict(self) -> dict[str, Any]:
        """Return the recorded losses (N, history) and the number recorded for each step (N,)."""
        losses, counts = self._losses[:-1].to("cpu", torch.float64), self._counts[:-1].cpu()
        return {"losses": losses.clone(), "counts": counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a history returned by `state_dict`.

        Raises:
            ValueError: if it is not one of this length, or holds negative or infinite numbers.
        """
        if not isinstance(state, Mapping) or {*state} != {"losses", "counts"}:
            found = list(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected losses and counts, got {found}")
        for name, dtype in (("losses", torch.float64), ("counts", torch.int64)):
            value: Any = state[name]
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            if kind != dtype:
                raise ValueError(f"{name}: expected a tensor of {dtype}, got {kind}")
        losses, counts = state["losses"], state["counts"]
        if counts.ndim != 1 or losses.shape != (len(counts), self.history):
            raise ValueError(
                f"losses, counts: expected shapes (N, {self.history}) and (N,), "
                f"got {tuple(losses.shape)} and {tuple(counts.shape)}"
            )
        if not bool(losses.isfinite().all()) or bool((counts < 0).any()):
            raise ValueError("losses, counts: expected finite losses and counts >= 0, got others")
        self._empty(len(counts))
        self._losses[:-1], self._counts[:-1] = losses, counts
