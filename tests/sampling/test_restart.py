"""Restart sampling: its levels, its order, its noise and what it does to errors."""

import itertools
import math

import pytest
import torch
from support import seeded
from support.noise import GivenNoise

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VPSDE,
    DPMSolver2M,
    GaussianMixtureModel,
    Heun,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    Restart,
    TimeTravel,
    UniPC,
)

DOUBLE = torch.float64


def ratio(sde, times):
    alpha, sigma = sde.marginal(times)
    return sigma / alpha


def test_levels_are_those_of_the_paper_on_every_process(sde):
    """Equally spaced in s^(1/7), from s_max to the level of the grid nearest to s_min."""
    grid = LogSNRGrid(to_zero=True)(sde, 20)
    index, times = Restart(0.2, 2.0, steps=4).place(sde, grid)
    found = ratio(sde, grid)[1:-1]
    assert index == 1 + int((found - 0.2).abs().argmin())
    assert float(times[-1]) == float(grid[index])
    s = ratio(sde, times)
    assert float(s[0]) == pytest.approx(2.0, rel=1e-6)
    gaps = s.pow(1 / 7).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-5, atol=0)


def heun(model, x, times, last):
    """Heun's method in sigma, with an Euler step to 0: the released loop."""
    for t, s in itertools.pairwise(times):
        slope = (x - model.predict(x, t.expand(len(x))).x0) / t
        end = x + (s - t) * slope
        if s > 0 or not last:
            slope = 0.5 * (slope + (end - model.predict(end, s.expand(len(x))).x0) / s)
            end = x + (s - t) * slope
        x = end
    return x


def test_two_intervals_are_run_as_in_the_released_code():
    model = GaussianMixtureModel(EDMSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3])
    intervals = [(19.35, 40.79, 3, 2), (0.06, 0.3, 4, 3)]
    restarts = [Restart(a, b, n, k, s_noise=1.003) for a, b, n, k in intervals]
    grid = KarrasGrid(to_zero=True)
    sampler = PCSampler(model, Heun(), grid=grid, steps=18, time_travel=restarts)
    x = model.sde.prior_sample((5, 2), generator=seeded(), dtype=DOUBLE)
    out = sampler(x, generator=seeded(1))

    times, noise, start = grid(model.sde, 18), seeded(1), 0
    for low, high, n, k in intervals:
        index = int((times - low).abs().argmin())
        x = heun(model, x, times[start : index + 1], last=False)
        u = torch.linspace(0, 1, n + 1, dtype=DOUBLE)
        a, b = high ** (1 / 7), float(times[index]) ** (1 / 7)
        levels = (a + u * (b - a)) ** 7
        for _ in range(k):
            z = torch.randn(x.shape, generator=noise, dtype=DOUBLE)
            x = x + 1.003 * (high**2 - times[index] ** 2).sqrt() * z
            x = heun(model, x, levels, last=False)
        start = index
    torch.testing.assert_close(out, heun(model, x, times[start:], last=True), rtol=1e-8, atol=1e-8)
    assert sampler.nfe == 35 + 2 * (3 * 2 + 4 * 3)


def test_an_error_shrinks_by_the_flow_over_the_interval_in_each_restart(sde):
    """Of data from N(0, .5^2) the flow scales states by the ratio of standard deviations."""
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    low, high = torch.tensor([0.05, 3.0], dtype=DOUBLE)
    times = sde.time_at_log_snr(-2 * torch.log(torch.stack([high, high / 2, low])))
    std = [float(torch.sqrt(0.25 * a**2 + s**2)) for a, s in (sde.marginal(t[None]) for t in times)]
    (a_high,), (a_low,) = (sde.marginal(t[None])[0].tolist() for t in (times[0], times[-1]))
    change = []
    for repeats in (1, 3):
        sampler = PCSampler(
            model, UniPC(), grid=times, denoise=False,
            time_travel=Restart(0.05, 3.0, steps=60, repeats=repeats),
        )  # fmt: skip
        start = torch.zeros(4, 1, dtype=DOUBLE)
        one, two = (
            sampler(
                x,
                generator=seeded(),
            )
            for x in (start, start + 1)
        )
        change.append(float((two - one).mean()))
    shrunk = std[-1] / std[0] * a_high / a_low  # up by alpha's ratio, down by the flow
    assert shrunk < 0.3
    assert change[1] / change[0] == pytest.approx(shrunk**2, rel=1e-3)


@pytest.mark.parametrize("predictor", [DDIM(), Heun(), DEIS(), DPMSolver2M(), UniPC()], ids=str)
def test_restarts_do_not_change_the_distribution(predictor):
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    restarts = [Restart(2.0, 10.0, 30, 2), Restart(0.1, 1.0, 40, 2)]
    sampler = PCSampler(model, predictor, steps=80, grid=LogSNRGrid(), time_travel=restarts)
    x = sampler((3000, 2), generator=seeded(), dtype=DOUBLE)
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.04)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        torch.testing.assert_close(
            x[rows].mean(0), torch.tensor(mean, dtype=DOUBLE), rtol=0, atol=0.04
        )
        assert float(x[rows].std(0).mean()) == pytest.approx(std, rel=0.08)


def test_states_have_their_times_and_the_index_of_the_next_time_of_the_grid():
    model = GaussianMixtureModel(EDMSDE(), [[0.0]], [1.0])
    grid = torch.tensor([80.0, 10.0, 1.0, 0.1, 0.01])
    sampler = PCSampler(model, DEIS(), grid=grid, time_travel=Restart(1.0, 8.0, 3, 2))
    states = list(sampler.iterate((3, 1), generator=seeded()))
    levels = [round(s.t, 3) for s in states]
    inner = [round(float(t), 3) for t in Restart(1.0, 8.0, 3).place(model.sde, grid.double())[1]]
    assert levels == [80.0, 10.0, 1.0, *inner, *inner, 0.1, 0.01, 0.01]
    assert [s.step for s in states] == [0, 1, *[2] * 9, 3, 4, 4]
    assert sampler.nfe == 4 + 2 * 3 + 1


def test_edits_are_not_restarted_above_their_start():
    model = GaussianMixtureModel(EDMSDE(), [[0.0]], [1.0])
    sampler = PCSampler(
        model, DDIM(), grid=KarrasGrid(to_zero=True), steps=20,
        time_travel=[Restart(5.0, 20.0, 4, 1), Restart(0.1, 0.5, 3, 1)],
    )  # fmt: skip
    sampler.edit(torch.zeros(2, 1), 10.0, generator=seeded())
    grid = sampler.times
    assert sampler.nfe == int((grid <= 10.0).sum()) - 1 + 3


def energy(x, y):
    def mean(a, b):
        return float((a.unsqueeze(1) - b).abs().mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def test_restarts_remove_errors_of_the_start_that_the_flow_keeps():
    """From a wrong state at T the flow ends at wrong data; new noise forgets it."""
    model = GaussianMixtureModel(EDMSDE(), [[-1.0], [0.8]], [0.2, 0.4], [0.3, 0.7])
    exact = model.sample(2000, generator=seeded(5)).double()
    start = 80 * (torch.randn(2000, 1, generator=seeded(2), dtype=DOUBLE) + 0.8)
    grid, found = KarrasGrid(to_zero=True), []
    for steps, restarts in ((30, None), (18, Restart(1.0, 10.0, steps=6, repeats=2))):
        sampler = PCSampler(model, Heun(), grid=grid, steps=steps, time_travel=restarts)
        found.append(energy(sampler(start, generator=seeded(4)), exact))
        assert sampler.nfe == 59
    assert found[1] < 0.1 * found[0]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: Restart(0.3, 0.1), ValueError, "s_max: expected more than s_min = 0.3, got 0.1"),
        (lambda m: Restart(0.0, 0.1), ValueError, "s_min: expected"),
        (lambda m: Restart(0.1, math.inf), ValueError, "s_max: expected a finite"),
        (lambda m: Restart(0.1, 0.3, steps=0), ValueError, "steps: expected an integer >= 1"),
        (lambda m: Restart(0.1, 0.3, repeats=1.0), TypeError, "repeats: expected an integer"),
        (lambda m: PCSampler(m, DDIM(), time_travel=[TimeTravel()]), TypeError,
         "time_travel: expected a TimeTravel, a Restart or a sequence of Restart, got TimeTravel"),
        (lambda m: PCSampler(m, DDIM(), time_travel=Restart(0.1, 1e6)), ValueError,
         "s_max: expected a ratio sigma / alpha above the grid's level at s_min"),
        (lambda m: PCSampler(m, DDIM(), grid=torch.tensor([0.9, 0.5, 0.1]),
                             time_travel=Restart(1e-4, 2e-4)), ValueError, "s_max: expected"),
        (lambda m: PCSampler(m, DEIS(), grid=LogSNRGrid(), steps=9,
                             time_travel=Restart(0.1, 0.3, steps=1)), ValueError,
         "at least 2 steps"),
        (lambda m: PCSampler(m, DDIM(), grid=LogSNRGrid(), time_travel=Restart(0.1, 0.3))(
            (1, 2), generator=GivenNoise(torch.zeros(1, 2))), ValueError,
         "generator: expected generators"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(make, error, match):
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    with pytest.raises(error, match=match):
        make(model)
