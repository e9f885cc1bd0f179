"""The stable target against closed forms, exact sums and the exact model."""

import math

import pytest
import torch
from support import seeded
from support.noisy_data import noisy
from support.processes import run_in_two_processes

from diffusionkit import (
    EDMSDE,
    VPSDE,
    EDMModel,
    EmpiricalModel,
    EpsModel,
    LikelihoodWeighting,
    Perturbed,
    RawScoreModel,
    ScaledScoreModel,
    ScoreMatching,
    VModel,
    X0Model,
)
from diffusionkit.training.stable_target import StableTarget

POINTS = torch.tensor(
    [[-1.5, -0.5], [0.25, 1.0], [1.0, -1.25], [2.0, 0.75], [-0.75, 1.5]], dtype=torch.float64
)
FOUR_FIFTHS = math.sqrt(0.19)


# Independent 60-digit values: alpha, sigma, x, the number of references, the mean in x0.
@pytest.mark.parametrize(
    ("alpha", "sigma", "x", "n", "x0"),
    [
        (1.0, 0.5, [0.0, 0.0], 5, [0.17087527838290356, 0.8401719877892242]),
        (1.0, 0.5, [-2.0, 2.0], 5, [-0.7498601856139807, 1.4997287075549628]),
        (1.0, 2.0, [0.0, 0.0], 5, [0.12504154208970084, 0.30032787089514007]),
        (0.9, FOUR_FIFTHS, [0.0, 0.0], 5, [0.1834233942838182, 0.8649901625774936]),
        (0.9, FOUR_FIFTHS, [-2.0, 2.0], 5, [-0.7499824203074823, 1.4999579460429302]),
        (0.6, 0.8, [1.2, -0.4], 5, [1.1910169242440878, -0.13596766316211842]),
        (1.0, 1.0, [0.0, 0.0], 3, [-0.0044266673587839925, 0.08463485855076659]),
        (1.0, 1.0, [1.2, -0.4], 3, [0.742370058638939, -0.662171988546481]),
        (1.0, 1.0, [-2.0, 2.0], 3, [-0.5286842367400033, 0.33067949159730176]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spare", [0, 60])  # constant dimensions, to test matrix products
def test_finite_sets_against_60_digits(alpha, sigma, x, n, x0, spare) -> None:
    wide = lambda v: torch.cat([v, torch.full((len(v), spare), 7.0)], 1)  # noqa: E731
    data, expected = wide(POINTS[:n]), torch.tensor([x0] * n, dtype=torch.float64)
    # The target at a state does not depend on its source.
    state = torch.tensor([x], dtype=torch.float64).expand(n, 2)
    state = torch.cat([state, torch.full((n, spare), 7.0 * alpha)], 1)
    prediction = StableTarget()(noisy(data, state, alpha, sigma), data)
    torch.testing.assert_close(prediction.x0[:, :2], expected, rtol=1e-12, atol=1e-12)
    score = (alpha * expected - state[:, :2]) / sigma**2
    torch.testing.assert_close(prediction.score[:, :2], score, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prediction.eps[:, :2], -sigma * score, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spare", [0, 60])
def test_each_class_uses_only_its_own_references(spare) -> None:
    data = torch.cat([POINTS, torch.zeros(5, spare, dtype=torch.float64)], 1)
    class_labels = torch.tensor([0, 0, 1, 1, 0])
    sample = noisy(data, torch.zeros_like(data), 0.8, 0.6)
    prediction = StableTarget()(
        sample, data, class_labels=class_labels, reference_class_labels=class_labels
    ).x0[:, :2]
    for row in range(5):
        density = [
            math.exp(-(0.8**2) * (a * a + b * b) / (2 * 0.6**2)) * float(k == class_labels[row])
            for (a, b), k in zip(POINTS.tolist(), class_labels, strict=True)
        ]
        weights = torch.tensor(density, dtype=torch.float64) / sum(density)
        torch.testing.assert_close(prediction[row], weights @ POINTS, rtol=1e-13, atol=1e-13)


def two_points(n: int, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias of the target at each x, and its variance averaged over x.

    Data are 1 and -1; the sums are over the source and the number of 1s among the n - 1 others.
    """
    x = torch.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 2001, dtype=torch.float64)
    like = torch.stack([torch.exp(-0.5 * ((x - s) / sigma) ** 2) for s in (1, -1)])
    p_x = like.mean(0) / (sigma * math.sqrt(2 * math.pi)) * (x[1] - x[0])
    post = like / like.sum(0)
    first = second = torch.zeros_like(x)
    for j in range(n):
        chance = math.comb(n - 1, j) / 2 ** (n - 1)
        for source, weight in zip((1.0, -1.0), post, strict=True):
            reference = -torch.ones(n, 1, dtype=torch.float64)
            reference[:j] = 1.0
            reference[-1] = source
            x0 = torch.full((len(x), 1), source, dtype=torch.float64)
            prediction = StableTarget()(noisy(x0, x[:, None], 1.0, sigma), reference).x0[:, 0]
            first = first + chance * weight * prediction
            second = second + chance * weight * prediction**2
    return first - torch.tanh(x / sigma**2), ((second - first**2) * p_x).sum()


@pytest.mark.parametrize(
    ("sigma", "variances"),
    [
        (0.25, {1: 9.821868401813184e-05, 2: 4.9109342009065925e-05, 4: 1.9207855873763447e-05,
                16: 3.4087454155045235e-06, 64: 8.190678153807595e-07}),
        (1.0, {1: 0.4495995092066729, 2: 0.22479975460333648, 4: 0.09788584048027271,
               16: 0.020569182858776874, 64: 0.004991525432673267}),
        (4.0, {1: 0.9410540244594089, 2: 0.47052701222970456, 4: 0.23041421809655732,
               16: 0.0561994379902408, 64: 0.013956047716052826}),
    ],
)  # fmt: skip
def test_it_is_unbiased_with_the_exact_variance_for_every_n(sigma, variances) -> None:
    for n, expected in variances.items():
        bias, variance = two_points(n, sigma)
        assert float(bias.abs().max()) < 1e-12
        assert float(variance) == pytest.approx(expected, rel=1e-9)
    assert variances[2] == pytest.approx(variances[1] / 2, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(0.25, 2.029597010616155e-07), (1.0, 0.0012393313357087188), (4.0, 0.0034831278930131217)],
)
def test_two_points_with_256_references(sigma, expected) -> None:
    bias, variance = two_points(256, sigma)
    assert float(bias.abs().max()) < 1e-12
    assert float(variance) == pytest.approx(expected, rel=1e-8)


def gaussians(n: int) -> torch.Tensor:
    """Draws from two Gaussians in the plane, at (2, 0) and (-2, 0), of standard deviation .5."""
    x = 0.5 * torch.randn(n, 2, generator=gaussians.random, dtype=torch.float64)
    x[:, 0] += 4.0 * torch.randint(0, 2, (n,), generator=gaussians.random) - 2.0
    return x


# sigma, V_DSM, and for n = 16 the variance with the source, and the squared bias without it.
@pytest.mark.parametrize(
    ("sigma", "dsm", "stable", "bias"),
    [(0.25, 0.1000857510470422, 0.041944382446199524, 0.03770920678223123),
     (1.0, 0.6821136549528464, 0.07758777689948496, 0.002334435439601229)],
)  # fmt: skip
def test_variance_and_bias_of_two_gaussians(sigma, dsm, stable, bias) -> None:
    gaussians.random = seeded(1)
    sets, each = 300, 50
    v = 0.25 + sigma**2
    within: list[float] = []
    squared: list[float] = []
    for _ in range(sets):
        reference, x0 = gaussians(16), gaussians(each)
        x = x0 + sigma * torch.randn(each, 2, generator=gaussians.random, dtype=torch.float64)
        # The posterior mean in closed form.
        plus = torch.sigmoid(4 * x[:, :1] / v)
        mean = torch.tensor([[2.0, 0.0]], dtype=torch.float64) * (2 * plus - 1)
        truth = mean + 0.25 / v * (x - mean)
        sample = noisy(x0, x, 1.0, sigma)
        added = StableTarget("added")(sample, reference[1:]).x0
        # The same 16 points, with the source as the first reference, one state at a time.
        inside = torch.cat([
            StableTarget()(noisy(x0[i : i + 1], x[i : i + 1], 1.0, sigma),
                           torch.cat([x0[i : i + 1], reference[1:]])).x0
            for i in range(2)
        ])  # fmt: skip
        torch.testing.assert_close(added[:2], inside, rtol=1e-12, atol=1e-12)
        within.append(float((added - truth).square().sum(1).mean()))
        one, other = (StableTarget("outside")(sample, gaussians(16)).x0 - truth for _ in "ab")
        squared.append(float((one * other).sum(1).mean()))
    for found, expected in ((within, stable), (squared, bias)):
        values = torch.tensor(found, dtype=torch.float64)
        error = float(values.std()) / math.sqrt(sets)
        assert error < max(0.06 * expected, 2e-3)
        assert float(values.mean()) == pytest.approx(expected, abs=4 * error)
    assert stable < dsm


@pytest.mark.parametrize("shape", [(2,), (3, 4, 5)])
@pytest.mark.parametrize(
    "model", [EpsModel, X0Model, VModel, RawScoreModel, ScaledScoreModel, EDMModel]
)
def test_with_the_whole_data_set_it_is_the_exact_model(sde, model, shape) -> None:
    data = torch.randn((40, *shape), generator=seeded(), dtype=torch.float64)
    t = sde.time_at_log_snr(torch.linspace(9.0, -5.0, 8, dtype=torch.float64))
    sample = sde.perturb(data[:8], t, generator=seeded(1))
    target, exact = StableTarget()(sample, data), EmpiricalModel(sde, data).predict(sample.x, t)
    torch.testing.assert_close(target.score, exact.score, rtol=1e-7, atol=1e-9)
    # In each parameterization, the output of the exact model has no error.
    a, b = model(lambda x, noise_label: x, sde).parameterization(
        *(c.view(-1) for c in sde.marginal(t))
    )
    output = torch.zeros_like(sample.x)
    for factor, part in ((a, exact.x0), (b, exact.eps)):
        factor = factor if isinstance(factor, float) else factor.view(-1, *(1,) * len(shape))
        output = output + factor * part
    prediction = model(lambda x, noise_label: output, sde)
    assert float(prediction.predict(sample.x, t).noise_error(target).abs().max()) < 1e-8


def test_the_objective_passes_references_and_class_labels() -> None:
    data = torch.randn(64, 2, generator=seeded())
    classes, seen = torch.arange(64) % 3, []

    def network(x, label, *, class_labels):
        seen.append(class_labels)
        return torch.zeros_like(x)

    model = EpsModel(network, VPSDE())
    objective = ScoreMatching(LikelihoodWeighting(), target=StableTarget())
    options = {"reference": data, "reference_class_labels": classes, "class_labels": classes[:8]}
    loss = objective(model, data[:8], generator=seeded(), **options)
    assert torch.equal(seen[0], classes[:8])
    nats = objective.nats(model, data[:8], generator=seeded(), **options)
    torch.testing.assert_close(nats, (1 - VPSDE().t_min) * loss)
    plain = ScoreMatching(LikelihoodWeighting())(model, data[:8], generator=seeded(), **options)
    assert float(loss.mean()) < float(plain.mean())  # the mean squares of the targets


def test_no_gradient_flows_through_the_target() -> None:
    data = torch.randn(9, 3).requires_grad_()
    weight = torch.tensor(0.5, requires_grad=True)
    sample = EDMSDE().perturb(data[:4] * weight, torch.full((4,), 0.5))
    prediction = StableTarget("added")(sample, data)
    assert not prediction.x0.requires_grad
    assert not prediction.eps.requires_grad


@pytest.mark.parametrize("d", [3, 40])
def test_it_compiles_to_one_graph(d) -> None:
    data = torch.randn(100, d, generator=seeded())
    sample = VPSDE().perturb(data[:10], torch.linspace(0.1, 0.9, 10))
    class_labels, target = torch.arange(100) % 2, StableTarget()

    def call(x0, eps, reference, classes=class_labels):
        one = Perturbed(x0, eps, sample.x, sample.t, sample.alpha, sample.sigma)
        prediction = target(
            one, reference, class_labels=class_labels[:10], reference_class_labels=classes
        )
        return prediction.x0, prediction.eps

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        compiled(sample.x0, sample.eps, data), call(sample.x0, sample.eps, data), strict=True
    ):
        torch.testing.assert_close(found, expected)
    # Compiled code reads no values: a class without references keeps the denoising target.
    found, _ = compiled(sample.x0, sample.eps, data, torch.zeros_like(class_labels))
    torch.testing.assert_close(found[1::2], sample.x0[1::2])
    assert float((found[::2] - sample.x0[::2]).abs().max()) > 1e-3


PROCESS = """
from diffusionkit import VPSDE
from diffusionkit.training.stable_target import StableTarget

found = []
for d in (3, 600):
    data = torch.randn(900, d, generator=torch.Generator().manual_seed(0))
    class_labels = torch.arange(900) % 7
    mine = slice(0, 500) if rank == 0 else slice(500, 900)
    x0 = data[mine][:20]
    sample = VPSDE().perturb(x0, torch.linspace(0.1, 0.9, 20))
    target = StableTarget(gather=True)
    prediction = [target(sample, data[mine]),
            target(sample, data[mine], class_labels=class_labels[mine][:20],
                   reference_class_labels=class_labels[mine])]
    whole = StableTarget()
    alone = [whole(sample, data), whole(sample, data, class_labels=class_labels[mine][:20],
                                        reference_class_labels=class_labels)]
    own = whole(sample, data[mine])
    pairs = zip(prediction, alone)
    found += [torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps) for a, b in pairs]
    found.append(not torch.equal(own.x0, prediction[0].x0))
result = found
"""


def test_gathered_references_give_the_same_bits(tmp_path) -> None:
    assert run_in_two_processes(PROCESS, tmp_path) == [[True] * 6] * 2


@pytest.mark.parametrize("d", [3, 40])
def test_invalid_arguments(d) -> None:
    data = torch.randn(30, d, generator=seeded())
    class_labels = torch.arange(30) % 3
    target = StableTarget()
    sample = VPSDE().perturb(data[:6], torch.full((6,), 0.5))
    with pytest.raises(ValueError, match=r"objective\(model, batch\[:64\], reference=batch\)"):
        target(sample)
    with pytest.raises(ValueError, match=r"reference: expected shape \(n, \*"):
        target(sample, data[:, 1:])
    with pytest.raises(ValueError, match="the dtype of x0"):
        target(sample, data.double())
    with pytest.raises(ValueError, match="the device of x0"):
        target(sample, data.to("meta"))
    with pytest.raises(ValueError, match="non-empty"):
        target(sample, data[:0])
    with pytest.raises(ValueError, match="1 that are NaN"):
        target(sample, torch.where(torch.arange(30 * d).view(30, d) == 7, torch.nan, data))
    with pytest.raises(ValueError, match=r"2 of 6 missing, first \[0, 1\]"):
        target(sample, data[2:])
    shifted = data.clone()
    shifted[3, -1] += 1e-5
    with pytest.raises(ValueError, match=r"1 of 6 missing, first \[3\]"):
        target(sample, shifted)
    with pytest.raises(ValueError, match=r"with its class label, got 6 of 6"):
        target(
            sample, data, class_labels=class_labels[:6], reference_class_labels=class_labels.roll(1)
        )
    with pytest.raises(ValueError, match="reference_class_labels: expected together with"):
        target(sample, data, class_labels=class_labels[:6])
    with pytest.raises(ValueError, match=r"^class_labels: expected together with reference"):
        target(sample, data, reference_class_labels=class_labels)
    with pytest.raises(ValueError, match=r"no reference of \[2\]"):
        target(sample, data, class_labels=class_labels[:6], reference_class_labels=class_labels % 2)
    with pytest.raises(ValueError, match=r"^class_labels: expected shape \(6,\)"):
        target(sample, data, class_labels=class_labels, reference_class_labels=class_labels)
    with pytest.raises(ValueError, match=r"reference_class_labels: expected shape \(30,\)"):
        target(sample, data, class_labels=class_labels[:6], reference_class_labels=class_labels[:6])
    with pytest.raises(TypeError, match="no condition but class_labels, got condition"):
        target(sample, data, condition=data[:6])
    with pytest.raises(ValueError, match="source: expected one of"):
        StableTarget("somewhere")
