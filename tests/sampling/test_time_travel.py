"""Time travel: the order of the steps, the forward step, and whole runs."""

import itertools

import pytest
import torch
from support import seeded
from support.noise import GivenNoise

from diffusionkit import (
    DDIM,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    Predictor,
    ReverseDiffusion,
    Step,
)
from diffusionkit.sampling.heun import Heun
from diffusionkit.sampling.time_travel import TimeTravel, travel_back

DOUBLE = torch.float64


def visited(time_travel, first, last):
    steps = time_travel.steps(first, last)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(steps))
    return [steps[0][0], *(to for _, to in steps)]


@pytest.mark.parametrize(
    ("jump", "repeats", "ends", "expected"),
    [
        (1, 1, (0, 3), [0, 1, 2, 3]),
        (3, 2, (0, 3), [0, 1, 2, 3, 0, 1, 2, 3]),
        (2, 2, (0, 5), [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4, 5, 4, 5]),
        (2, 3, (3, 5), [3, 4, 5, 3, 4, 5, 3, 4, 5]),
        (9, 2, (0, 2), [0, 1, 2, 0, 1, 2]),
    ],
)
def test_segments_are_repeated_in_order(jump, repeats, ends, expected):
    assert visited(TimeTravel(jump, repeats), *ends) == expected


@pytest.mark.parametrize("later", [0.3, 1.0])
@pytest.mark.parametrize("sooner", [0.0, 0.2])
def test_going_back_is_the_forward_process(sde, sooner, later):
    """x_t = (alpha_t / alpha_s) x_s + noise, whose variance makes that of x_t sigma_t^2."""
    s, t = (torch.tensor(part * sde.T, dtype=DOUBLE) for part in (sooner, later))
    x = torch.randn(5, 3, generator=seeded(1), dtype=DOUBLE)
    z = torch.randn((5, 3), generator=seeded(), dtype=DOUBLE)
    step = travel_back(x, sde, s, t, generator=seeded())
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (sde.marginal(u.view(1)) for u in (s, t))
    ratio = alpha_t / alpha_s
    std = torch.sqrt(sigma_t**2 - (ratio * sigma_s) ** 2)
    torch.testing.assert_close(step.mean, ratio * x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.x, ratio * x + std * z, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("predictor", [Ancestral(), ReverseDiffusion(), DDIM(), Heun()], ids=str)
@pytest.mark.parametrize("grid", [LogSNRGrid(), KarrasGrid(to_zero=True)], ids=str)
def test_time_travel_does_not_change_the_distribution(predictor, grid):
    model = GaussianMixtureModel(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])
    sampler = PCSampler(model, predictor, steps=100, grid=grid, time_travel=TimeTravel(11, 2))
    x = sampler((1500, 2), generator=seeded(), dtype=DOUBLE)
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.7, abs=0.05)
    for rows, mean, std in ((right, [1.0, 0.5], 0.3), (~right, [-1.0, 0.0], 0.2)):
        wanted = torch.tensor(mean, dtype=DOUBLE)
        torch.testing.assert_close(x[rows].mean(0), wanted, rtol=0, atol=0.04)
        assert float(x[rows].std(0).mean()) == pytest.approx(std, rel=0.08)


class Remembering(Predictor):
    def __init__(self):
        self.seen = []

    def step(self, model, x, t, s, state=None, *, generator=None, **cond):
        self.seen.append((round(float(t[0]), 6), round(float(s[0]), 6), state))
        model.predict(x, t)
        return Step(x, x, (state or 0) + 1)


@pytest.mark.parametrize("corrector", [None, AnnealedLangevin()])
def test_time_travel_clears_memory_and_counts_every_step(mixture, corrector):
    shown = []

    def wrapper(items):
        shown.append(len(items))
        return items

    predictor = Remembering()
    times = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=DOUBLE) * mixture.sde.T
    sampler = PCSampler(
        mixture, predictor, corrector, grid=times, time_travel=TimeTravel(2, 2), progress=wrapper
    )
    states = list(sampler.iterate(torch.ones(1, 2, dtype=DOUBLE), generator=seeded()))
    points = [0, 1, 2, 0, 1, 2, 3, 2, 3]
    assert [s.step for s in states] == [*points, 3]
    assert [s.t for s in states] == [float(times[k]) for k in (*points, 3)]
    calls = 1 if corrector is None else 2
    assert [s.nfe for s in states] == [n * calls for n in (0, 1, 2, 2, 3, 4, 5, 5, 6)] + [
        6 * calls + 1
    ]
    assert shown == [8]
    clock = [round(float(t), 6) for t in times]
    expected = [(0, 1, None), (1, 2, 1), (0, 1, None), (1, 2, 1), (2, 3, 2), (2, 3, None)]
    assert predictor.seen == [(clock[i], clock[j], memory) for i, j, memory in expected]


def test_states_after_a_forward_step_have_its_mean():
    model = GaussianMixtureModel(VPSDE(), [[0.0]], [1.0])
    sampler = PCSampler(model, DDIM(), steps=4, time_travel=TimeTravel(2, 2))
    states = list(sampler.iterate((50, 1), generator=seeded()))
    before, back = states[2], states[3]
    (a,), (b,) = (VPSDE().marginal(torch.tensor([u.t]))[0].tolist() for u in (before, back))
    torch.testing.assert_close(back.mean, before.x * (b / a))
    assert float((back.x - back.mean).std()) > 0.1


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda m: TimeTravel(0), ValueError, "jump: expected an integer >= 1, got 0"),
        (lambda m: TimeTravel(repeats=0), ValueError, "repeats: expected an integer >= 1"),
        (lambda m: TimeTravel(2.0), TypeError, "jump: expected an integer, got float"),
        (lambda m: PCSampler(m, DDIM(), time_travel=10), TypeError,
         "time_travel: expected a TimeTravel"),
        (lambda m: PCSampler(m, DDIM(), steps=9, time_travel=TimeTravel()), ValueError,
         "at most the grid's 9 steps, got 10"),
        (lambda m: PCSampler(m, DDIM(), time_travel=TimeTravel())(
            (1, 2), generator=GivenNoise(torch.zeros(1, 2))), ValueError,
         "generator: expected generators"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(mixture, make, error, match):
    with pytest.raises(error, match=match):
        make(mixture)


def test_a_noise_path_is_accepted_without_time_travel(mixture):
    sampler = PCSampler(mixture, Ancestral(), steps=3)
    assert sampler((1, 2), generator=GivenNoise(torch.ones(1, 2))).shape == (1, 2)
