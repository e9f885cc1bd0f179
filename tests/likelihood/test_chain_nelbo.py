"""The bound under a chain, step by step, against closed forms of Gaussian models."""

import math

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, DDPMChain, EpsModel, evaluate_bits_per_dim
from diffusionkit.decoders import GaussianDecoder
from diffusionkit.likelihood import _control_variates
from diffusionkit.likelihood.chain_nelbo import ChainBound, ChainNELBO, bits_per_step

LN2 = math.log(2)
IMAGE = torch.tensor([[0, 255, 100, 17]])  # -1, 1, -0.2157, -0.8667

# Exact expectations of the bits per dimension of IMAGE at each step, for the exact model of data
# from N(0, 1/4), the cosine chain of 50 steps and fixed small variances.
TOY = [
    3.143231829993875, 1.553182944411248, 0.7758343408324063, 0.5233144411391641,
    0.39887180222871776, 0.32446547358818617, 0.2744278580432246, 0.2379272011017407,
    0.20966343374750035, 0.18677991411883652, 0.1676286320184439, 0.15120800416532357,
    0.1368816862509443, 0.12422802149258497, 0.11295541723308648, 0.10285313594146953,
    0.09376200279651768, 0.08555668073400527, 0.07813480877043866, 0.07141026627572188,
    0.06530893567793176, 0.059765983332278894, 0.054724064413146395, 0.05013209127870239,
    0.04594434706865802, 0.04211981313515459, 0.038621631751565064, 0.03541665749685314,
    0.03247506984645683, 0.029770030809055933, 0.027277378021767586, 0.024975347458685303,
    0.02284432198506651, 0.020866603108622934, 0.01902620386291858, 0.017308661054200248,
    0.0157008652544528, 0.014190907008997377, 0.012767937788076548, 0.011422044268692854,
    0.010144134593671571, 0.008925835321460133, 0.00775939785150541, 0.006637613183934302,
    0.0055537339462286344, 0.004501402691435881, 0.003474585540359831, 0.002467510302836303,
    0.0014746082697062023, 0.0004899687385013189,
]  # fmt: skip
TOTAL = 9.444406069927284


class Gaussian(EpsModel):
    """The exact model of data from N(0, variance I)."""

    def __init__(self, chain: DDPMChain, spread: float = 0.25) -> None:
        def network(x, label):
            alpha, sigma = (c.view(-1, 1) for c in chain.marginal(label))
            return sigma / (alpha**2 * spread + sigma**2) * x

        super().__init__(network, chain, label=lambda sde, t: t.double())


def generators(n: int) -> list[torch.Generator]:
    return [seeded(i) for i in range(n)]


def test_each_step_of_a_gaussian_model() -> None:
    """Within four standard errors of the exact expectation, step by step, and in total."""
    n = 4000
    bound = ChainNELBO(
        Gaussian(DDPMChain.cosine(50)), GaussianDecoder(cdf="tanh"), clip=False, steps_at_once=10
    )(IMAGE.expand(n, -1), generator=seeded())
    bits = bound.terms / (4 * LN2)
    assert bits.shape == (n, 50)
    assert bits.dtype == torch.float64
    error = bits.std(0) / math.sqrt(n)
    exact = torch.tensor(TOY, dtype=torch.float64)
    off = (bits.mean(0) - exact).abs() / error
    assert float(off.max()) < 4.0
    assert float(error[1:].div(exact[1:]).max()) < 0.03  # the check above is tight
    prior = bound.prior / (4 * LN2)
    torch.testing.assert_close(prior, torch.full_like(prior, 4.899829268905331e-07))
    total = bound.nats / (4 * LN2)
    assert abs(float(total.mean()) - TOTAL) < 4 * float(total.std()) / math.sqrt(n)


def test_control_variates_keep_the_mean_and_halve_the_spread(monkeypatch) -> None:
    """Of 400 bounds without the reconstruction term, which has none."""
    bound = ChainNELBO(Gaussian(DDPMChain.cosine(50)), clip=False)
    images = IMAGE.expand(400, -1)
    found = bound(images, generator=seeded()).terms[:, 1:].sum(1)
    monkeypatch.setattr(_control_variates, "LEAST", 10**9)
    plain = bound(images, generator=seeded()).terms[:, 1:].sum(1)
    assert float(found.std()) < 0.5 * float(plain.std())
    assert abs(float((found - plain).mean())) < 4 * float((found - plain).std()) / 20


def test_the_sum_includes_the_prior() -> None:
    """For a chain that retains most of the data: KL(N(0.9 x, 0.19 I) || N(0, I))."""
    bound = ChainNELBO(Gaussian(DDPMChain([0.1, 0.1])))(IMAGE)
    x = IMAGE.double() / 127.5 - 1
    prior = 0.5 * float((0.19 + (0.9 * x) ** 2 - 1 - math.log(0.19)).sum())
    assert float(bound.prior) == pytest.approx(prior, rel=1e-5)
    assert float(bound.nats - bound.terms.sum(1)) == pytest.approx(prior, rel=1e-5)


def exact_chain(steps: int, spread: float = 0.25) -> EpsModel:
    """Return the exact reverse chain for data from N(0, spread I), with learned variances."""
    chain = DDPMChain.cosine(steps)

    def network(x, label):
        t = label.double()
        s = (t - 1 / steps).clamp_min(0.0)
        (alpha_s, sigma_s), (alpha, sigma) = chain.marginal(s), chain.marginal(t)
        ratio = (alpha / alpha_s).view(-1, 1)
        added = 1 - ratio**2
        before = (alpha_s**2 * spread + sigma_s**2).view(-1, 1)
        eps = (sigma / (alpha**2 * spread + sigma**2)).view(-1, 1) * x
        log_var = -torch.log(1 / before + ratio**2 / added)
        return torch.cat([eps, log_var.expand_as(x)], 1).to(x.dtype)

    return EpsModel(network, chain, label=lambda sde, t: t.double(), variance="learned")


@pytest.mark.parametrize("steps", [10, 100])
def test_the_terms_of_an_exact_chain_sum_to_the_probability(steps) -> None:
    """For any number of steps the bound equals -log P, with P from the error function."""
    images, n = torch.tensor([[100, 120, 140, 150]]), 1000
    h, std = 1 / 255, 0.5 * math.sqrt(2)
    truth = 0.0
    for k in images[0].tolist():
        x = k / 127.5 - 1
        truth -= math.log(0.5 * (math.erf((x + h) / std) - math.erf((x - h) / std)))
    likelihood = ChainNELBO(exact_chain(steps), clip=False, steps_at_once=10)
    nats = likelihood(images.expand(n, -1), generator=seeded(1)).nats
    error = float(nats.std()) / math.sqrt(n)
    assert error < 0.1
    assert abs(float(nats.mean()) - truth) < 4 * error + 0.01


def test_the_result_does_not_depend_on_the_batch_or_steps_at_once() -> None:
    model = Gaussian(DDPMChain.cosine(12))
    images = torch.arange(12).view(3, 4) * 20
    whole = ChainNELBO(model)(images, generator=generators(3))
    for at_once in (5, 12, 99):
        other = ChainNELBO(model, steps_at_once=at_once)(images, generator=generators(3))
        torch.testing.assert_close(other.terms, whole.terms, rtol=1e-12, atol=0)
    alone = ChainNELBO(model)(images[1:2], generator=generators(3)[1:2])
    torch.testing.assert_close(alone.nats, whole.nats[1:2], rtol=1e-12, atol=0)


def test_clipping_keeps_predicted_data_in_the_range() -> None:
    """A bad model has a much lower bound if its predictions are clipped."""
    model = EpsModel(lambda x, noise_label: -3 * torch.ones_like(x), DDPMChain.cosine(20))
    free, kept = (
        ChainNELBO(model, clip=clip)(IMAGE, generator=generators(1)) for clip in (False, True)
    )
    assert float(kept.nats) < 0.02 * float(free.nats)
    # In the first step the mean is the clipped prediction, 1.
    x, chain = GaussianDecoder().encode(IMAGE), DDPMChain.cosine(20)
    alpha, sigma = chain.marginal(torch.tensor([1, 2]).double() / 20)
    log_var = torch.log((1 - alpha[1] ** 2 / alpha[0] ** 2) * sigma[0] ** 2 / sigma[1] ** 2)
    read = -GaussianDecoder().log_prob(x.double(), torch.ones(1, 4).double(), log_var).sum()
    flipped = EpsModel(lambda x, noise_label: -99 * torch.ones_like(x), chain)
    terms = ChainNELBO(flipped)(IMAGE, generator=generators(1)).terms
    assert float(terms[0, 0]) == pytest.approx(float(read), rel=1e-4)


def test_conditions_are_repeated_with_their_images() -> None:
    def network(x, label, *, shift, scale):
        assert len(shift) == len(x)
        return scale * x + shift.view(-1, 1)

    model = EpsModel(network, DDPMChain.cosine(12))
    images, shift = torch.arange(8).view(2, 4) * 30, torch.tensor([0.1, -0.4])
    both = ChainNELBO(model, steps_at_once=5)(
        images, generator=generators(2), shift=shift, scale=0.3
    )
    for i in range(2):
        alone = ChainNELBO(model)(
            images[i : i + 1], generator=generators(2)[i : i + 1], shift=shift[i : i + 1], scale=0.3
        )
        torch.testing.assert_close(alone.terms, both.terms[i : i + 1], rtol=1e-5, atol=1e-5)


def test_bits_per_dim_of_a_data_set() -> None:
    """Images are integers; the mean is that of the images' bounds."""
    likelihood = ChainNELBO(Gaussian(DDPMChain.cosine(10)))
    images = (torch.arange(20).view(5, 4) * 12).to(torch.uint8)
    result = evaluate_bits_per_dim(likelihood, images, batch_size=2, draws=2, progress=False)
    assert result.bits.shape == (5, 2)
    assert result.draw_stderr is not None
    again = evaluate_bits_per_dim(likelihood, images, batch_size=5, draws=2, progress=False)
    torch.testing.assert_close(again.bits, result.bits, rtol=1e-10, atol=0)


def test_no_gradients_and_progress_over_steps() -> None:
    seen: list[int] = []

    def watch(items):
        for item in items:
            seen.append(item)
            yield item

    model = EpsModel(torch.nn.Linear(4, 4), DDPMChain.cosine(10), label=lambda sde, t: t)
    model.network.forward = lambda x, noise_label: x @ model.network.weight.T
    bound = ChainNELBO(model, steps_at_once=4, progress=watch)(IMAGE)
    assert not bound.nats.requires_grad
    assert seen == [0, 4, 8]
    assert model.training


def test_an_error_names_the_step_of_a_prediction_that_is_not_finite() -> None:
    model = EpsModel(lambda x, noise_label: torch.full_like(x, torch.nan), DDPMChain.cosine(10))
    with pytest.raises(ValueError, match=r"expected a finite prediction, .* at step 0"):
        ChainNELBO(model)(IMAGE)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ChainNELBO(EpsModel(torch.add, VPSDE())), TypeError, "chain of steps"),
        (lambda: ChainNELBO(3), TypeError, "model: expected a ScoreModel, got int"),
        (lambda: ChainNELBO(TOY_MODEL, 3), TypeError, "decoder: expected a GaussianDecoder"),
        (lambda: ChainNELBO(TOY_MODEL, steps_at_once=0), ValueError, "steps_at_once: .* got 0"),
        (lambda: ChainNELBO(TOY_MODEL)(IMAGE.double()), TypeError, "images: expected integers"),
        (lambda: ChainNELBO(TOY_MODEL)(IMAGE + 1), ValueError, "expected levels 0 ... 255"),
        (lambda: ChainNELBO(TOY_MODEL)(IMAGE, generator=[]), ValueError, "for each of the 1"),
    ],
)
def test_bad_input(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make()


TOY_MODEL = Gaussian(DDPMChain.cosine(10))


def test_repr() -> None:
    text = repr(ChainNELBO(TOY_MODEL))
    assert text.startswith("ChainNELBO(\n    Gaussian(")
    assert "GaussianDecoder(levels=256" in text


@pytest.mark.parametrize(
    ("held", "seen"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_states_have_at_least_single_precision(held, seen) -> None:
    """bfloat16 cannot resolve the levels; the network is called in its own dtype."""

    class Network(torch.nn.Linear):
        def forward(self, x, label):
            networks.add(x.dtype)
            return 0.3 * x

    class Observed(EpsModel):
        def predict(self, x, t, **cond):
            states.add(x.dtype)
            return super().predict(x, t, **cond)

    networks: set[torch.dtype] = set()
    states: set[torch.dtype] = set()
    ChainNELBO(Observed(Network(1, 1, dtype=held), DDPMChain.cosine(10)))(IMAGE)
    assert (networks, states) == ({held}, {seen})


def test_bits_per_step_of_a_data_set() -> None:
    """Batches of any size give the mean and standard error of all images."""
    generator = seeded(1)
    terms = 5.0 + 1e-3 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    prior = torch.rand(7, generator=generator, dtype=torch.float64)
    parts = [ChainBound(prior[:1], terms[:1]), ChainBound(prior[1:], terms[1:])]
    for bounds in (parts, iter(parts), ChainBound(prior, terms)):
        found = bits_per_step(bounds, dims=10)
        rows = torch.cat([prior[:, None], terms], 1).numpy() / (10 * LN2)
        mean, stderr = rows.mean(0), rows.std(0, ddof=1) / math.sqrt(7)
        assert [float(found.prior), *found.terms.tolist()] == pytest.approx(mean, rel=1e-14)
        assert [float(found.prior_stderr), *found.terms_stderr.tolist()] == pytest.approx(
            stderr, rel=1e-10
        )


def test_bits_per_step_of_a_gaussian_model() -> None:
    bound = ChainNELBO(
        Gaussian(DDPMChain.cosine(50)), GaussianDecoder(cdf="tanh"), clip=False, steps_at_once=10
    )
    generator = seeded(2)
    batches = (bound(IMAGE.expand(n, -1), generator=generator) for n in (1000, 3000))
    found = bits_per_step(batches, dims=4)
    exact = torch.tensor(TOY, dtype=torch.float64)
    assert ((found.terms - exact).abs() < 4 * found.terms_stderr + 1e-12).all()
    assert float(found.prior_stderr) < 1e-12  # always the same image


def test_bad_input_of_bits_per_step() -> None:
    one = ChainBound(torch.zeros(1), torch.zeros(1, 3))
    other = ChainBound(torch.zeros(1), torch.zeros(1, 4))
    for bounds, message in (
        ([one], "at least two images, got 1"),
        ([], "at least two images, got 0"),
        ([one, other], "expected 3 steps, as before, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_step(bounds, dims=4)
    with pytest.raises(ValueError, match="dims: expected an integer >= 1, got 0"):
        bits_per_step([one, one], dims=0)
    with pytest.raises(TypeError, match="expected a ChainBound, got Tensor"):
        bits_per_step([torch.zeros(2)], dims=4)
