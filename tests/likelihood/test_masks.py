"""Likelihoods of the elements that a mask keeps: those of the shorter samples."""

import math

import pytest
import torch
from support.pretend_device import PretendDevice

from diffusionkit import (
    EDMSDE,
    NELBO,
    VESDE,
    VPSDE,
    ChainNELBO,
    DDPMChain,
    DiscreteNELBO,
    EpsModel,
    ExactDivergence,
    FlowMatchingSDE,
    GaussianMixtureModel,
    LevelDecoder,
    LogSNRSDE,
    ODELikelihood,
    Prediction,
    ScoreModel,
    SubVPSDE,
    UniformDequantizer,
    evaluate_bits_per_dim,
)
from diffusionkit.likelihood import bits_per_dim

SDES = [VPSDE(), VESDE(sigma_max=20.0), SubVPSDE(t_min=1e-3), EDMSDE(), FlowMatchingSDE()]
MEANS, WEIGHTS = [[-1.0, 0.3], [0.8, -0.5]], [0.4, 0.6]
KEPT = torch.tensor([[True, False, True, False]])


class Embedded(ScoreModel):
    """A mixture in the plane among padding, in which the network predicts nonsense.

    Args:
        sde: the process.
        leak: how much of the padding the prediction of the plane depends on.
    """

    def __init__(self, sde, leak=0.0):
        super().__init__()
        self.sde, self.leak = sde, leak
        self.plane = GaussianMixtureModel(sde, MEANS, [0.5, 0.7], weights=WEIGHTS)

    def predict(self, x, t, /, **cond):
        inner = self.plane.predict(x[:, ::2] + self.leak * x[:, 1::2], t)
        nonsense = torch.full_like(x[:, 1::2], 3.0) + x[:, 1::2].sin()
        x0, eps = (torch.stack([v, nonsense], 2).flatten(1) for v in (inner.x0, inner.eps))
        return Prediction(x, x0, eps, inner.alpha, inner.sigma)


def seeds(n=5):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def points(n=5):
    return torch.randn(n, 2, generator=seeds(1)[0], dtype=torch.float64)


def padded(x, padding=math.nan):
    return torch.stack([x, torch.full_like(x, padding)], 2).flatten(1)


@pytest.fixture
def same_noise(monkeypatch):
    """Draw the noise of the plane from the generators, and other numbers for the padding."""
    from diffusionkit import interfaces

    draw = interfaces.randn_like

    def drawn(x, generator):
        if x.shape[1] == 2:
            return draw(x, generator)
        plane = draw(x[:, ::2], generator)
        return torch.stack([plane, 0.7 - 0.3 * plane], 2).flatten(1)

    monkeypatch.setattr(interfaces, "randn_like", drawn)


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("divergence", [None, ExactDivergence()], ids=["denoising", "sliced"])
def test_nelbo_is_that_of_the_shorter_samples(sde, divergence, same_noise):
    if divergence is not None and isinstance(sde, FlowMatchingSDE):
        pytest.skip("the sliced form has no finite range of log-SNR where alpha(T) = 0")
    x, options = points(), {"samples": 5, "divergence": divergence}
    model = Embedded(sde)
    right = NELBO(model.plane, **options)(x, generator=seeds())
    for padding in (math.nan, -7.0):
        got = NELBO(model, **options)(padded(x, padding), mask=KEPT, generator=seeds())
        for name in ("nats", "prior", "path", "drift", "smallest_time", "stderr"):
            torch.testing.assert_close(getattr(got, name), getattr(right, name), msg=name)


def test_a_prediction_that_depends_on_padding_keeps_a_bound():
    """The padding carries noise, which tells nothing: the mean bound is above the entropy."""
    sde, draw = VPSDE(), torch.Generator().manual_seed(3)
    first = torch.rand(4000, generator=draw, dtype=torch.float64) < WEIGHTS[0]
    means, stds = torch.tensor(MEANS, dtype=torch.float64), torch.tensor([0.5, 0.7])
    k = (~first).long()
    x = means[k] + stds[k, None] * torch.randn(4000, 2, generator=draw, dtype=torch.float64)
    exact = -Embedded(sde).plane.log_prob(x, torch.full((4000,), sde.t_min, dtype=x.dtype))
    tight, loose = (
        NELBO(Embedded(sde, leak), samples=10)(padded(x), mask=KEPT, generator=seeds(1)[0]).nats
        for leak in (0.0, 0.6)
    )
    (gap, error), (more, its_error) = (
        (float(v.mean()), float(v.std()) / 4000**0.5) for v in (tight - exact, loose - tight)
    )
    assert abs(gap) < 4 * error
    assert more > 4 * its_error


@pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)
def test_the_flow_is_that_of_the_shorter_samples(sde):
    x, model = points(), Embedded(sde)
    options = {"divergence": ExactDivergence(), "rtol": 1e-6, "atol": 1e-6}
    right = ODELikelihood(model.plane, **options)(x)
    # Of Hutchinson's estimate the mean over all probes is exact.
    kinds = (ExactDivergence(), AllProbes()) if isinstance(sde, VPSDE) else (ExactDivergence(),)
    for options["divergence"] in kinds:
        got = ODELikelihood(model, **options)(padded(x), mask=KEPT)
        torch.testing.assert_close(got.log_prob, right.log_prob, atol=2e-5, rtol=0.0)
    assert bool((got.latent[:, 1::2] == 0).all())


class AllProbes(ExactDivergence):
    """Hutchinson's estimate averaged over all 16 probes of four signs."""

    def __call__(self, function, x, state):
        signs = torch.tensor([[1.0 if k >> j & 1 else -1.0 for j in range(4)] for k in range(16)])
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = function(x)
            total = torch.zeros(len(x), dtype=torch.float64)
            for v in signs.to(x):
                row = torch.autograd.grad(value, x, v.expand_as(x), retain_graph=True)[0]
                total += (row * v).sum(1) / 16
        return value.detach(), total.unsqueeze(0)


def test_the_flow_refuses_a_prediction_that_depends_on_padding():
    with pytest.raises(ValueError, match="mask: expected a model whose prediction of the elem"):
        ODELikelihood(Embedded(VPSDE(), 0.3))(padded(points()), mask=KEPT)


def levels(n=5):
    return torch.randint(8, (n, 2), generator=seeds(1)[0])


def network(x, noise_label, **cond):
    """Each number on its own, so that a sample may have any length."""
    return 0.7 * x - 0.1 * noise_label[:, None] / 1000


@pytest.mark.parametrize("kind", ["continuous", "steps", "chain"])
def test_bounds_of_images_are_those_of_the_smaller_images(kind, same_noise):
    if kind == "chain":
        # From ten steps on, control variates take more neighbors under a mask.
        bound = ChainNELBO(EpsModel(network, DDPMChain.cosine(9)), steps_at_once=3)
    else:
        model = EpsModel(network, LogSNRSDE())
        bound = DiscreteNELBO(model, LevelDecoder(8), steps=4 if kind == "steps" else None)
    images = levels()
    right = bound(images, generator=seeds())
    for dtype in (torch.uint8, torch.uint16, torch.int64):
        other = padded(images, 250).to(dtype)
        got = bound(other, mask=KEPT, generator=seeds())
        torch.testing.assert_close(got.nats, right.nats)
        torch.testing.assert_close(got.prior, right.prior)


def test_bits_are_per_element_of_the_shorter_samples(same_noise):
    x = points(6).float()
    mask = KEPT.expand(6, 4).clone()
    model = Embedded(VPSDE())
    right = evaluate_bits_per_dim(NELBO(model.plane), x, progress=False)
    got = evaluate_bits_per_dim(
        NELBO(model), padded(x), cond={"mask": mask}, batch_size=4, progress=False
    )
    torch.testing.assert_close(got.bits, right.bits, rtol=1e-5, atol=1e-5)
    # of lengths that differ, each by its own
    mask[0] = torch.tensor([True, False, False, False])
    data = padded(x, 0.0)
    got = evaluate_bits_per_dim(NELBO(model), data, cond={"mask": mask}, progress=False)
    alone = NELBO(model)(data[:1], mask=mask[:1], generator=[seeded_first()])
    torch.testing.assert_close(got.bits[0, 0], bits_per_dim(alone.nats[0], 1).double())


def seeded_first():
    from diffusionkit.random import seeded

    return seeded(0, 0, 0)


def test_a_dequantizer_counts_every_element():
    with pytest.raises(ValueError, match="mask: expected no mask with a dequantizer"):
        evaluate_bits_per_dim(
            NELBO(Embedded(VPSDE())),
            padded(levels(), 0),
            dequantizer=UniformDequantizer(8),
            cond={"mask": KEPT},
        )


@pytest.mark.parametrize(
    "bound",
    [
        NELBO(Embedded(VPSDE())),
        ODELikelihood(Embedded(VPSDE())),
        DiscreteNELBO(EpsModel(network, LogSNRSDE())),
        ChainNELBO(EpsModel(network, DDPMChain.cosine(3))),
    ],
    ids=lambda bound: type(bound).__name__,
)
def test_likelihoods_have_no_weights(bound):
    discrete = isinstance(bound, (DiscreteNELBO, ChainNELBO))
    x = torch.zeros(2, 4, dtype=torch.long if discrete else torch.float)
    for mask, message in (
        (torch.tensor([[1.0, 0.5, 0.0, 1.0]]), r"numbers 0 and 1, got 0\.5; likelihoods have no"),
        (torch.ones(2, 3), r"mask: expected shape \(2, 4\)"),
        (torch.zeros(2, 4), "mask: expected an entry > 0 in each sample"),
    ):
        with pytest.raises(ValueError, match=message):
            bound(x, mask=mask)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_likelihoods_with_a_mask_on_other_devices(kind):
    """The numbers are those on the CPU; without float64 the draws are others."""

    def found(device):
        draw = torch.Generator().manual_seed(0)
        x, mask = torch.rand(2, 4).to(device), KEPT.to(device)
        images = torch.full((2, 4), 7).to(device)
        model = EpsModel(lambda x, noise_label: 0.5 * x, VPSDE())
        chain = EpsModel(lambda x, noise_label: 0.5 * x, DDPMChain.cosine(3))
        discrete = EpsModel(lambda x, noise_label: 0.5 * x, LogSNRSDE())
        return [
            NELBO(model)(x, mask=mask, generator=draw).nats.cpu(),
            ODELikelihood(model, method="heun2", options={"step_size": 0.2})(
                x, mask=mask, generator=draw
            ).log_prob.cpu(),
            DiscreteNELBO(discrete)(images, mask=mask, generator=draw).nats.cpu(),
            ChainNELBO(chain)(images, mask=mask, generator=draw).nats.cpu(),
        ]

    torch.manual_seed(0)
    right = found("cpu")
    torch.manual_seed(0)
    with PretendDevice(kind):
        got = found(kind)
    for a, b in zip(got, right, strict=True):
        assert bool(a.isfinite().all())
        if kind == "cuda":
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)
