"""The four preconditionings of EDM's table 1 and their losses, as compositions."""

import pytest
import torch
from support import seeded
from support.recorder import Recorder

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EDMWeighting,
    EpsModel,
    IndexLabel,
    LogNormalTimes,
    ScaledScoreModel,
    ScoreMatching,
    SigmaLabel,
    SimpleWeighting,
    UniformTimes,
)
from diffusionkit.models.schedule_transform import ScheduleTransformedModel
from diffusionkit.sampling.grids import ChainGrid

OUTPUT = torch.tensor([[0.4, 2.0]], dtype=torch.float64)
X = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
CHAIN = DDPMChain.cosine(1000)
LEVELS = SigmaLabel()(CHAIN, torch.arange(1, 1001, dtype=torch.float64) / 1000)  # increasing


def model_of(name, network):
    """Return a model of table 1 of Karras et al., with sigma as time and alpha = 1."""
    if name == "edm":
        return EDMModel(network, EDMSDE())
    if name == "vp":
        return ScheduleTransformedModel(EpsModel(network, VPSDE()), EDMSDE())
    if name == "ve":
        return ScaledScoreModel(network, EDMSDE())
    return ScheduleTransformedModel(EpsModel(network, CHAIN, label=IndexLabel(LEVELS)), EDMSDE())


# c_skip, c_out, c_in, c_noise and the loss weight of the data error, computed independently.
TABLE = [
    ("edm", 0.002, 0.9999840002559959, 0.0019999840001919972, 1.9999840001919975,
     -1.5536520246055479, 250004.0),
    ("vp", 0.002, 1.0, -0.002, 0.999998000006, 0.03980213341601453, 250000.0),
    ("ve", 0.002, 1.0, 0.002, 1.0, -6.907755278982137, 250000.0),
    ("edm", 1.0, 0.2, 0.4472135954999579, 0.8944271909999159, 0.0, 5.0),
    ("vp", 1.0, 1.0, -1.0, 0.7071067811865476, 258.7013021703638, 1.0),
    ("ve", 1.0, 1.0, 1.0, 1.0, -0.6931471805599453, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sigma", "c_skip", "c_out", "c_in", "c_noise", "weight"), TABLE)
def test_preconditionings_of_table_1(name, sigma, c_skip, c_out, c_in, c_noise, weight):
    network = Recorder(OUTPUT)
    model = model_of(name, network)
    t = torch.tensor([sigma], dtype=torch.float64)
    prediction = model.predict(X, t)
    expected = c_skip * X + c_out * OUTPUT
    torch.testing.assert_close(prediction.x0, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(prediction.eps, (X - expected) / sigma, rtol=1e-9, atol=1e-9)
    seen, label, _ = network.calls[0]
    torch.testing.assert_close(seen, c_in * X, rtol=1e-12, atol=0)
    assert float(label) == pytest.approx(c_noise, rel=1e-9, abs=1e-15)
    # The weight of the noise error is larger by sigma^2.
    weighting = EDMWeighting() if name == "edm" else SimpleWeighting()
    assert float(weighting(model.sde, t)) / sigma**2 == pytest.approx(weight, rel=1e-12)


# EDM's u_j, the noise levels of iDDPM, computed independently; u_0 belongs to the last step.
U = {
    0: 20291.16961002151, 1: 641.6623451182564, 2: 320.8303932725512, 10: 64.16109114040533,
    100: 6.364591868537916, 500: 1.0123895639480043, 900: 0.16943564199497224,
    990: 0.02513325220764209, 999: 0.006425412771127171,
}  # fmt: skip


def test_iddpm_levels():
    assert {j: float(LEVELS[999 - j]) for j in U} == pytest.approx(U, rel=1e-10)


@pytest.mark.parametrize("j", [10, 100, 500, 900, 990, 999])
@pytest.mark.parametrize("off", [0.9995, 1.0, 1.0005])
def test_iddpm_preconditioning(j, off):
    """c_noise = 999 - argmin |u_j - sigma|; the levels of the chain differ by 0.2% or more."""
    network = Recorder(OUTPUT)
    sigma = U[j] * off
    model = model_of("iddpm", network)
    prediction = model.predict(X, torch.tensor([sigma], dtype=torch.float64))
    torch.testing.assert_close(prediction.x0, X - sigma * OUTPUT, rtol=1e-9, atol=0)
    seen, label, _ = network.calls[0]
    torch.testing.assert_close(seen, X / (sigma**2 + 1) ** 0.5, rtol=1e-9, atol=0)
    assert float(label) == 999 - j


def test_iddpm_discretization():
    """Evenly spaced indices, rounded, from u_8 = 81; on the chain itself, its own steps."""
    grid = ChainGrid(CHAIN, to_zero=True)
    times = grid(EDMSDE(sigma_max=81.0), 11)
    index = [8, 107, 206, 305, 404, 504, 603, 702, 801, 900, 999]  # round(99.1 i) + 8
    torch.testing.assert_close(times[:-1], LEVELS.flip(0)[index], rtol=1e-10, atol=0)
    assert float(times[-1]) == 0.0
    low = float(grid(EDMSDE(sigma_min=0.1, sigma_max=81.0), 5)[-2])
    assert 0.1 <= low < 0.101
    own = ChainGrid(CHAIN)(CHAIN, 3) * 1000
    torch.testing.assert_close(own, torch.tensor([1000.0, 667.0, 334.0, 1.0]).double())
    with pytest.raises(ValueError, match=r"steps: expected at most 992 .* got 993"):
        grid(EDMSDE(sigma_max=81.0), 993)
    with pytest.raises(TypeError, match="chain: expected a Chain, got VPSDE"):
        ChainGrid(VPSDE())


def draw(times, sde):
    t, weight = times.sample(sde, 20_000, generator=seeded())
    assert weight.unique().tolist() == [1.0]
    return sde.marginal(t)


def test_distributions_of_the_noise_levels():
    """EDM: Gaussian in log(sigma). VE: uniform in log(sigma). VP: induced by uniform times."""
    log = torch.log(draw(LogNormalTimes(), EDMSDE())[1])
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log.std()) == pytest.approx(1.2, abs=0.03)
    ends = torch.log(torch.tensor([0.02, 100.0]))
    log = torch.log(draw(UniformTimes(), VESDE(0.02, 100.0))[1]).sort().values
    even = torch.linspace(*ends.tolist(), 20_000, dtype=torch.float64)
    assert float((log - even).abs().max() / (ends[1] - ends[0])) < 0.02  # Kolmogorov's distance
    alpha, sigma = draw(UniformTimes(), VPSDE())
    assert float((sigma / alpha).median()) == pytest.approx(3.412918309069121, rel=0.05)


@pytest.mark.parametrize("name", ["edm", "vp", "ve"])
def test_losses_are_weighted_data_errors(name):
    """weight |D - x0|^2, with the times and the noise of the objective."""
    network = Recorder(OUTPUT)
    model = {
        "edm": lambda: EDMModel(network, EDMSDE()),
        "vp": lambda: EpsModel(network, VPSDE()),
        "ve": lambda: ScaledScoreModel(network, VESDE(0.02, 100.0)),
    }[name]()
    weighting, times = (
        (EDMWeighting(), LogNormalTimes()) if name == "edm" else (SimpleWeighting(), UniformTimes())
    )
    x0 = torch.randn(64, 2, generator=seeded(1), dtype=torch.float64)
    objective = ScoreMatching(weighting, times=times)
    loss = objective(model, x0, generator=seeded(2))
    generator = seeded(2)
    t, _ = times.sample(model.sde, 64, generator=generator, dtype=torch.float64)
    sample = model.sde.perturb(x0, t, generator=generator)
    s = (sample.sigma / sample.alpha).unsqueeze(1)
    weight = (s**2 + 0.25) / (0.5 * s) ** 2 if name == "edm" else s**-2
    error = weight * (model.predict(sample.x, t).x0 - x0).square()
    torch.testing.assert_close(loss, error.mean(1), rtol=1e-6, atol=0)


def test_edm_model_works_with_every_process(sde):
    """With zero output it is the best linear denoiser of data of variance sigma_data^2."""
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64) * sde.T
    sample = sde.perturb(torch.randn(4, 2, generator=seeded()).double(), t, generator=seeded(1))
    prediction = EDMModel(Recorder(), sde, sigma_data=0.7).predict(sample.x, t)
    alpha, sigma = sample.alpha.unsqueeze(1), sample.sigma.unsqueeze(1)
    gain = alpha * 0.49 / (alpha**2 * 0.49 + sigma**2)
    torch.testing.assert_close(prediction.x0, gain * sample.x, rtol=1e-9, atol=1e-12)


def test_edm_model_gives_the_network_unit_variance(sde):
    g = seeded()
    x0 = 0.5 * torch.randn(2, 20000, generator=g, dtype=torch.float64)
    t = sde.time_at_log_snr(torch.tensor([3.0, -3.0], dtype=torch.float64))
    network = Recorder()
    EDMModel(network, sde).predict(sde.perturb(x0, t, generator=g).x, t)
    # 20000 normals: the standard error of a standard deviation is .5%.
    std = network.calls[0][0].std(1)
    torch.testing.assert_close(std, torch.ones(2).double(), rtol=0.02, atol=0)
