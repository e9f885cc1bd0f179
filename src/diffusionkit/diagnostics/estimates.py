"""Estimates with standard errors as functions of the noise level, and their plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._checks import check_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Estimates of a quantity at several noise levels.

    Args:
        t: the times (K,).
        noise: sigma / alpha at these times (K,).
        value: the estimates (K,), in float64.
        stderr: their standard errors (K,).
        quantity: the name of the quantity, such as "variance (score)".
        label: the name in a legend.
    """

    t: Tensor
    noise: Tensor
    value: Tensor
    stderr: Tensor
    quantity: str
    label: str


def plot_variances(results: Estimate | Sequence[Estimate], ax: Axes | None = None) -> Axes:
    """Plot estimates over sigma / alpha on logarithmic axes, with bands of two standard errors.

    Args:
        results: one or several estimates of the same quantity.
        ax: the axes to plot on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if there are no estimates, or their quantities differ.
        ImportError: if matplotlib is not installed.
    """
    given: Any = results
    single = isinstance(given, Tensor) or not isinstance(given, Iterable)
    results = [given] if single else list(given)
    for result in results:
        check_part(result, Estimate, "results")
    if ax is not None and not hasattr(ax, "fill_between"):
        raise TypeError(f"ax: expected the axes of matplotlib, got {type(ax).__name__}")
    quantities = sorted({result.quantity for result in results})
    if len(quantities) != 1:
        raise ValueError(f"results: expected estimates of the same quantity, got {quantities}")
    if ax is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot_variances needs matplotlib: pip install matplotlib") from error
        ax = Figure(layout="constrained").subplots()
    for result in results:
        order = result.noise.argsort()
        noise, value, stderr = (
            y[order].cpu().numpy() for y in (result.noise, result.value, result.stderr)
        )
        (line,) = ax.plot(noise, value, label=result.label)
        low = (value - 2 * stderr).clip(min=value / 100)  # > 0, for the logarithmic axis
        ax.fill_between(noise, low, value + 2 * stderr, color=line.get_color(), alpha=0.25, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="sigma / alpha", ylabel=quantities[0])
    ax.legend()
    return ax
