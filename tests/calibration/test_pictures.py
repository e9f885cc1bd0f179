"""Pictures: what is drawn are the numbers of the result."""

import pytest
import torch

from diffusionkit.calibration import (
    expected_coverage,
    plot_coverage,
    plot_rank_histogram,
    rank_histogram,
    simulation_based_calibration,
)

pytest.importorskip("matplotlib")
DRAWS = torch.randn(200, 10, 2, generator=torch.Generator().manual_seed(0))
SAMPLES, TRUTH = DRAWS[:, 1:], DRAWS[:, 0]


def test_coverage_curves_and_bands():
    result = expected_coverage(SAMPLES, TRUTH)
    ax = plot_coverage({"exact": result, "narrow": expected_coverage(0.5 * SAMPLES, TRUTH)})
    line = ax.get_lines()[1]
    assert line.get_ydata().tolist() == result.coverage.tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["exact", "narrow"]
    assert plot_coverage(result, ax) is ax
    for wrong, error in (({}, ValueError), ({"x": 1}, TypeError), (None, TypeError)):
        with pytest.raises(error, match="results: expected"):
            plot_coverage(wrong)
    with pytest.raises(TypeError, match="ax: expected the axes of matplotlib"):
        plot_coverage(result, 3)


def test_rank_histograms_and_bands():
    result = simulation_based_calibration(SAMPLES, TRUTH, bins=5)
    ax = plot_rank_histogram(result, index=1)
    assert [bar.get_height() for bar in ax.patches] == result.counts[:, 1].tolist()
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (result.low, result.high)
    shares = rank_histogram(SAMPLES, TRUTH)
    ax = plot_rank_histogram(shares)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(shares.frequency.tolist())
    for index, error in ((2, ValueError), (-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="index: expected"):
            plot_rank_histogram(result, index=index)
    with pytest.raises(TypeError, match="result: expected an SBCResult or a RankHistogram"):
        plot_rank_histogram(None)
