import math
from unittest import mock

import pytest
import torch
from support import seeded

from diffusionkit import (
    VESDE,
    VPSDE,
    EpsModel,
    GaussianMixtureModel,
    LogSigmaLabel,
    Prediction,
    ScoreModel,
    X0Model,
)
from diffusionkit.decoders import LevelDecoder
from diffusionkit.likelihood import _control_variates
from diffusionkit.likelihood.discrete_nelbo import DiscreteNELBO, variance_minimizing_backward
from diffusionkit.networks import MLP
from diffusionkit.sde.learned import LearnedSDE, LogSNRSDE

# Nats per dimension for standard normal data and the exact score, gamma from -13.3 to 5, to 40
# digits by other code.
L_INF = 6.646643163001345
L_STEPS = {10: 17.707851893055114, 100: 7.24379287583708, 1000: 6.703246331847182}
PRIOR = {0.0: 1.1248782416606528e-05, 1.0: 0.003357674244559034}


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def variance(log_snr):
    """The minimum mean squared error of the noise, for standard normal data."""
    return torch.sigmoid(log_snr)


class Peeking(ScoreModel):
    """Predicts from the data, with exactly the mean squared error of the exact model of N(0, 1)."""

    def __init__(self, sde, x0) -> None:
        super().__init__()
        self.sde, self.x0 = sde, x0
        self.exact = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))  # sets the dtype
        self.times = None

    def predict(self, x, t, **cond):
        self.times = t
        alpha, sigma = self.sde.marginal(t)
        eps = (x - alpha[:, None] * self.x0) / sigma[:, None]
        error = variance(self.sde.log_snr(t)).sqrt()
        # Of x0: -sigma / alpha times that of eps, with a limit at alpha = 0.
        off = (1 / (1 + self.sde.log_snr(t).exp())).sqrt()
        return Prediction(x, self.x0 - off[:, None], eps + error[:, None], alpha, sigma)


def bound_of(sde, n, parts=(3, -1.0, 1.0), level=1, **options):
    decoder = LevelDecoder(*parts)
    images = torch.full((n, 1), level)
    model = Peeking(sde, decoder.encode(images, dtype=torch.float64))
    return DiscreteNELBO(model, decoder, **options)(images, generator=seeded()), model


@pytest.mark.parametrize("steps", L_STEPS)
def test_a_chain_of_steps(steps) -> None:
    """Evenly spaced times visit each step once, so the mean is the sum over steps."""
    bound, _ = bound_of(LogSNRSDE(), steps, steps=steps)
    assert float(bound.diffusion.detach().mean()) == pytest.approx(L_STEPS[steps], rel=1e-9)
    assert L_STEPS[steps] > L_INF


def test_a_chain_converges_to_continuous_time_at_first_order() -> None:
    gaps = []
    for steps in (1000, 2000, 4000):
        bound, _ = bound_of(LogSNRSDE(), steps, steps=steps)
        gaps.append(float(bound.diffusion.detach().mean()) - L_INF)
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.02)
    assert gaps[1] / gaps[2] == pytest.approx(2, abs=0.02)


def test_continuous_time() -> None:
    bound, model = bound_of(LogSNRSDE(), 4000)
    expected = 0.5 * 18.3 * variance(13.3 - 18.3 * model.times)
    torch.testing.assert_close(bound.diffusion.detach(), expected, rtol=1e-9, atol=0)
    assert float(bound.diffusion.detach().mean()) == pytest.approx(L_INF, abs=0.5 * 18.3 / 4000)
    spacing = model.times.sort()[0].diff()  # one time in each interval of 1 / n
    torch.testing.assert_close(spacing, torch.full_like(spacing, 1 / 4000), rtol=1e-6, atol=0)


def test_the_diffusion_term_of_every_process(sde) -> None:
    bound, model = bound_of(sde, 200)
    t, span = model.times, sde.T - sde.t_min
    h = 1e-3 * t.clamp_max(sde.T - t)
    slope = (sde.log_snr(t - h) - sde.log_snr(t + h)) / (2 * h)
    expected = 0.5 * span * slope * variance(sde.log_snr(t))
    # The slope of the chain jumps at its thousand steps, a few of which are within h.
    off = (bound.diffusion.detach() / expected - 1).abs()
    assert off.median() < 1e-3
    assert off.max() < (0.5 if hasattr(sde, "betas") else 1e-3)
    chain, _ = bound_of(sde, 20, steps=20)
    snr = sde.log_snr(sde.t_min + span * torch.arange(21).double() / 20).exp()
    total = 0.5 * (-snr.diff() / (1 + snr[1:])).sum()  # times the variance of x0 given x
    torch.testing.assert_close(chain.diffusion.detach().mean(), total, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("x", "parts"), [(0.0, (3, -1.0, 1.0)), (1.0, (3, -0.5, 2.5))])
def test_prior_term(x, parts) -> None:
    bound, model = bound_of(LogSNRSDE(), 2, parts)
    assert float(model.x0[0]) == x
    assert bound.prior.tolist() == pytest.approx([PRIOR[x]] * 2, rel=1e-9)


def test_prior_term_of_other_processes() -> None:
    for sde in (VPSDE(), VESDE(sigma_max=5.0)):
        bound, _ = bound_of(sde, 1, (2, -2.0, 2.0))
        alpha, sigma, std = (*(c.item() for c in sde.marginal(f64(1.0))), sde.prior_std)
        noisy, prior = (torch.distributions.Normal(*f64(*p)) for p in ((alpha, sigma), (0, std)))
        expected = float(torch.distributions.kl_divergence(noisy, prior))
        assert float(bound.prior) == pytest.approx(expected, rel=1e-6)


def test_reconstruction_is_the_decoder_at_t_min() -> None:
    for sde in (LogSNRSDE(-4.0, 5.0), VESDE(sigma_min=0.1)):
        bound, _ = bound_of(sde, 20000, (16, -1.0, 1.0), 5)
        decoder = LevelDecoder(16)
        eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        alpha, sigma = (c.expand(4001) for c in sde.marginal(f64(sde.t_min)))
        images = torch.full((4001, 1), 5)
        z = alpha[:, None] * decoder.encode(images, dtype=torch.float64) + (sigma * eps)[:, None]
        density = torch.exp(-0.5 * eps**2) / math.sqrt(2 * math.pi) * (16 / 4000)
        expected = -float((decoder.log_prob(images, z, alpha, sigma) * density).sum())
        read = bound.reconstruction
        assert abs(float(read.mean()) - expected) < 4 * float(read.std()) / math.sqrt(20000)
        assert expected > 0.1


WEIGHTS = (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    "sde", [LogSNRSDE(-8.0, 8.0), VPSDE(), VESDE(sigma_min=0.02, sigma_max=30.0)], ids=repr
)
def test_the_bound_is_tight_for_the_exact_score(sde) -> None:
    """For every image the terms sum to -log P(image), without an offset."""
    decoder, n = LevelDecoder(4), 20000
    k = torch.arange(4).unsqueeze(1)
    means = decoder.encode(k, dtype=torch.float64)
    model = GaussianMixtureModel(sde, means=means, stds=[0.0] * 4, weights=WEIGHTS)
    bound = DiscreteNELBO(model, decoder)
    for level, weight in enumerate(WEIGHTS):
        nats = bound(k[level].expand(n, 1), generator=seeded(level)).nats
        error = float(nats.std()) / math.sqrt(n)
        assert float(nats.mean()) == pytest.approx(-math.log(weight), abs=4 * error + 0.002)
        assert error < 0.08


def test_terms_are_sums_over_dimensions() -> None:
    model = EpsModel(lambda x, noise_label: 0 * x, LogSNRSDE())
    images = torch.randint(256, (2, 3, 4, 4), generator=seeded(), dtype=torch.uint8)
    bound = DiscreteNELBO(model)(images, generator=seeded())
    torch.testing.assert_close(bound.nats, bound.reconstruction + bound.prior + bound.diffusion)
    x = 2 * (images.double() + 0.5) / 256 - 1
    expected = 48 * PRIOR[0.0] + x.square().sum((1, 2, 3)) * (PRIOR[1.0] - PRIOR[0.0])
    torch.testing.assert_close(bound.prior, expected, rtol=1e-6, atol=0)
    # The error is all of the noise: chi-squared with 48 degrees of freedom.
    assert (bound.diffusion / (0.5 * 18.3 * 48) - 1).abs().max() < 0.8


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = EpsModel(MLP(3), LogSNRSDE(), label=LogSigmaLabel())
    images = torch.randint(256, (4, 3), generator=seeded())
    for steps in (None, 7):
        bound = DiscreteNELBO(model, steps=steps)
        whole = bound(images, generator=[seeded(i) for i in range(4)]).nats
        parts = [bound(images[i : i + 1], generator=[seeded(i)]).nats for i in range(4)]
        torch.testing.assert_close(whole, torch.cat(parts))
    assert "steps=7" in repr(bound)


def test_conditions_and_gradients_reach_the_model() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (64, 2))
    net = MLP(2, num_classes=2)
    model = X0Model(net, LogSNRSDE(), label=LogSigmaLabel())
    bound = DiscreteNELBO(model)
    class_labels = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(TypeError, match="label"):
        bound(images)
    terms = bound(images, generator=seeded(), class_labels=class_labels)
    terms.nats.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert any((p.grad != 0).any() for p in net.parameters())


def test_a_model_in_double_precision() -> None:
    model = EpsModel(MLP(2).double(), LogSNRSDE())
    assert DiscreteNELBO(model)(torch.zeros(3, 2, dtype=torch.uint8)).nats.dtype == torch.float64


def learned(**options):
    torch.manual_seed(0)
    sde = LearnedSDE(-6.0, 4.0, hidden=4, learn_ends=True).double()
    net = MLP(2, width=8, depth=1).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model = EpsModel(net, sde, label=LogSigmaLabel())
    return DiscreteNELBO(model, LevelDecoder(8), **options), sde, net


def test_gradients_of_the_interior_and_of_other_parameters() -> None:
    bound, sde, net = learned()
    images = torch.randint(8, (6, 2), generator=seeded())
    others = [*net.parameters(), sde.ends]

    def terms():
        return bound(images, generator=seeded(1))

    for p in (*others, *sde.interior()):
        p.grad = torch.ones_like(p)
    variance_minimizing_backward(terms().nats.mean(), terms().diffusion, sde.interior())
    wanted = torch.autograd.grad(terms().nats.mean(), others)
    for p, gradient in zip(others, wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient + 1)
    h = 1e-5
    for p in sde.interior():
        assert (p.grad - 1).abs().max() > 0
        for i in range(4):
            values = []
            with torch.no_grad():
                for sign in (1, -1):
                    p[i] += sign * h
                    values.append(float(terms().diffusion.square().mean()))
                    p[i] -= sign * h
            slope = (values[0] - values[1]) / (2 * h)
            assert float(p.grad[i]) - 1 == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("steps", [None, 5])
def test_differentiable_in_the_whole_schedule(steps) -> None:
    bound, sde, _ = learned(steps=steps)
    images = torch.randint(8, (6, 2), generator=seeded())
    for term in ("reconstruction", "prior", "diffusion"):
        value = getattr(bound(images, generator=seeded(1)), term).sum()
        (gradient,) = torch.autograd.grad(value, sde.ends)
        h = 1e-5
        for i in range(2):
            values = []
            with torch.no_grad():
                for sign in (1, -1):
                    sde.ends[i] += sign * h
                    values.append(float(getattr(bound(images, generator=seeded(1)), term).sum()))
                    sde.ends[i] -= sign * h
            slope = (values[0] - values[1]) / (2 * h)
            assert float(gradient[i]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_training_the_interior_reduces_the_variance_but_not_the_mean() -> None:
    """For N(0, s^2) gamma' v(gamma) is constant at the optimum, v the mean squared error."""
    s, d = 0.05, 8
    sde = LearnedSDE(hidden=64)
    model = GaussianMixtureModel(sde, means=torch.zeros(1, d), stds=[s])
    bound, decoder = DiscreteNELBO(model), LevelDecoder()
    generator = seeded()
    data = decoder.decode(s * torch.randn(4096, d, generator=generator))
    gamma = torch.linspace(-13.3, 5, 20001, dtype=torch.float64)

    def error(gamma):
        return torch.sigmoid(-gamma + 2 * math.log(s))

    integral = torch.trapezoid(error(gamma), gamma)

    def moments():
        """Return the mean of gamma' v, and its second moment relative to the minimum."""
        t = torch.linspace(0, 1, 20001, dtype=torch.float64)
        with torch.no_grad():
            g = -sde.log_snr(t)
            rate = (sde.diffusion(t) / sde.marginal(t)[1]) ** 2 * error(g)
        return float(torch.trapezoid(rate, t)), float(torch.trapezoid(rate**2, t) / integral**2)

    def estimate():
        with torch.no_grad():
            diffusion = bound(data, generator=generator).diffusion
        return float(diffusion.mean()), float(diffusion.std())

    (mean, ratio), (before, spread) = moments(), estimate()
    assert ratio > 1.8
    optimizer = torch.optim.Adam(sde.interior(), lr=0.1, betas=(0.9, 0.9))
    for step in range(150):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        terms = bound(data[torch.randint(4096, (64,), generator=generator)], generator=generator)
        variance_minimizing_backward(terms.nats.mean() / d, terms.diffusion / d, sde.interior())
        optimizer.step()
    (new_mean, new_ratio), (after, new_spread) = moments(), estimate()
    assert new_ratio < 1.15
    assert new_mean == pytest.approx(mean, rel=1e-6) == float(integral)
    assert abs(after - before) < 4 * spread / math.sqrt(4096)
    assert new_spread < 0.8 * spread


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("samples", [2, 40])
def test_several_draws_are_unbiased_with_less_noise(steps, samples) -> None:
    """400 estimates agree with the sum over all steps, and their spread with stderr."""
    s, sde, decoder = 0.5, LogSNRSDE(), LevelDecoder(levels=17)
    model = GaussianMixtureModel(sde, means=torch.zeros(1, 6), stds=[s])
    images = torch.tensor([[0, 3, 8, 8, 12, 15]])
    x = decoder.encode(images, dtype=torch.float64)
    t = torch.linspace(sde.t_min, sde.T, 1 + (steps or 20_000), dtype=torch.float64)
    alpha, sigma = sde.marginal(t)
    v = (alpha * s).square() + sigma.square()
    # Of the data, at the ends of the steps: sigma (alpha s^2 eps - sigma x) / v.
    error = sigma.square() * (6 * (alpha * s * s).square() + sigma.square() * x.square().sum()) / (
        v.square())  # fmt: skip
    snr = torch.exp(sde.log_snr(t))
    if steps:
        exact = 0.5 * ((snr[:-1] - snr[1:]) * error[1:]).sum()
    else:
        exact = 0.5 * torch.trapezoid(snr * error, -sde.log_snr(t))
    many, generators = images.expand(400, -1), [seeded(i) for i in range(400)]
    bound = DiscreteNELBO(model, decoder, steps=steps, samples=samples)(many, generator=generators)
    spread = float(bound.nats.std())
    assert float(bound.diffusion.mean()) == pytest.approx(float(exact), abs=3.5 * spread / 20)
    stated = float(bound.stderr.square().mean().sqrt())
    # The terms of few steps change much from one to the next, and two draws do not tell.
    assert 0.8 < stated / spread < (3.0 if samples == 2 else 2.0 if steps else 1.3)
    with mock.patch.object(_control_variates, "LEAST", 10**9):
        plain = DiscreteNELBO(model, decoder, steps=steps, samples=samples)(
            many, generator=seeded()
        )
    assert spread < (0.5 if samples > 2 else 1.3) * float(plain.nats.std())
    assert DiscreteNELBO(model, decoder)(many).stderr is None


def test_gradients_and_masks_of_several_draws() -> None:
    """The gradient of the mean does not depend on their number; masked elements do not count."""
    sde, images = LogSNRSDE(), torch.tensor([[5, 9, 2]]).expand(2000, 3)
    found = []
    for samples in (1, 20):
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        model = X0Model(lambda x, noise_label, scale=scale: scale * torch.tanh(x), sde)
        bound = DiscreteNELBO(model, LevelDecoder(levels=17), steps=8, samples=samples)
        mask = torch.tensor([[1, 0, 1]])
        nats = bound(images, mask=mask, generator=seeded()).diffusion
        gradient = torch.autograd.grad(nats.mean(), scale)[0]
        found.append((float(nats.detach().mean()), float(gradient)))
        other = bound(images * mask, mask=mask, generator=seeded()).diffusion
        torch.testing.assert_close(nats, other)
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_bad_input() -> None:
    model = EpsModel(lambda x, noise_label: 0 * x, LogSNRSDE())
    with pytest.raises(TypeError, match="model: expected a ScoreModel"):
        DiscreteNELBO(MLP(2))
    with pytest.raises(TypeError, match="decoder: expected a LevelDecoder, got int"):
        DiscreteNELBO(model, 256)
    with pytest.raises(ValueError, match="steps: expected an integer >= 1, got 0"):
        DiscreteNELBO(model, steps=0)
    with pytest.raises(ValueError, match="samples: expected an integer >= 1, got 0"):
        DiscreteNELBO(model, samples=0)
    bound = DiscreteNELBO(model)
    with pytest.raises(TypeError, match="images: expected integers"):
        bound(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"levels 0 \.\.\. 255, got 0 to 256"):
        bound(torch.tensor([[0, 256]]))
    with pytest.raises(ValueError, match="each of the 2 samples, got 3"):
        bound(torch.zeros(2, 3, dtype=torch.uint8), generator=[seeded()] * 3)
    broken = EpsModel(lambda x, noise_label: x * math.nan, LogSNRSDE())
    with pytest.raises(ValueError, match=r"finite prediction, got .* at t = 0\."):
        DiscreteNELBO(broken)(torch.zeros(2, 3, dtype=torch.uint8))
