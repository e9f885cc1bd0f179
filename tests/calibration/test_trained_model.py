"""A trained conditional model is calibrated; the same with too few steps is caught."""

import math

import pytest
import torch

from diffusionkit import (
    DDIM,
    VPSDE,
    EDMModel,
    EDMWeighting,
    LogSNRGrid,
    PCSampler,
    ScoreMatching,
    UniPC,
)
from diffusionkit.calibration import (
    energy_score,
    expected_coverage,
    simulation_based_calibration,
    spread_skill,
)
from diffusionkit.networks import MLP

NOISE, CASES, DRAWS = 0.5, 400, 19


def simulate(n, generator):
    theta = torch.randn(n, 2, generator=generator)
    return theta, theta + NOISE * torch.randn(n, 2, generator=generator)


@pytest.fixture(scope="module")
def trained():
    """A model of N(x / (1 + NOISE^2), NOISE^2 / (1 + NOISE^2) I), from simulations alone."""
    generator, steps = torch.Generator().manual_seed(0), 400
    torch.manual_seed(0)
    model = EDMModel(MLP(2, condition_features=2, width=32, depth=2), VPSDE(), sigma_data=1.0)
    objective = ScoreMatching(EDMWeighting(1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        theta, x = simulate(256, generator)
        objective(model, theta, condition=x, generator=generator).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def judged(model, predictor, steps):
    generator = torch.Generator().manual_seed(1)
    theta, x = simulate(CASES, generator)
    sampler = PCSampler(model, predictor, grid=LogSNRGrid(), steps=steps)
    condition = x.repeat_interleave(DRAWS, 0)
    drawn = sampler((len(condition), 2), condition=condition, generator=generator)
    samples = drawn.view(CASES, DRAWS, 2)
    p_values = [
        *simulation_based_calibration(samples, theta, generator=generator).p_value.tolist(),
        expected_coverage(samples, theta, generator=generator).p_value,
        expected_coverage(samples, theta, references=x, generator=generator).p_value,
    ]
    gain = 1 / (1 + NOISE**2)
    noise = torch.randn(samples.shape, generator=generator)
    exact = gain * x.unsqueeze(1) + NOISE * math.sqrt(gain) * noise
    excess = energy_score(samples, theta) - energy_score(exact, theta)
    return p_values, spread_skill(samples, theta), excess


def test_the_model_is_calibrated_within_the_error(trained):
    p_values, ratio, excess = judged(trained, UniPC(), 25)
    assert min(p_values) > 0.01 / 4
    assert abs(ratio.ratio - 1) < 3 * ratio.stderr < 0.15
    assert float(excess.mean()) < 3 * float(excess.std()) / CASES**0.5


def test_too_few_steps_are_caught_as_overconfident(trained):
    p_values, ratio, excess = judged(trained, DDIM(), 3)
    assert max(p_values) < 1e-3
    assert ratio.ratio + 4 * ratio.stderr < 1
    assert float(excess.mean()) > 2 * float(excess.std()) / CASES**0.5
