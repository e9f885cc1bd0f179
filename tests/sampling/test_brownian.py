"""Brownian paths: the distribution of their increments, and predictors along a path."""

import math
from itertools import pairwise

import pytest
import torch
from support import full, seeded

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    EulerMaruyama,
    GaussianMixtureModel,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
)
from diffusionkit.random import randn_like, step_noise
from diffusionkit.sampling.brownian import BrownianPath, _normals


def clock(sde, t):
    alpha, sigma = sde.marginal(t)
    return (sigma / alpha).square()


# --- the tree, by independent code in Python's integers ------------------------------------------

MASK = (1 << 64) - 1


def mixed(z):
    """Return SplitMix64's hash of 64 bits."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def node_normal(seed, node):
    bits = mixed((mixed((mixed(seed) + node) & MASK) + 0x9E3779B97F4A7C15) & MASK)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    high -= (high >> 31) << 32  # signed: the angle is within [-pi, pi)
    return math.sqrt(-2 * math.log((low + 0.5) / 2**32)) * math.cos(2 * math.pi * high / 2**32)


def bridged(seed, u):
    """Return W(u) by bisecting log2 u in [-64, 64], down to 2^-20."""

    def at(k):
        return 2.0 ** (k / 2**20 - 64) if k else 0.0

    leaf = round((math.log2(u) + 64) * 2**20)
    low, high = 0, 1 << 27
    w_low, w_high = 0.0, math.sqrt(at(high)) * node_normal(seed, high)
    while high - low > 1:
        middle = (low + high) // 2
        a, m, b = at(low), at(middle), at(high)
        mean = w_low + (m - a) / (b - a) * (w_high - w_low)
        w = mean + math.sqrt((m - a) * (b - m) / (b - a)) * node_normal(seed, middle)
        if leaf <= middle:
            high, w_high = middle, w
        else:
            low, w_low = middle, w
    return w_high


@pytest.mark.parametrize(("t", "s"), [(80.0, 3.0), (1.0, 0.999), (0.003, 0.002), (0.5, 1e-8)])
def test_the_path_is_a_tree_of_bridges(t, s):
    x = torch.zeros(3, 1, dtype=torch.float64)
    seeds = (0, 7, 2**63 - 1)
    z = BrownianPath(seeds).increment(x, EDMSDE(), full(t, 3), full(s, 3)).flatten().tolist()
    expected = [(bridged(n, s**2) - bridged(n, t**2)) / math.sqrt(t**2 - s**2) for n in seeds]
    assert z == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_counter_based_normals_are_standard_normal():
    """Moments, tails and correlations of 2^18 numbers, within 5 standard errors."""
    keys = torch.arange(1, 65)
    z = _normals(keys, 4096, torch.float64)
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n)
    ordered = z.flatten().sort().values
    uniform = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert float((uniform - steps).abs().max()) < 2 / math.sqrt(n)  # Kolmogorov and Smirnov
    rows = torch.corrcoef(z) - torch.eye(64)
    assert float(rows.abs().max()) < 5.5 / math.sqrt(4096)
    halves = torch.corrcoef(torch.stack([z[:, :2048].flatten(), z[:, 2048:].flatten()]))
    assert abs(float(halves[0, 1])) < 5 / math.sqrt(n / 2)
    squares = torch.corrcoef(torch.stack([z[:, :2048].flatten(), z[:, 2048:].flatten()]).square())
    assert abs(float(squares[0, 1])) < 5 / math.sqrt(n / 2)
    # Both normals of a pair are used, also for an odd count.
    few = _normals(keys[3:4], 5, torch.float64)
    torch.testing.assert_close(few, z[3:4, [0, 1, 2, 2048, 2049]], rtol=1e-12, atol=1e-12)


def test_increments_are_standard_normal_and_independent(sde):
    """40000 of each of six adjacent steps, long and short; 5 standard errors."""
    times = torch.tensor([1.0, 0.7, 0.699, 0.4, 0.01, 0.005, 1e-5], dtype=torch.float64) * sde.T
    path, x = BrownianPath(range(400)), torch.zeros(400, 100, dtype=torch.float64)
    z = torch.stack(
        [path.increment(x, sde, full(t, 400), full(s, 400)).flatten()
         for t, s in pairwise(times)]
    )  # fmt: skip
    n = z.shape[1]
    assert float(z.mean(1).abs().max()) < 5 / math.sqrt(n)
    covariance = z @ z.T / n
    error = (covariance - torch.eye(len(z))).abs()
    assert float(error.max()) < 5 * math.sqrt(2 / n)
    assert float((z**4).mean(1).sub(3).abs().max()) < 5 * math.sqrt(96 / n)


def test_increments_add_up(sde):
    """t -> r equals t -> s -> r, in any order of calls, to the resolution of the clock."""
    path, x = BrownianPath(range(8)), torch.zeros(8, 3, dtype=torch.float64)
    end = 0.0 if float(sde.marginal(full(0.0, 1))[1]) == 0 else 0.05
    t, s, r = (full(v * sde.T, 8) for v in (0.9, 0.3, end))

    def noise(a, b):
        length = (clock(sde, a) - clock(sde, b)).sqrt().unsqueeze(1)
        return length * path.increment(x, sde, a, b)

    late, whole, early = noise(s, r), noise(t, r), noise(t, s)
    unit = float(clock(sde, t)[0].sqrt())
    torch.testing.assert_close(whole, early + late, rtol=0, atol=2e-5 * unit)
    assert torch.equal(late, noise(s, r))
    assert torch.equal(whole, BrownianPath(range(8)).increment(x, sde, t, r)
                       * (clock(sde, t) - clock(sde, r)).sqrt().unsqueeze(1))  # fmt: skip


def test_the_clock_is_sigma_over_alpha(sde):
    """Two processes at the same sigma / alpha get the same noise."""
    path, x = BrownianPath(range(4)), torch.zeros(4, 2, dtype=torch.float64)
    edm = EDMSDE(sigma_min=0.002, sigma_max=1000.0)
    t, s = full(0.6 * sde.T, 4), full(0.2 * sde.T, 4)
    other = path.increment(x, edm, clock(sde, t).sqrt(), clock(sde, s).sqrt())
    torch.testing.assert_close(path.increment(x, sde, t, s), other, rtol=0, atol=1e-4)


def test_a_sample_depends_on_its_own_seed_and_times_only():
    sde, x = VPSDE(), torch.zeros(3, 1, 3, 5)
    t = torch.tensor([0.9, 0.5, 0.9], dtype=torch.float64)
    s = torch.tensor([0.4, 0.4999, 0.1], dtype=torch.float64)
    together = BrownianPath([5, 6, 7]).increment(x, sde, t, s)
    assert together.dtype == torch.float32
    for i in range(3):
        row = slice(i, i + 1)
        alone = BrownianPath([5 + i]).increment(x[row], sde, t[row], s[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(together[0], together[2])
    assert BrownianPath([5]).increment(x[:1, 0, 0, 0], sde, t[:1], s[:1]).shape == (1,)


def test_states_may_be_larger_than_a_block():
    sde, x = VPSDE(), torch.zeros(2, 150_001, dtype=torch.float64)
    t, s = full(0.9, 2), full(0.4, 2)
    z = BrownianPath([0, 1]).increment(x, sde, t, s)
    head = BrownianPath([0]).increment(x[:1, :1], sde, t[:1], s[:1])
    assert float(z.std()) == pytest.approx(1.0, abs=0.01)
    assert float(z[0, 0]) == pytest.approx(float(head), rel=1e-12)


def test_a_path_may_start_without_signal():
    """At alpha(T) = 0 the clock is infinite; the first noise is still standard normal."""

    class Forgetful(VPSDE):
        def marginal(self, t):
            return torch.cos(0.5 * math.pi * t) * (t < 1), torch.sin(0.5 * math.pi * t)

    path, x = BrownianPath(range(2000)), torch.zeros(2000, 4, dtype=torch.float64)
    sde, times = Forgetful(), [full(v, 2000) for v in (1.0, 0.9, 0.8)]
    z = [path.increment(x, sde, times[0], s).flatten() for s in times[1:]]
    assert float(z[0].std()) == pytest.approx(1.0, abs=0.03)
    torch.testing.assert_close(z[0], z[1], rtol=0, atol=1e-6)
    after = path.increment(x, sde, *times[1:]).flatten()
    assert abs(float((z[0] * after).mean())) < 5 / math.sqrt(8000)


def test_other_draws_are_new_noise():
    path, x = BrownianPath([3, 4]), torch.zeros(2, 5)
    generators = [seeded(seed) for seed in (3, 4)]
    for _ in range(2):
        assert torch.equal(randn_like(x, path), randn_like(x, generators))
    start = VPSDE().prior_sample((2, 5), generator=BrownianPath([3, 4]))
    assert torch.equal(start, randn_like(x, BrownianPath([3, 4])))
    part = path[1:]
    assert isinstance(part, BrownianPath)
    assert part[0] is path[1]
    assert part.seeds == (4,)


def test_without_a_path_a_step_draws_new_noise():
    x, t, s = torch.zeros(2, 5), full(0.9, 2), full(0.4, 2)
    found = step_noise(x, VPSDE(), t, s, generator=seeded())
    assert torch.equal(found, randn_like(x, seeded()))
    path = BrownianPath([0, 1])
    found = step_noise(x, VPSDE(), t, s, generator=path)
    assert torch.equal(found, path.increment(x, VPSDE(), t, s))


# --- predictors along a path -----------------------------------------------------------------

PREDICTORS = {
    "euler-maruyama": EulerMaruyama(),
    "reverse-diffusion": ReverseDiffusion(),
    "ancestral": Ancestral(),
    "ancestral-forward": Ancestral("forward"),
    "ddim-one": DDIM(eta=1.0),
    "ddim-half": DDIM(eta=0.5),
}


def distances(sde, predictor, steps, noise, n=50):
    """Return the root mean square distances of samples at each number of steps and the next."""
    model = GaussianMixtureModel(sde, [[-0.6, 0.0], [0.8, 0.4]], [0.5, 0.7], [0.3, 0.7])
    grid = LogSNRGrid(t_end=float(sde.time_at_log_snr(full(4.0, 1))))
    start = sde.prior_sample((n, 2), generator=seeded()).double()
    runs = [
        PCSampler(model, predictor, steps=k, grid=grid, denoise=False)(start, generator=noise())
        for k in steps
    ]
    return [float((a - b).square().sum(1).mean().sqrt()) for a, b in pairwise(runs)]


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=20.0)], ids=["vp", "ve"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_strong_order_is_one(sde, name):
    path = BrownianPath(range(50))
    coarse, fine = distances(sde, PREDICTORS[name], (24, 48, 96), lambda: path)
    assert fine < 0.1
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.25)


def test_without_a_path_the_distance_does_not_decrease():
    generators = iter(range(10))
    coarse, _, fine = distances(
        VPSDE(), Ancestral(), (16, 32, 64, 128), lambda: seeded(next(generators))
    )
    assert coarse > 1.0
    assert fine > 0.8 * coarse


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        (0, TypeError, r"seeds: expected a sequence of integers.*range\(64\), got int"),
        ([], ValueError, "seeds: expected at least one, got none"),
        ([0, 1.0], TypeError, "seeds: expected an integer, got float"),
        ([-1], ValueError, "seeds: expected an integer >= 0, got -1"),
        ([1 << 63], ValueError, r"seeds: expected integers below 2\^63, got 9223372036854775808"),
    ],
)
def test_invalid_seeds_raise(seeds, error, message):
    with pytest.raises(error, match=message):
        BrownianPath(seeds)


def test_invalid_steps_raise():
    sde, x, path = VPSDE(), torch.zeros(2, 3), BrownianPath([0, 1])
    t = full(0.5, 2)
    for s in (t, t * (1 - 1e-9), 1.1 * t):
        with pytest.raises(ValueError, match=r"at least 2\^-20 of an octave.*t = \[0.5, 0.5\]"):
            path.increment(x, sde, t, s)
    with pytest.raises(ValueError, match="one seed for each of the 3 samples, got 2"):
        path.increment(torch.zeros(3, 3), sde, full(0.5, 3), full(0.4, 3))
    model = GaussianMixtureModel(sde, [[0.0]], [1.0])
    with pytest.raises(ValueError, match="each of the 3 samples, got 2"):
        PCSampler(model, Ancestral(), steps=2)((3, 1), generator=path)
