"""Pictures of calibration: coverage curves and rank histograms with their bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_count, check_part
from .coverage import ExpectedCoverage
from .ensembles import RankHistogram
from .ranks import SBCResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_coverage(
    results: ExpectedCoverage | Mapping[str, ExpectedCoverage], ax: Axes | None = None
) -> Axes:
    """Plot expected coverage over credibility, with bands of two standard errors.

    Args:
        results: a result, or several by their names in the legend.
        ax: the axes to plot on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if there are no results.
        TypeError: if an argument has the wrong type.
        ImportError: if matplotlib is not installed.
    """
    several = results if isinstance(results, Mapping) else {"": results}
    if not several:
        raise ValueError("results: expected at least one, got none")
    for result in several.values():
        check_part(result, ExpectedCoverage, "results")
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color="0.6", lw=1)
    for name, result in several.items():
        columns = (result.levels, result.coverage, result.stderr)
        levels, coverage, stderr = (x.cpu().double().numpy() for x in columns)
        (line,) = ax.plot(levels, coverage, label=name or None)
        color = line.get_color()
        low, high = coverage - 2 * stderr, coverage + 2 * stderr
        ax.fill_between(levels, low, high, color=color, alpha=0.25, lw=0)
    ax.set(xlabel="credibility", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1))
    ax.set_aspect("equal")
    if any(several):
        ax.legend()
    return ax


def plot_rank_histogram(
    result: SBCResult | RankHistogram, ax: Axes | None = None, *, index: int = 0
) -> Axes:
    """Plot the distribution of ranks, and the band in which that of a calibrated model is.

    Of `SBCResult` the band is that of its level for each bar; of `RankHistogram` it is two standard
    errors about the same share for all.

    Args:
        result: the result of `simulation_based_calibration` or `rank_histogram`.
        ax: the axes to plot on, by default those of a new figure.
        index: the parameter to plot, counted over all, of several.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no such parameter.
        TypeError: if an argument has the wrong type.
        ImportError: if matplotlib is not installed.
    """
    if not isinstance(result, (SBCResult, RankHistogram)):
        raise TypeError(
            f"result: expected an SBCResult or a RankHistogram, got {type(result).__name__}"
        )
    height: Tensor
    if isinstance(result, SBCResult):
        columns = result.counts.reshape(len(result.counts), -1)
        check_count(index, "index", least=0, most=columns.shape[1] - 1)
        height = columns[:, index].cpu().double()
        low, high = torch.tensor(float(result.low)), torch.tensor(float(result.high))
        level, label = result.expected, "cases"
    else:
        check_count(index, "index", least=0, most=0)
        height, level, label = result.frequency.cpu(), 1 / len(result.frequency), "share"
        low, high = level - 2 * result.stderr.cpu(), level + 2 * result.stderr.cpu()
    ax = _axes(ax)
    n = len(height)
    edges = torch.linspace(0.0, 1.0, n + 1)
    least, most = (x.expand(n).repeat_interleave(2).numpy() for x in (low, high))
    ax.fill_between(edges.repeat_interleave(2)[1:-1].numpy(), least, most, color="0.88", lw=0)
    ax.bar(edges[:-1].numpy(), height.numpy(), width=0.9 / n, align="edge")
    ax.axhline(level, color="0.4", lw=1)
    ax.set(xlabel="rank / (number of samples)", ylabel=label, xlim=(0, 1))
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        if not hasattr(ax, "fill_between"):
            raise TypeError(f"ax: expected the axes of matplotlib, got {type(ax).__name__}")
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    made: Axes = Figure(layout="constrained").subplots()
    return made
