"""VLB and HybridLoss: published values, gradients, and the meaning of lambda."""

import contextlib
import math

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, ChainNELBO, DDPMChain, EpsModel, ScoreMatching
from diffusionkit.decoders import GaussianDecoder
from diffusionkit.networks import ADMUNet
from diffusionkit.training.discrete_times import DiscreteTimes, LossSecondMomentTimes
from diffusionkit.training.vlb import VLB, HybridLoss
from diffusionkit.values import Perturbed

TANH = GaussianDecoder(cdf="tanh")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


X0 = f64(-1.0, 1.0, -0.21568627450980393, -0.8666666666666667).unsqueeze(0)
NOISE = f64(0.3, -1.1, 0.8, 0.05).unsqueeze(0)
HAT = f64(0.1, -0.9, 0.9, 0.2).unsqueeze(0)
V = f64(-0.8, 0.1, 0.9, 0.4).unsqueeze(0)
SIMPLE = 0.028125


class Given(DDPMChain):
    """A chain with fixed noise."""

    def perturb(self, x0, t, *, generator=None) -> Perturbed:
        alpha, sigma = self.marginal(t.double())
        x = alpha.unsqueeze(1) * x0 + sigma.unsqueeze(1) * NOISE
        return Perturbed(x0=x0, eps=NOISE.expand_as(x0), x=x, t=t, alpha=alpha, sigma=sigma)


def part_of(chain: DDPMChain, steps: int) -> torch.Tensor:
    """The betas of a respaced chain, as in improved DDPM."""
    bar = torch.cat([f64(1.0), torch.cumprod(1 - chain.betas, 0)])
    at = torch.tensor([0, *(i + 1 for i in chain.subsequence(steps))])
    return 1 - bar[at][1:] / bar[at][:-1]


CHAINS = {
    "linear": Given(DDPMChain.linear(1000).betas),
    "cosine": Given(DDPMChain.cosine(4000).betas),
    "respaced": Given(part_of(DDPMChain.cosine(4000), 50)),
}
# Schedule, step, kind of variance; RESCALED_KL and RESCALED_MSE of the released code.
LOSSES = [
    ("linear", 0, "fixed_small", 1027.9503477921128, None),
    ("linear", 0, "learned_range", 1203.190268440343, 1.231315268440343),
    ("linear", 1, "fixed_large", 186.18950352274246, None),
    ("linear", 500, "learned_range", 0.22377935313038467, 0.02834877935313039),
    ("cosine", 0, "learned_range", 894.9289533534559, 0.9230539533534559),
    ("cosine", 2000, "fixed_small", 0.12658918930776714, None),
    ("cosine", 2000, "learned_range", 0.126908832708504, 0.02825190883270851),
    ("cosine", 3999, "fixed_large", 81070.44446626045, None),
    ("respaced", 0, "learned_range", 14.493678402730637, 0.04261867840273064),
    ("respaced", 1, "fixed_large", 153.92219905996615, None),
    ("respaced", 25, "learned_range", 0.16210788968797105, 0.028287107889687975),
]


@pytest.mark.parametrize(("schedule", "step", "variance", "vlb", "hybrid"), LOSSES)
def test_losses_match_the_released_code(schedule, step, variance, vlb, hybrid) -> None:
    """VLB is RESCALED_KL and HybridLoss(1e-3) is RESCALED_MSE, for any T and respacing."""
    chain = CHAINS[schedule]
    learned = variance.startswith("learned")
    output = torch.cat([HAT, V], 1) if learned else HAT
    model = EpsModel(lambda x, noise_label: output, chain, variance=variance)
    t = f64((step + 1) / chain.steps)
    assert float(VLB(decoder=TANH)(model, X0, t=t)) == pytest.approx(vlb, rel=1e-9)
    if learned:
        assert float(HybridLoss(decoder=TANH)(model, X0, t=t)) == pytest.approx(hybrid, rel=1e-9)
        # MSE adds the bits without the factor T: KL = VLB / T, so the weight is 1 / T.
        per_step = float(HybridLoss(1 / chain.steps, decoder=TANH)(model, X0, t=t))
        assert per_step == pytest.approx(SIMPLE + vlb / chain.steps, rel=1e-9)


def small(chain: DDPMChain, variance: str | None = "learned_range", **options) -> EpsModel:
    torch.manual_seed(0)
    network = ADMUNet(
        1, width=8, multipliers=(1, 2), blocks=1, attention_levels=(), heads=1,
        group_channels=2, **options,
    )  # fmt: skip
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return EpsModel(network.double(), chain, variance=variance)


def pictures(n: int) -> torch.Tensor:
    images = torch.randint(256, (n, 1, 4, 4), generator=seeded(5))
    return GaussianDecoder().encode(images, dtype=torch.float64)


def gradients(model: EpsModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_each_head_gets_the_gradient_of_its_own_loss(variance) -> None:
    model, x = small(DDPMChain.cosine(20), variance), pictures(6)
    found = {
        name: gradients(model, loss(model, x, generator=seeded(3)).mean())
        for name, loss in {
            "hybrid": HybridLoss(0.3),
            "simple": ScoreMatching(times=DiscreteTimes()),
            "vlb": VLB(),
        }.items()
    }
    heads = [name for name in found["hybrid"] if ".head.conv" in name]
    assert len(heads) == 2
    for name in heads:
        hybrid, simple, vlb = (found[loss][name] for loss in ("hybrid", "simple", "vlb"))
        assert torch.equal(hybrid[:1], simple[:1])
        torch.testing.assert_close(hybrid[1:], 0.3 * vlb[1:], rtol=1e-12, atol=0)
        assert not simple[1:].any()
        assert vlb[:1].abs().min() > 0
        assert vlb[1:].abs().min() > 0


def test_the_weight_does_not_depend_on_the_number_of_steps() -> None:
    """The bound of a chain, which lambda multiplies, converges as T grows."""
    means = {}
    for steps in (100, 400):
        chain = DDPMChain.linear(steps)
        model = EpsModel(lambda x, noise_label: 0.9 * x, chain)
        t = chain.time(torch.arange(steps))
        x = GaussianDecoder().encode(torch.full((steps, 64), 77), dtype=torch.float64)
        means[steps] = float(VLB()(model, x, t=t, generator=seeded(3))[1:].sum() / steps)
    # Without the factor T, or with its square, they would differ by a factor of 4.
    assert means[400] == pytest.approx(means[100], rel=0.5)


def test_both_time_samplers_estimate_the_same_bound() -> None:
    """The mean over all steps; loss-second-moment times have less variance."""
    chain = DDPMChain.cosine(12)
    model = EpsModel(lambda x, noise_label: 0.8 * x, chain)
    n = 3000
    x = GaussianDecoder().encode(torch.full((n, 4), 90), dtype=torch.float64)
    truth = 0.0
    for i in range(12):
        t = torch.full((n,), (i + 1) / 12, dtype=torch.float64)
        truth += float(VLB()(model, x, t=t, generator=seeded(3)).mean()) / 12
    errors = {}
    for times in (DiscreteTimes(), LossSecondMomentTimes()):
        vlb, generator = VLB(times=times), seeded(3)
        with torch.no_grad():
            vlb(model, x, generator=generator)  # fills the histories
            losses = vlb(model, x, generator=generator)
        errors[type(times)] = error = float(losses.std()) / math.sqrt(n)
        assert abs(float(losses.mean()) - truth) < 4 * error
    assert errors[LossSecondMomentTimes] < 0.5 * errors[DiscreteTimes]


@pytest.mark.parametrize("loss", [VLB(), HybridLoss()], ids=["vlb", "hybrid"])
def test_accumulated_gradients_are_those_of_the_whole_batch(loss) -> None:
    model, x = small(DDPMChain.cosine(20)), pictures(8)
    t = model.sde.time([0, 3, 19, 7, 11, 0, 2, 15])
    generators = [seeded(i) for i in range(8)]
    whole = gradients(model, loss(model, x, t=t, generator=generators).mean())
    model.zero_grad()
    generators = [seeded(i) for i in range(8)]
    for start in range(0, 8, 2):
        rows = slice(start, start + 2)
        part = loss(model, x[rows], t=t[rows], generator=generators[rows])
        (part.mean() / 4).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-6, atol=1e-9)


def test_activation_checkpointing_with_dropout_has_the_same_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = small(DDPMChain.cosine(20), dropout=0.4, activation_checkpointing=recompute).train()
        x = pictures(4)
        t = model.sde.time([0, 3, 19, 7])
        torch.manual_seed(11)  # the masks
        found.append(gradients(model, HybridLoss()(model, x, t=t, generator=seeded(3)).mean()))
    plain, recomputed = found
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-14)


def test_conditions_reach_every_term() -> None:
    """Mean and variance, at the first step and at others."""

    def network(x, label, *, shift):
        return torch.cat([0.1 * x + shift.view(-1, 1), (0.2 * shift).view(-1, 1).expand_as(x)], 1)

    model = EpsModel(network, DDPMChain.cosine(10), variance="learned_range")
    t = f64(0.1, 0.5)
    x = X0.expand(2, -1)
    for loss in (VLB(), HybridLoss()):
        one, other = (
            loss(model, x, t=t, generator=seeded(3), shift=f64(*shift))
            for shift in ((0.1, 0.2), (0.4, -0.9))
        )
        assert bool((one != other).all())


def test_the_time_sampler_is_updated_with_unweighted_losses() -> None:
    class Weighted(DiscreteTimes):
        def sample(self, sde, n, **kwargs):
            return f64(0.1, 0.5), f64(7.0, 3.0)

        def update(self, t, loss) -> None:
            passed.append(loss)

    passed: list[torch.Tensor] = []
    model = EpsModel(lambda x, noise_label: 0.5 * x, DDPMChain.cosine(10))
    got = VLB(times=Weighted())(model, X0.expand(2, -1), generator=seeded(3))
    plain = VLB()(model, X0.expand(2, -1), t=f64(0.1, 0.5), generator=seeded(3))
    torch.testing.assert_close(passed[0], plain)
    torch.testing.assert_close(got, f64(7.0, 3.0) * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_in_lower_precision_have_float32_losses(dtype) -> None:
    """With a float32 or bfloat16 output the loss is finite and float32."""
    exact = small(DDPMChain.cosine(20))
    x, t = pictures(4), exact.sde.time([0, 3, 19, 7])
    want = HybridLoss()(exact, x, t=t, generator=seeded(3))
    inner = exact.network

    def rounded(x, label):
        return inner(x.double(), label.double()).to(dtype)

    model = EpsModel(rounded, exact.sde, variance="learned_range")
    got = HybridLoss()(model, x.float(), t=t.float(), generator=seeded(3))
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"x0": X0 + 0.001}, ValueError, "x0: expected data on 256 levels from -1 to 1"),
        ({"x0": X0 / 0.0}, ValueError, "x0: expected finite"),
        ({"x0": X0.long()}, TypeError, "x0: expected a floating-point tensor"),
        ({"t": f64(0.55)}, ValueError, r"t: expected times of steps, 1 / 10, .* got \[0.55"),
        ({"t": f64(0.0)}, ValueError, "t: expected times of steps"),
        ({"t": f64(1.1)}, ValueError, r"t: expected times within \[0, T\]"),
        (
            {"model": EpsModel(lambda x, noise_label: x, VPSDE())},
            TypeError,
            "chain of steps, .* VPSDE",
        ),
        ({"model": torch.nn.Identity()}, TypeError, "model: expected a ScoreModel, got Identity"),
    ],
)
def test_invalid_arguments_of_a_call(call, error, match) -> None:
    given = {"model": EpsModel(lambda x, noise_label: x, DDPMChain.cosine(10)), "x0": X0} | call
    with pytest.raises(error, match=match):
        VLB()(given.pop("model"), given.pop("x0"), **given)


def test_a_hybrid_loss_without_a_learned_variance_raises() -> None:
    model = EpsModel(lambda x, noise_label: x, DDPMChain.cosine(10), variance="fixed_large")
    with pytest.raises(ValueError, match="expected a learned variance"):
        HybridLoss()(model, X0)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VLB(decoder=3), TypeError, "decoder: expected a GaussianDecoder, got int"),
        (lambda: VLB(times=DiscreteTimes), TypeError, "got the class DiscreteTimes"),
        (lambda: HybridLoss(0.0), ValueError, "vlb_weight: expected a finite number > 0, got 0.0"),
    ],
)
def test_invalid_parts(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make()


def test_repr() -> None:
    decoder, times = "decoder=GaussianDecoder(levels=256", "times=DiscreteTimes()"
    for part in (decoder, times):
        assert part in repr(VLB())
    for part in ("vlb_weight=0.001", decoder, times):
        assert part in repr(HybridLoss())


@pytest.mark.parametrize("objective", [VLB(), HybridLoss()], ids=["vlb", "hybrid"])
def test_masked_bounds_are_the_means_over_what_is_not_masked(objective):
    """With independent pixels: the loss of an image without the masked half."""
    chain = DDPMChain.linear(50)
    model = EpsModel(
        lambda x, noise_label: torch.cat([0.5 * x, 0.1 * x], 1), chain, variance="learned_range"
    )
    left = GaussianDecoder().encode(torch.randint(256, (5, 3, 4, 2), generator=seeded()))
    x0 = torch.cat([left, torch.full_like(left, float("nan"))], 3)
    mask = torch.zeros(5, 1, 1, 4)
    mask[..., :2] = 1.0
    t = torch.tensor([0.02, 0.04, 0.3, 0.5, 1.0])
    noise = torch.randn(5, 3, 4, 4, generator=seeded(1))

    got = objective(model, x0, mask=mask, t=t, generator=seeded(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusionkit.interfaces.randn_like", lambda x, generator: noise[..., :2])
        right = objective(model, left, t=t)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def test_networks_see_the_same_data_under_the_mask_in_every_objective():
    """0, as in ScoreMatching and the likelihoods, although no level is 0."""
    seen = []

    def network(x, noise_label):
        seen.append(x)
        return torch.cat([x, x], 1)

    model = EpsModel(network, DDPMChain.linear(50), variance="learned_range")
    x0 = GaussianDecoder().encode(torch.full((2, 3), 200))
    mask, t = torch.tensor([[1, 0, 1]]), torch.tensor([0.02, 0.5])
    for loss in (VLB(), HybridLoss(), ScoreMatching()):
        with contextlib.suppress(ValueError):  # that a plain loss wants no variance
            loss(model, x0, mask=mask, t=t, generator=seeded(1))
    ChainNELBO(model, steps_at_once=50)(torch.full((1, 3), 200), mask=mask)
    assert all(torch.equal(x, seen[0]) for x in seen[1:-1])
    clean = model.sde.perturb(torch.zeros(2, 3), t, generator=seeded(1)).x
    torch.testing.assert_close(seen[0][:, 1], clean[:, 1])


def test_bounds_refuse_data_outside_the_models_range():
    model = EpsModel(lambda x, noise_label: x, DDPMChain.linear(50), data_range=(0.0, 0.5))
    x0 = GaussianDecoder().encode(torch.full((2, 3), 255))
    with pytest.raises(ValueError, match="x0: expected data within the model's range"):
        VLB()(model, x0)
