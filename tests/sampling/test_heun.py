"""Euler, Heun and churn, on data whose probability flow is known."""

import math

import pytest
import torch
from support import seeded
from support.flow_values import AT_SIGMA_MIN, AT_ZERO, Z, line_mixture, rms
from support.gaussian_runs import MEAN, STD, flow_error, gaussian

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    ForwardSDE,
    GaussianMixtureModel,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    UniformGrid,
    X0Model,
)
from diffusionkit.sampling.grids import ChainGrid
from diffusionkit.sampling.heun import Euler, Heun

# Root mean square errors of an independent solver on Karras grids: at .002 after N steps, and at 0
# after N - 1 and 1.
ERRORS = {
    ("euler", 8): (0.1792685698314777, 0.21614000036201284),
    ("euler", 32): (0.05523159033831958, 0.056624581397870515),
    ("euler", 128): (0.018163100728926247, 0.018289060827206778),
    ("heun", 8): (0.1813907532359766, 0.2550963811637248),
    ("heun", 32): (0.010428209583192702, 0.01107403799671851),
    ("heun", 128): (0.0007238284156392212, 0.0007290173354123965),
}
# The same on a grid uniform in log(sigma), without the step to 0.
LOG_UNIFORM = {8: 0.24754152181125155, 32: 0.014201965196610444, 128: 0.0009013896575982782}


def run(predictor, grid, steps, sde=None, start=None):
    """Return the states after a run without denoising, and the number of evaluations."""
    sampler = PCSampler(
        line_mixture(sde or EDMSDE()), predictor, grid=grid, steps=steps, denoise=False
    )
    if start is None:
        start = Z * sampler.model.sde.marginal(sampler.times[:1])[1]
    return sampler(start).squeeze(1), sampler.nfe


@pytest.mark.parametrize(("name", "steps"), ERRORS)
def test_errors_equal_those_of_an_independent_solver(name, steps):
    predictor = Euler() if name == "euler" else Heun()
    found = rms(run(predictor, KarrasGrid(), steps)[0], AT_SIGMA_MIN)
    to_zero = rms(run(predictor, KarrasGrid(to_zero=True), steps)[0], AT_ZERO)
    assert (found, to_zero) == pytest.approx(ERRORS[name, steps], rel=1e-9)


@pytest.mark.parametrize("steps", LOG_UNIFORM)
def test_errors_on_a_log_uniform_grid_equal_those_of_an_independent_solver(steps):
    found = rms(run(Heun(), LogSNRGrid(), steps)[0], AT_SIGMA_MIN)
    assert found == pytest.approx(LOG_UNIFORM[steps], rel=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_heun_is_algorithm_1_of_edm(dtype, tolerance):
    x, nfe = run(Heun(), KarrasGrid(to_zero=True), 18, start=(80 * Z).to(dtype))
    expected = [
        -1.325992869514037, -1.0193396638236978, -0.17358538115826866, 0.5096465992553908,
        0.6506723642574732, 0.8796180688608441, 1.1293054596514813, 1.5882163883813152,
    ]  # fmt: skip
    assert nfe == 35
    assert x.dtype == dtype
    assert x.tolist() == pytest.approx(expected, abs=tolerance)


class RootTime(ForwardSDE):
    """EDM's VE column: sigma = sqrt(t)."""

    T, t_min = 100.0**2, 0.02**2

    def marginal(self, t):
        return torch.ones_like(t), torch.sqrt(t)


class UnscaledVP(ForwardSDE):
    """VP's noise schedule without its scaling."""

    T, t_min = 1.0, 1e-3

    def marginal(self, t):
        alpha, sigma = VPSDE().marginal(t)
        return torch.ones_like(t), sigma / alpha


TO_ZERO = {"to_zero": True}
CHAIN = ChainGrid(DDPMChain.cosine(1000), **TO_ZERO)


# Results of the paper's released code from Z[:3] with this mixture's denoiser, in 32 steps.
@pytest.mark.parametrize(
    ("sde", "predictor", "grid", "expected"),
    [
        (VPSDE(), Heun(), UniformGrid(**TO_ZERO),
         [-1.2923963115897428, -0.9845465477239831, -0.1180562951446286]),
        (VPSDE(), Euler(), UniformGrid(**TO_ZERO),
         [-1.2719105412253842, -0.9922890830594734, -0.1521431764805505]),
        (UnscaledVP(), Heun(), UniformGrid(**TO_ZERO),
         [-1.3240971941514466, -1.0078283475245444, -0.4484294831016548]),
        (RootTime(), Heun(), LogSNRGrid(**TO_ZERO),
         [-1.1929487993561954, -0.9208892766543729, 0.16760053506020609]),
        (RootTime(), Euler(), LogSNRGrid(**TO_ZERO),
         [-1.7600809984598356, -1.2503250054379005, -0.8945216385874905]),
        (EDMSDE(sigma_max=81.0), Heun(), CHAIN,
         [-1.2933948395792791, -0.9900379537627092, -0.14978178462211142]),
    ],
    ids=["vp", "vp-euler", "vp-unscaled", "ve", "ve-euler", "iddpm"],
)  # fmt: skip
def test_every_row_of_edms_ablation(sde, predictor, grid, expected):
    x, nfe = run(predictor, grid, 32, sde)
    assert x[:3].tolist() == pytest.approx(expected, abs=5e-7)
    assert nfe == (63 if isinstance(predictor, Heun) else 32)


def test_a_second_stage_beyond_the_step_equals_the_released_code():
    """At alpha = 1.1, in 18 steps."""
    x, nfe = run(Heun(alpha=1.1), KarrasGrid(to_zero=True), 18)
    expected = [-1.3369651069870858, -1.0285224442099713, -0.18447520588423252]
    assert x[:3].tolist() == pytest.approx(expected, abs=1e-8)
    assert nfe == 35


@pytest.mark.parametrize(
    ("predictor", "order"),
    [(Euler(), 1), (Heun(), 2), (Heun(alpha=0.6), 2), (Heun(alpha=1.1), 2)],
    ids=["euler", "1", "0.6", "1.1"],
)
def test_order_of_convergence(sde, predictor, order):
    if isinstance(sde, DDPMChain):
        pytest.skip("its drift is discontinuous at every step of the chain")
    coarse, fine = (flow_error(sde, predictor, n) for n in (128, 256))
    assert fine < 0.02
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_euler_is_ddim_where_time_is_the_noise_level():
    t, s = torch.tensor([3.0, 0.5]).double(), torch.tensor([0.2, 0.0]).double()
    x = torch.tensor([[0.3], [-0.8]], dtype=torch.float64)
    model = line_mixture(EDMSDE())
    ours, ddim = (p.step(model, x, t, s).x for p in (Euler(), DDIM()))
    torch.testing.assert_close(ours, ddim, rtol=1e-12, atol=1e-14)


def test_each_sample_has_its_own_times(sde):
    """Samples that end without noise take an Euler step, others two stages."""
    model = line_mixture(sde)
    t = torch.tensor([0.9, 0.3, 0.5], dtype=torch.float64) * sde.T
    s = torch.tensor([0.4, 0.0, 0.45], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9], [1.2]], dtype=torch.float64)
    for predictor in (Heun(), Heun(alpha=0.5), Euler()):
        together = predictor.step(model, x, t, s).x
        for i in range(3):
            times = torch.stack([t[i], s[i]])
            alone = PCSampler(model, predictor, grid=times, denoise=False)(x[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("predictor", "sde", "evaluations"),
    [
        (Heun(), EDMSDE(), 1),
        (Heun(alpha=0.5), EDMSDE(), 2),  # the midpoint has noise
        (Heun(alpha=1.1), EDMSDE(), 1),
        (Heun(), VESDE(), 2),  # there is noise at time 0
        (Heun(alpha=1.1), VESDE(), 1),  # its second stage would be below time 0
    ],
)
def test_evaluations_of_the_step_to_zero(predictor, sde, evaluations):
    grid = torch.tensor([0.1, 0.0])
    sampler = PCSampler(line_mixture(sde), predictor, grid=grid, denoise=False)
    x = sampler(torch.ones(2, 1))
    assert sampler.nfe == evaluations
    assert torch.isfinite(x).all()


# --- churn -----------------------------------------------------------------------------------


def churned(sde, times, k, predictor, x):
    """Return the k-th step of a run, from a state x."""
    sampler = PCSampler(line_mixture(sde), predictor, grid=times, denoise=False)
    steps = []

    class Watch(Heun):
        def step(self, model, state, t, s, memory=None, **kwargs):
            if len(steps) == k:
                state = x
            kwargs["generator"] = seeded()
            out = super().step(model, state, t, s, memory, **kwargs)
            steps.append(out.x)
            return out

    sampler.predictor = Watch(
        predictor.alpha, predictor.churn, predictor.s_min, predictor.s_max, predictor.s_noise
    )
    sampler(torch.zeros_like(x))
    return steps[k]


@pytest.mark.parametrize(("churn", "gamma"), [(0.6, 0.2), (2.0, math.sqrt(2) - 1)])
def test_churn_raises_the_noise_and_then_steps(sde, churn, gamma):
    """One of three steps: noise by hand, then a plain step from the raised time."""
    times = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9]], dtype=torch.float64)
    alpha, sigma = (float(c) for c in sde.marginal(times[1:2]))
    ratio = sigma / alpha
    predictor = Heun(churn=churn, s_noise=1.1)
    found = churned(sde, times, 1, predictor, x)

    raised = ratio * (1 + gamma)
    t_hat = sde.time_at_log_snr(torch.tensor([-2 * math.log(raised)] * 2, dtype=torch.float64))
    alpha_hat = float(sde.marginal(t_hat)[0][0])
    z = torch.randn((2, 1), generator=seeded(), dtype=torch.float64)
    noise = alpha_hat * math.sqrt(raised**2 - ratio**2) * 1.1
    start = alpha_hat / alpha * x + noise * z
    expected = Heun().step(line_mixture(sde), start, t_hat, times[2].expand(2)).x
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bounds", [{"s_min": 1e9}, {"s_max": 1e-9}])
def test_a_step_outside_the_churn_bounds_adds_no_noise(sde, bounds):
    times = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64) * sde.T
    x = torch.tensor([[0.4], [-0.9]], dtype=torch.float64)
    found = churned(sde, times, 1, Heun(churn=2.0, **bounds), x)
    plain = Heun().step(line_mixture(sde), x, times[1].expand(2), times[2].expand(2)).x
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


def test_churn_does_not_raise_the_noise_above_that_of_T():
    """The first step of a run from T adds no noise, and no time is above T."""
    seen = []

    class Watch(EDMSDE):
        def marginal(self, t):
            seen.append(float(t.max()))
            return super().marginal(t)

    times = KarrasGrid()(EDMSDE(), 6)
    predictor = Heun(churn=60.0)
    x = torch.full((2, 1), 40.0, dtype=torch.float64)
    found = churned(Watch(), times, 0, predictor, x)
    plain = Heun().step(line_mixture(EDMSDE()), x, times[0].expand(2), times[1].expand(2)).x
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert max(seen) == 80.0


def test_churn_draws_noise_within_its_bounds_only():
    """Of 18 steps, those at levels from .229 to 19.4, both included."""

    def drawn(predictor):
        generator = seeded()
        sampler = PCSampler(
            line_mixture(EDMSDE()), predictor, grid=KarrasGrid(to_zero=True), steps=18
        )
        sampler(80 * Z, generator=generator)
        count, other = 0, seeded()
        while not torch.equal(other.get_state(), generator.get_state()):
            torch.randn((8, 1), generator=other, dtype=torch.float64)
            count += 1
        return count

    levels = KarrasGrid(to_zero=True)(EDMSDE(), 18)
    assert drawn(Heun()) == 0
    assert drawn(Heun(churn=40.0)) == 17  # all but the one at T
    bounds = {"s_min": float(levels[12]), "s_max": float(levels[4])}
    assert drawn(Heun(churn=40.0, **bounds)) == 9
    assert drawn(Heun(churn=40.0, s_min=81.0)) == 0


@pytest.mark.parametrize("sde", [EDMSDE(), VPSDE()], ids=["edm", "vp"])
def test_churn_does_not_change_the_distribution(sde):
    """20000 samples of standard deviation .4, with a standard error of .5%."""
    model, n = gaussian(sde), 20_000
    for predictor, low, high in (
        (Heun(churn=30.0), 0.98, 1.02),
        (Heun(churn=30.0, s_noise=1.1), 1.05, 1.3),  # inflated noise is not removed as detail
    ):
        sampler = PCSampler(model, predictor, grid=KarrasGrid(to_zero=True), steps=64)
        x = sampler((n, 1), generator=seeded(), dtype=torch.float64)
        assert low < float(x.std()) / STD < high
        assert float(x.mean()) == pytest.approx(MEAN, abs=4 * 0.45 / math.sqrt(n))


def test_churn_in_the_time_of_every_process(sde):
    """N(0, .5^2), 100 steps, churn 40; a solver that takes the time for the noise gives .2 to 3.

    The standard error of 4000 samples is .0056, and the steps' own error at most .01.
    """
    model = GaussianMixtureModel(sde, [[0.0]], [0.5])
    sampler = PCSampler(model, Heun(churn=40.0), steps=100, grid=LogSNRGrid())
    x = sampler((4000, 1), generator=seeded(), dtype=torch.float64)
    assert float(x.std()) == pytest.approx(0.5, abs=0.025)


def test_churn_takes_one_generator_for_each_sample():
    sampler = PCSampler(
        line_mixture(EDMSDE()), Heun(churn=20.0), grid=KarrasGrid(to_zero=True), steps=8
    )
    together = sampler((3, 1), generator=[seeded(i) for i in range(3)])
    torch.testing.assert_close(together[1:2], sampler((1, 1), generator=[seeded(1)]))


def test_churn_outside_a_samplers_run_raises():
    t, s = torch.tensor([2.0]), torch.tensor([1.0])
    with pytest.raises(ValueError, match=r"churn: expected a sampler's step.*churn = 5\.0"):
        Heun(churn=5.0).step(line_mixture(EDMSDE()), torch.ones(1, 1), t, s)
    Heun(churn=5.0).prepare(EDMSDE(), [t, s])  # does nothing for times that are not a grid's


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha: expected a finite number > 0, got 0.0"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number, got str"),
        ({"churn": -1.0}, ValueError, "churn: expected a finite number >= 0, got -1.0"),
        ({"churn": math.inf}, ValueError, "churn: expected a finite number >= 0, got inf"),
        ({"churn": None}, TypeError, "churn: expected a number, got NoneType"),
        ({"s_min": 2.0, "s_max": 1.0}, ValueError, "expected 0 <= s_min <= s_max, got 2.0 and 1"),
        ({"s_min": -1.0}, ValueError, "expected 0 <= s_min <= s_max, got -1.0 and inf"),
        ({"s_max": math.nan}, ValueError, "expected 0 <= s_min <= s_max, got 0.0 and nan"),
        ({"s_noise": 0.0}, ValueError, "s_noise: expected a finite number > 0, got 0.0"),
    ],
)
def test_invalid_settings_raise(options, error, message):
    with pytest.raises(error, match=message):
        Heun(**options)


def test_invalid_times_raise():
    model, x = line_mixture(EDMSDE()), torch.ones(2, 1)
    t = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected s < t, got s = \[0.5, 3.0\]"):
        Heun().step(model, x, t, torch.tensor([0.5, 3.0]))
    with pytest.raises(ValueError, match=r"t: expected times within \[0, T\] = \[0, 80\]"):
        Heun().step(model, x, torch.tensor([1.0, 81.0]), t / 2)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(1,\)"):
        Heun().step(model, x, t, torch.tensor([0.5]))


def test_gradients_flow_through_a_step():
    scale = torch.tensor(0.5, requires_grad=True)
    model = X0Model(lambda x, noise_label: scale * x, EDMSDE())
    t, s = torch.tensor([2.0]).double(), torch.tensor([1.0]).double()
    Heun().step(model, torch.ones(1, 1).double(), t, s).x.sum().backward()
    # d = x / 4 at 2, x' = 3/4, d' = 3/8: x_s = 1 - (1/4 + 3/8) / 2, differentiated in scale.
    u = 1 - 0.5
    assert float(scale.grad) == pytest.approx(0.25 + 0.5 * (1 - 0.5 * u) - 0.25 * u, rel=1e-6)
