import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import f64, seeded

from diffusionkit import VPSDE, Ancestral, DDPMChain, EpsModel, PCSampler, StepLabel
from diffusionkit.testing import check_sde

# Step, beta, alpha-bar, and the posterior's variance and coefficients of the data and the state:
# the two schedules of the papers, computed independently in float64.
REFERENCE = {
    ("linear", 1000): [
        (0, 0.0001, 0.9999, 0.0, 1.0, 0.0),
        (1, 0.00011991991991991993, 0.9997800920720721, 5.4531876613021935e-05,
         0.5452914995102903, 0.4547084989905303),
        (250, 0.00507997997997998, 0.5214230306185275, 0.005051719844085794,
         0.007684422330458198, 0.9919078832742143),
        (500, 0.010059959959959959, 0.07779665836502389, 0.010051335778909593,
         0.003058057075629619, 0.9941043507567258),
        (998, 0.01998008008008008, 4.118193638138445e-05, 0.019980063304243196,
         0.00012952423622957632, 0.9899587234910675),
        (999, 0.02, 4.035829765375676e-05, 0.01999998352656061,
         0.00012835148717224682, 0.9899486782675173),
    ],
    ("linear", 4000): [
        (0, 2.5e-05, 0.999975, 0.0, 1.0, 0.0),
        (1, 2.6244061015253815e-05, 0.9999487565950862, 1.280362861301587e-05,
         0.5121387426652356, 0.48786125725231805),
        (2000, 0.002513122030507627, 0.07874647522425243, 0.00251258081289121,
         0.0007664721528674842, 0.9985275626176147),
        (3999, 0.005, 4.246652275802249e-05, 0.004999998932956627,
         3.2666323460324486e-05, 0.9974966542885159),
    ],
    ("cosine", 1000): [
        (0, 4.128422482196914e-05, 0.999958715775178, 0.0, 1.0, 0.0),
        (1, 4.614175273665033e-05, 0.9999125759273678, 2.178949614569182e-05,
         0.5277814093344871, 0.47221859042675934),
        (500, 0.003155691441585007, 0.49228517244880304, 0.0031460051254634824,
         0.004367866899526329, 0.9953562794552251),
        (998, 0.7499993929011166, 2.4287669070348544e-06, 0.7499939281844208,
         0.002337676189817342, 0.49999696394667836),
        (999, 0.999, 2.4287669070348567e-09, 0.9989975760881921,
         0.0015568917154901703, 0.03162269987413465),
    ],
    ("cosine", 4000): [
        (0, 9.865818813681315e-06, 0.9999901341811863, 0.0, 1.0, 0.0),
        (2000, 0.0007889355535104503, 0.49345397967426397, 0.0007883287423357745,
         0.0010945039446133586, 0.9988366060890295),
        (3998, 0.749999962056056, 1.5179804688514504e-07, 0.7499996205104851,
         0.000584419047247992, 0.49999981024686646),
        (3999, 0.999, 1.5179804688514517e-10, 0.9989998485053974,
         0.00038922307567179875, 0.03162277180620835),
    ],
}  # fmt: skip


def chain(kind, steps) -> DDPMChain:
    return getattr(DDPMChain, kind)(steps)


@pytest.mark.parametrize(("kind", "steps"), REFERENCE)
def test_marginals_and_transitions_at_the_steps_match_the_table(kind, steps) -> None:
    sde = chain(kind, steps)
    assert sde.steps == steps
    i, beta, alpha_bar, *_ = (f64(*c) for c in zip(*REFERENCE[kind, steps], strict=True))
    t, s = (i + 1) / steps, i / steps
    torch.testing.assert_close(sde.betas[i.long()], beta, rtol=1e-11, atol=0)
    alpha, sigma = sde.marginal(t)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=1e-11, atol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, rtol=1e-10, atol=0)
    scale, std = sde.transition(s, t)
    torch.testing.assert_close(scale**2, 1 - beta, rtol=1e-10, atol=0)
    torch.testing.assert_close(std**2, beta, rtol=1e-10, atol=0)
    ratio = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(sde.log_snr(t), ratio.log(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("kind", "steps"), REFERENCE)
def test_ancestral_step_is_the_posterior_of_the_papers(kind, steps) -> None:
    sde = chain(kind, steps)
    i, _, _, variance, data, state = (f64(*c) for c in zip(*REFERENCE[kind, steps], strict=True))
    step = Ancestral().coefficients(sde, (i + 1) / steps, i / steps)
    torch.testing.assert_close(step.std**2, variance, rtol=1e-9, atol=1e-18)
    torch.testing.assert_close(step.x0, data, rtol=1e-9, atol=0)
    torch.testing.assert_close(step.x, state, rtol=1e-9, atol=1e-15)


def test_three_steps_computed_by_hand() -> None:
    sde = DDPMChain([0.1, 0.36, 0.51])
    t = f64(0, 1 / 3, 0.5, 2 / 3, 1)
    expected = f64(1, 0.9, 0.9 * 0.8, 0.9 * 0.64, 0.9 * 0.64 * 0.49)  # of alpha^2
    alpha, sigma = sde.marginal(t)
    torch.testing.assert_close(alpha**2, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=1e-14, atol=1e-16)
    # log(alpha) is linear within a step, so f and g are constant.
    inside = f64(0.2, 0.5, 0.9)
    rates = -3 * f64(0.9, 0.64, 0.49).log()
    torch.testing.assert_close(sde.drift_coefficient(inside), -rates / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(sde.diffusion(inside) ** 2, rates, rtol=1e-14, atol=0)
    # The end of a step belongs to that step, not to the next one.
    ends = f64(1 / 3, 2 / 3, 1.0)
    torch.testing.assert_close(sde.drift_coefficient(ends), -rates / 2, rtol=1e-14, atol=0)
    assert float(sde.drift_coefficient(f64(0.0))) == pytest.approx(float(-rates[0] / 2))
    scale, std = sde.transition(f64(0.5), f64(1.0))
    assert float(scale**2) == pytest.approx(0.8 * 0.49, rel=1e-14)
    assert float(std**2) == pytest.approx(1 - 0.8 * 0.49, rel=1e-14)
    assert sde.t_min == sde.t_stop == 1 / 3
    assert sde.prior_std == 1.0
    assert repr(sde) == "DDPMChain(3 steps, betas 0.1 ... 0.51)"


@pytest.mark.parametrize(
    "sde",
    [
        DDPMChain([0.9, 0.99]),
        DDPMChain.linear(50),
        DDPMChain.linear(1000),
        DDPMChain.cosine(4000),
        DDPMChain.cosine(20, s=0.1, max_beta=0.9),
        DDPMChain(torch.linspace(0.3, 0.01, 30)),
    ],
    ids=repr,
)
def test_passes_check_sde(sde) -> None:
    assert check_sde(sde).ok


@given(st.floats(1e-6, 1.0), st.sampled_from([("linear", 30), ("linear", 1000), ("cosine", 100)]))
def test_time_at_log_snr_inverts_log_snr(t, which) -> None:
    sde, t = chain(*which), f64(t)
    log_snr = sde.log_snr(t)
    alpha, sigma = sde.marginal(t)
    torch.testing.assert_close(log_snr, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sde.time_at_log_snr(log_snr), t, rtol=1e-8, atol=0)


def test_time_at_log_snr_is_clamped_to_the_ends() -> None:
    sde = DDPMChain.linear(100)
    assert sde.time_at_log_snr(f64(-1e3, -50.0)).tolist() == [1.0, 1.0]
    assert float(sde.time_at_log_snr(f64(800.0))) == 0.0
    shape = (2, 3)
    assert sde.time_at_log_snr(torch.zeros(shape)).shape == shape


def test_converges_to_vp_with_many_steps() -> None:
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)

    def error(steps):
        got, limit = DDPMChain.linear(steps).log_snr(t), VPSDE(0.1, 20.0).log_snr(t)
        return float((got - limit).abs().max())

    errors = [error(steps) for steps in (1000, 10_000, 100_000)]
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    slow = DDPMChain.linear(10_000, beta_min=0.2, beta_max=5.0).log_snr(t)
    torch.testing.assert_close(slow, VPSDE(0.2, 5.0).log_snr(t), rtol=1e-2, atol=2e-3)


def test_only_the_last_cosine_beta_is_clipped() -> None:
    betas = DDPMChain.cosine(1000).betas
    assert float(betas[-1]) == 0.999
    assert int((betas == 0.999).sum()) == 1
    assert float(DDPMChain.cosine(1000, max_beta=0.5).betas[-1]) == 0.5
    wide = DDPMChain.cosine(10, s=0.5)

    def alpha_bar(u):
        return math.cos((u + 0.5) / 1.5 * math.pi / 2) ** 2

    assert float(wide.betas[3]) == pytest.approx(1 - alpha_bar(0.4) / alpha_bar(0.3), rel=1e-12)


@pytest.mark.parametrize("steps", [1000, 4000])
def test_float32_times_resolve_the_steps(steps) -> None:
    """The table and the label are as accurate as a float32 time, 6e-8."""
    i = torch.arange(steps)
    t = ((i + 1).double() / steps).float()
    sde = DDPMChain.linear(steps)
    assert float((StepLabel(steps)(sde, t) - i).abs().max()) < steps * 2**-23
    exact = sde.marginal((i + 1).double() / steps)
    for got, wanted in zip(sde.marginal(t), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    scale, std = sde.transition(t[:-1].double(), t[1:].double())
    torch.testing.assert_close(std**2, sde.betas[1:], rtol=2e-3, atol=0)
    torch.testing.assert_close(scale**2, 1 - sde.betas[1:], rtol=1e-6, atol=0)


def test_samplers_visit_every_step_down_to_the_first() -> None:
    sde, labels = DDPMChain.cosine(20), []

    def network(x, label):
        labels.extend(label.unique().tolist())
        return torch.zeros_like(x)

    model = EpsModel(network, sde, label=StepLabel(20))
    sampler = PCSampler(model, Ancestral(), steps=19)
    sampler((2, 3), generator=seeded())
    assert labels == pytest.approx([19.0 - k for k in range(20)], abs=1e-4)


@pytest.mark.parametrize(
    ("betas", "got"),
    [
        ([], r"\[\] \.\.\. of 0"),
        ([0.1], r"\[0\.1\] \.\.\. of 1"),
        ([0.1, 0.0], r"\[0\.1, 0\.0\] \.\.\. of 2"),
        ([1.0, 0.1], r"\[1\.0, 0\.1\] \.\.\. of 2"),
        ([0.1, 1.1], r"\[0\.1, 1\.1\] \.\.\. of 2"),
        ([-0.1, 0.5], r"\[-0\.1, 0\.5\] \.\.\. of 2"),
        ([0.1, math.nan], r"\[0\.1, nan\] \.\.\. of 2"),
        ([0.1] * 8 + [2.0], r"of 9"),
    ],
)
def test_invalid_betas_raise(betas, got) -> None:
    match = rf"betas: expected at least two .* between 0 and 1 \(the last may be 1\), got.*{got}"
    with pytest.raises(ValueError, match=match):
        DDPMChain(betas)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DDPMChain.linear(0), "steps"),
        (lambda: DDPMChain.linear(20), "steps: expected more than 20, so that .*, got 20"),
        (lambda: DDPMChain.linear(beta_min=0.0), "beta_min"),
        (lambda: DDPMChain.linear(beta_max=math.inf), "beta_max"),
        (lambda: DDPMChain.cosine(-1), "steps"),
        (lambda: DDPMChain.cosine(s=0.0), "s: expected"),
        (lambda: DDPMChain.cosine(max_beta=1.0), "max_beta: expected a number below 1, got 1"),
        (lambda: DDPMChain.cosine(max_beta=0.0), "max_beta: expected"),
        (lambda: DDPMChain.from_alphas_bar([0.9, 0.9]), "alphas_bar: expected .* decreasing"),
        (lambda: DDPMChain.from_alphas_bar([1.0, 0.9]), "alphas_bar: expected"),
        (lambda: DDPMChain.from_alphas_bar([0.9, -0.1]), "alphas_bar: expected"),
        (lambda: DDPMChain.from_alphas_bar([0.9, math.nan]), "alphas_bar: expected"),
        (lambda: DDPMChain.from_alphas_bar([0.9, 0.0, 0.0]), "alphas_bar: expected"),
        (lambda: DDPMChain.from_alphas_bar([0.9]), r"alphas_bar: expected .* of 1"),
    ],
)
def test_invalid_schedules_raise(make, match) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("method", ["marginal", "log_snr", "drift_coefficient", "diffusion"])
@pytest.mark.parametrize("time", [-0.1, 1.1, math.nan])
def test_times_out_of_range_raise(method, time) -> None:
    with pytest.raises(ValueError, match="t: expected"):
        getattr(DDPMChain.linear(), method)(f64(time))


def test_backward_transitions_raise() -> None:
    with pytest.raises(ValueError, match="expected"):
        DDPMChain.linear().transition(f64(0.5), f64(0.4))


def test_betas_are_copied() -> None:
    betas = torch.full((3,), 0.1, dtype=torch.float64)
    sde = DDPMChain(betas)
    betas += 0.5
    assert sde.betas.tolist() == pytest.approx([0.1] * 3)


# Step, beta, 1 - alpha-bar and log-SNR, computed with mpmath at 60 digits from the formulas.
EXACT = {
    "linear": [
        (0, 0.000025, 0.000025, 10.596609732783568146),
        (1, 0.000026244061015253813453, 0.000051243404913728432108, 9.8788723881186064663),
        (9, 0.00003619654913728432108, 0.00030594068150217000021, 8.0918133386126832221),
        (400, 0.00052262440610152538135, 0.10400270835547650452, 2.1535204495703257283),
        (1000, 0.0012690610152538134534, 0.47688393947999851001, 0.092530204662325620986),
        (2000, 0.0025131220305076269067, 0.92125352477574778839, -2.4595017519288248857),
        (3600, 0.0045036196549137284321, 0.99971586182024239515, -8.1657657111324529373),
        (3998, 0.0049987559389847461865, 0.99995732007763012832, -10.061739269586922061),
        (3999, 0.005, 0.99995753347724197768, -10.066752024819163688),
    ],
    "cosine": [
        (0, 9.8658188135916325197e-6, 9.8658188135916325197e-6, 11.526424554182074735),
        (1, 0.000010169414884318670775, 0.000020035133368305614365, 10.818003121798307801),
        (9, 0.000012598299024776122325, 0.00011231471694311943512, 9.0940933335311015886),
        (400, 0.00013253281135701334319, 0.028036097069380274106, 3.5458258059240709244),
        (1000, 0.00033143349273653394295, 0.15326856687211416214, 1.7091918426203649739),
        (2000, 0.00078893555351058431055, 0.5065460203257342255, -0.026185577453990659096),
        (3600, 0.0049534633438529443551, 0.97602761333233227712, -3.7065882659245989769),
        (3990, 0.18999922139591361964, 0.99998770440796662356, -11.306257435418815453),
        (3998, 0.74999996205638021554, 0.99999984820195311504, -15.700714686640107411),
        (3999, 0.999, 0.99999999984820195312, -22.608470117268504823),
    ],
}

# 1 - alpha-bar_249 / alpha-bar_99, and the same of 3998 and 3989.
SPANS = {
    "linear": (0.035666327575673879443, 0.044056638108019109185),
    "cosine": (0.0094038901421737964973, 0.9899999499142759313),
}


def relative(got, wanted):
    return float(((got - wanted) / wanted).abs().max())


@pytest.mark.parametrize("kind", EXACT)
def test_no_digits_are_lost_at_4000_steps(kind) -> None:
    chain = getattr(DDPMChain, kind)(4000)
    i, beta, noise, log_snr = (f64(*c) for c in zip(*EXACT[kind], strict=True))
    t = (i + 1) / 4000
    assert relative(chain.betas[i.long()], beta) < 1e-13
    assert relative(chain.marginal(t)[1] ** 2, noise) < 1e-12
    assert relative(chain.log_snr(t), log_snr) < 1e-12
    scale, std = chain.transition(i / 4000, t)
    assert relative(std**2, beta) < 1e-13
    assert relative(scale**2, 1 - beta) < 1e-12
    first, last = f64([100, 3990], [250, 3999]) / 4000
    assert relative(chain.transition(first, last)[1] ** 2, f64(*SPANS[kind])) < 1e-12


@pytest.mark.parametrize("kind", EXACT)
def test_single_precision_times_resolve_4000_steps(kind) -> None:
    chain = getattr(DDPMChain, kind)(4000)
    i = torch.arange(4000)
    t = chain.time(i).float()
    assert chain.step(t).equal(i)
    std = chain.transition((i / 4000).float(), t)[1]
    assert relative(std.double() ** 2, chain.betas) < 1e-6


def test_transitions_within_a_step_lose_no_digits() -> None:
    """A difference of two accumulated sums over 1e-9 would have seven digits."""
    chain = DDPMChain.linear(100)
    s = f64(0.505, 0.995)
    t = s + 1e-9
    rate = -100 * torch.log1p(-chain.betas[[50, 99]])
    assert relative(chain.transition(s, t)[1] ** 2, -torch.expm1(-rate * (t - s))) < 1e-12
