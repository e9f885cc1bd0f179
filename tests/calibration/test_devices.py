"""Samples on a GPU and on an Apple device, which has no float64: the results of the CPU."""

import pytest
import torch
from support.pretend_device import PretendDevice

from diffusionkit.calibration import (
    EnsembleScores,
    crps,
    energy_score,
    expected_coverage,
    rank_histogram,
    simulation_based_calibration,
    spread_skill,
)

DRAWS = torch.randn(30, 6, 2, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([[1.0, 2.0]])


def results(device):
    """All numbers of all functions, for samples and truths on a device."""
    samples, truth = DRAWS[:, 1:].to(device), DRAWS[:, 0].to(device)
    weights = WEIGHTS.to(device)
    options = {"generator": torch.Generator().manual_seed(0)}
    scores = EnsembleScores(energy=True)
    scores.update(samples, truth, weights=weights, **options)
    found, ratio = scores.result(), spread_skill(samples, truth, weights=weights)
    ranks = simulation_based_calibration(samples, truth, **options)
    coverage = expected_coverage(samples, truth, references=truth + 1, **options)
    histogram = rank_histogram(samples, truth, weights=weights, **options)
    tensors = [
        *(crps(samples, truth), energy_score(samples, truth, weights=weights)),
        *(ranks.ranks, ranks.counts, ranks.p_value, coverage.coverage, coverage.stderr),
        *(histogram.frequency, found.rank_histogram.stderr),
    ]
    numbers = [found.crps, found.energy_score, ratio.ratio, ratio.stderr, coverage.p_value]
    return [x.cpu() for x in tensors] + [torch.tensor(x) for x in numbers]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_results_are_those_on_the_cpu(device):
    right = results("cpu")
    with PretendDevice(device):
        got = results(device)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5)
