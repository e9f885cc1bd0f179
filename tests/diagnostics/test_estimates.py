"""Plots of estimates."""

import sys

import pytest
import torch

from diffusionkit.diagnostics import Estimate, plot_variances


def estimate(quantity="variance (score)", label="DSM"):
    noise = torch.tensor([10.0, 0.1, 1.0], dtype=torch.float64)
    value = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    return Estimate(noise, noise, value, value / torch.tensor([10.0, 1.0, 10.0]), quantity, label)


def test_sorted_curves_with_bands_on_logarithmic_axes() -> None:
    pytest.importorskip("matplotlib")
    ax = plot_variances([estimate(), estimate(label="STF")])
    assert [line.get_label() for line in ax.lines] == ["DSM", "STF"]
    assert ax.lines[0].get_xdata().tolist() == [0.1, 1.0, 10.0]
    assert ax.lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_ylabel() == "variance (score)"
    assert ax.get_legend() is not None
    (band, _) = ax.collections
    corners = {tuple(round(float(v), 6) for v in p) for p in band.get_paths()[0].vertices}
    assert {(1.0, 1.6), (1.0, 2.4), (10.0, 3.6), (10.0, 2.4), (0.1, 3.0), (0.1, 0.01)} <= corners
    ax.figure.canvas.draw()


def test_a_plot_on_given_axes() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()
    assert plot_variances(estimate(), ax) is ax
    assert len(ax.lines) == 1


def test_invalid_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"same quantity, got \['divergence', 'variance \(score\)'\]"
    ):
        plot_variances([estimate(), estimate("divergence")])
    with pytest.raises(ValueError, match=r"same quantity, got \[\]"):
        plot_variances([])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_variances needs matplotlib: pip install"):
        plot_variances(estimate())
