"""The balance of a solver's tolerance and a number of probes, by a target standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._flow_solver import ADAPTIVE, Solver
from .divergence import Divergence, ExactDivergence, Hutchinson

# The share of the target that the solver's error may take. It adds a 32nd to the squared error.
SHARE = 0.25
_LOOSEST = 1e-2  # a looser tolerance saves next to nothing: the first step is short anyway
_SAMPLES = 8  # in the pilot runs


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Values of several probes.

    Args:
        each: the log-densities, one per probe (K, B).
        latent: the codes (B, *D).
        nfe: the number of network evaluations.
    """

    each: Tensor
    latent: Tensor
    nfe: int

    @property
    def stderr(self) -> Tensor | None:
        """The standard error of the mean (B,), None for one probe."""
        k = len(self.each)
        return self.each.std(0) / math.sqrt(k) if k > 1 else None


def check_balance(solver: Solver, divergence: Divergence) -> None:
    """Raise unless a target can be met by a choice of tolerance and probes."""
    if solver.method not in ADAPTIVE:
        raise ValueError(
            f"method: expected one of {ADAPTIVE} with a target_stderr, got {solver.method!r}"
        )
    if not isinstance(divergence, (Hutchinson, ExactDivergence)):
        raise TypeError(
            "divergence: expected Hutchinson or ExactDivergence with a target_stderr, "
            f"got {type(divergence).__name__}"
        )


def pilot_probes(samples: int) -> int:
    """Return the number of probes of the pilot runs, of which the number of samples is limited."""
    return max(2, math.ceil(8 / pilot_samples(samples)))


def pilot_samples(samples: int) -> int:
    """Return the number of samples of the pilot runs."""
    return min(samples, _SAMPLES)


def looser(solver: Solver, factor: float) -> Solver:
    """Return a solver with tolerances larger by a factor."""
    return replace(solver, rtol=factor * solver.rtol, atol=factor * solver.atol)


def pilot_factors(solver: Solver) -> list[float]:
    """Return the factors of the tolerances to try, two or more, from the loosest to 1."""
    factor, factors = max(10.0, _LOOSEST / solver.rtol), []
    while factor > 1.001:
        factors.append(factor)
        factor /= 10
    return [*factors, 1.0]


def needed_probes(variance: Tensor, target: float, most: int) -> int:
    """Return the number of probes for a variance () of one probe, between 2 and the most."""
    exact = float(variance) / target**2
    return most if not exact < most else max(2, math.ceil(exact))


def until_reached(first: Runs, more: Callable[[int], Runs], target: float, most: int) -> Runs:
    """Return runs with further probes, until each standard error is at most the target.

    Args:
        first: the runs so far, with two probes or more.
        more: solves with some further probes.
        target: the largest standard error.
        most: the largest number of probes.
    """
    runs = first
    while (k := len(runs.each)) < most:
        largest = runs.each.detach().var(0).max()
        needed = needed_probes(largest, target, most)
        if needed <= k:
            break
        found = more(min(needed, 2 * k) - k)
        each = torch.cat([runs.each, found.each])
        runs = Runs(each, found.latent, runs.nfe + found.nfe)
    return runs
