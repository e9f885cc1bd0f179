import math

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from support import seeded
from support.flows import perturbed
from torch.nn.functional import logsigmoid

from diffusionkit.likelihood.dequantization import UniformDequantizer
from diffusionkit.likelihood.variational_dequantizer import VariationalDequantizer


def small(channels=1, dims=2, levels=17, low=-1.0, high=1.0, **options) -> VariationalDequantizer:
    torch.manual_seed(0)
    sizes = {"width": 8, "components": 3, "context_width": 4, "blocks": 1, "heads": 2}
    return VariationalDequantizer(channels, dims, levels, low, high, **{**sizes, **options})


def exact(dequantizer: VariationalDequantizer, scale: float = 0.2) -> VariationalDequantizer:
    """Return the dequantizer in float64 with perturbed parameters."""
    dequantizer.dtype = torch.float64
    return perturbed(dequantizer, scale, seed=1).eval()


SHAPES = {
    "number": (1, 0, (1,)),
    "vector": (5, 0, (5,)),
    "series": (2, 1, (2, 5)),
    "grey image": (1, 2, (1, 3, 5)),
    "colour image": (3, 2, (3, 4, 3)),
    "volume": (1, 3, (1, 2, 3, 2)),
}


@pytest.mark.parametrize("squash", ["sigmoid", "normal"])
@pytest.mark.parametrize("name", SHAPES)
def test_log_prob_of_agrees_with_the_draws(name, squash) -> None:
    channels, dims, shape = SHAPES[name]
    # Beyond 8 standard deviations the normal distribution function rounds to 0 or 1 in float64.
    scale = 0.1 if squash == "sigmoid" else 0.02
    dequantizer = exact(small(channels, dims, squash=squash), scale)
    images = torch.randint(17, (4, *shape))
    drawn = dequantizer(images, generator=seeded(2))
    assert drawn.x.shape == images.shape
    assert torch.equal(dequantizer.quantize(drawn.x), images)
    found = dequantizer.log_prob_of(drawn.x, images)
    torch.testing.assert_close(found, drawn.log_prob, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("squash", ["sigmoid", "normal"])
def test_log_prob_agrees_with_the_jacobian(squash) -> None:
    scale = 0.2 if squash == "sigmoid" else 0.02
    dequantizer = exact(small(2, 2, levels=4, low=0.0, high=2.0, squash=squash), scale)
    function = torch.sigmoid if squash == "sigmoid" else torch.distributions.Normal(0, 1).cdf
    images = torch.randint(4, (1, 2, 2, 2))
    context = dequantizer._features(images)
    eps = torch.randn(1, 2, 2, 2, dtype=torch.float64)

    def place(eps):
        return 0.5 * function(dequantizer._push(eps, context)[0])

    jacobian = torch.autograd.functional.jacobian(place, eps).reshape(8, 8)
    normal = -0.5 * eps.square().sum() - 4 * math.log(2 * math.pi)
    expected = normal - torch.linalg.slogdet(jacobian).logabsdet
    x = place(eps) + 0.5 * images
    torch.testing.assert_close(dequantizer.log_prob_of(x, images).squeeze(), expected)


def test_the_density_integrates_to_one_over_a_bin() -> None:
    dequantizer = exact(small(1, 1, levels=4, low=0.0, high=2.0, steps=2))
    line = torch.linspace(-20, 20, 101, dtype=torch.float64)
    t = torch.cartesian_prod(line, line).unsqueeze(1)  # u = sigmoid(t), a smooth integrand
    images = torch.tensor([[[1, 3]]]).expand(len(t), 1, 2)
    log_q = dequantizer.log_prob_of(0.5 * (images + torch.sigmoid(t)), images)
    jacobian = (logsigmoid(t) + logsigmoid(-t)).flatten(1).sum(1) + 2 * math.log(0.5)
    mass = (log_q + jacobian).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(mass.item() - 1) < 1e-6


def test_points_depend_on_the_image() -> None:
    dequantizer = exact(small())
    x = [
        dequantizer(torch.full((1, 1, 4, 4), k), generator=seeded()).x - 2 * k / 17 for k in (0, 16)
    ]
    assert (x[0] - x[1]).abs().max() > 1e-4


# Reference: E log q(u) for u = sigmoid(z), z ~ N(0, 1), by high-precision quadrature.
def test_the_expected_log_prob_of_an_untrained_flow() -> None:
    dequantizer = exact(small(1, 0, levels=2, low=0.0, high=2.0), scale=0.0)
    t = torch.linspace(-9, 9, 361, dtype=torch.float64).unsqueeze(1)
    log_q = dequantizer.log_prob_of(torch.sigmoid(t), torch.zeros(361, 1, dtype=torch.long))
    normal = torch.exp(-0.5 * t.squeeze(1).square()) / math.sqrt(2 * math.pi)
    cost = (normal * log_q).sum().item() * 0.05
    assert cost == pytest.approx(0.19317983349020681, rel=1e-10)
    assert cost / math.log(2) == pytest.approx(0.27869958777607706, rel=1e-10)


def test_an_untrained_flow_with_the_normal_squash_is_uniform() -> None:
    dequantizer = small(64, 0, squash="normal").eval()
    images = torch.randint(17, (200, 64))
    drawn = dequantizer(images, generator=seeded())
    uniform = UniformDequantizer(17)(images)
    torch.testing.assert_close(drawn.log_prob, uniform.log_prob, rtol=0, atol=1e-4)
    u = (drawn.x.double() + 1) * 8.5 - images
    gap = u.flatten().sort().values - torch.linspace(0, 1, u.numel(), dtype=torch.float64)
    assert gap.abs().max() < 1.63 / math.sqrt(u.numel())


def test_an_untrained_flow_is_logit_normal_in_every_dimension() -> None:
    """Rotations preserve the distribution of the noise; new scales are 1 in evaluation mode."""
    dequantizer = exact(small(3), scale=0.0)
    images = torch.randint(17, (4, 3, 3, 3))
    drawn = dequantizer(images)
    u = (drawn.x + 1) * 8.5 - images
    z = torch.logit(u)
    terms = (
        -0.5 * z.square() - 0.5 * math.log(2 * math.pi) - torch.log(u * (1 - u)) - math.log(2 / 17)
    )
    torch.testing.assert_close(drawn.log_prob, terms.flatten(1).sum(1), rtol=1e-6, atol=0)


def test_the_first_call_in_training_mode_normalizes_its_draw() -> None:
    dequantizer = small(2)
    images = torch.randint(17, (8, 2, 4, 4))
    drawn = dequantizer(images, generator=seeded())
    context = dequantizer._features(images)
    eps = torch.randn(8, 2, 4, 4, generator=seeded())
    first, _ = dequantizer.layers[0](eps, context)
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(first.std((0, 2, 3), correction=0), torch.ones(2))
    # A second call changes nothing.
    again = dequantizer(images, generator=seeded())
    assert torch.equal(again.x, drawn.x)


def test_a_loaded_state_draws_the_same_points() -> None:
    dequantizer = small()
    images = torch.randint(17, (4, 1, 4, 4))
    dequantizer(images)
    other = small(steps=4)
    other.load_state_dict(dequantizer.state_dict())
    for training in (True, False):
        drawn, expected = (
            d.train(training)(images, generator=seeded(5)) for d in (other, dequantizer)
        )
        assert torch.equal(drawn.x, expected.x)
        assert torch.equal(drawn.log_prob, expected.log_prob)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_a_saturated_float32_point_stays_in_its_bin_with_its_density(shift) -> None:
    """At z = 30 the sigmoid is 1 in float32; the density is still that of z."""
    dequantizer = small(steps=1).eval()
    dequantizer.layers[0].center.data.fill_(-shift)
    images = torch.arange(17).view(1, 1, 1, 17)
    drawn = dequantizer(images, generator=seeded())
    assert torch.equal(dequantizer.quantize(drawn.x), images)
    eps = torch.randn(1, 1, 1, 17, generator=seeded()).double()
    # -log sigmoid'(z) = |z| + 2 log(1 + exp(-|z|)).
    slopes = (eps + shift).abs() + 2 * torch.exp(-(eps + shift).abs())
    terms = -0.5 * eps.square() - 0.5 * math.log(2 * math.pi) + slopes - math.log(2 / 17)
    torch.testing.assert_close(drawn.log_prob, terms.flatten(1).sum(1), rtol=1e-6, atol=0)


def test_gradients_match_finite_differences() -> None:
    dequantizer = exact(small(1, 1, steps=2))
    images = torch.randint(17, (3, 1, 4))
    points = dequantizer(images).x.detach()
    directions = [torch.randn_like(p) for p in dequantizer.parameters()]

    def moved(h):
        for parameter, direction in zip(dequantizer.parameters(), directions, strict=True):
            parameter.data += h * direction

    def draw():
        return dequantizer(images, generator=seeded(3))

    for value in (
        lambda: draw().x.square().sum(),
        lambda: draw().log_prob.sum(),
        lambda: dequantizer.log_prob_of(points, images).sum(),
    ):
        gradients = torch.autograd.grad(value(), list(dequantizer.parameters()))
        expected = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True)).item()
        ends = []
        for h in (1e-5, -2e-5):
            moved(h)
            ends.append(value().item())
        moved(1e-5)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_autocast_preserves_the_precision_of_the_state() -> None:
    """Networks have no effect in an untrained flow: any difference is due to the state."""
    dequantizer = small(3, dtype=torch.float64).eval()
    images = torch.randint(17, (2, 3, 4, 4))
    expected, drawn = (
        draw(images, torch.autocast("cpu", torch.bfloat16, enabled=half), dequantizer)
        for half in (False, True)
    )
    torch.testing.assert_close(drawn.x, expected.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.log_prob, expected.log_prob, rtol=1e-6, atol=0)


def draw(images, context, dequantizer):
    with context, torch.no_grad():
        return dequantizer(images, generator=seeded())


def test_every_step_mixes_the_channels_if_there_are_several() -> None:
    kinds = [type(layer).__name__ for layer in small(3, steps=2).layers]
    assert kinds == 2 * ["ActNorm", "ChannelMixing", "LogisticCoupling"]
    assert [type(layer).__name__ for layer in small(1, steps=1).layers] == [kinds[0], kinds[2]]


def test_after_two_steps_every_element_depends_on_others() -> None:
    dequantizer = exact(small(1, 1, steps=2))
    context = dequantizer._features(torch.randint(17, (1, 1, 5)))
    eps = torch.randn(1, 1, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda eps: dequantizer._push(eps, context)[0], eps
    ).reshape(5, 5)
    others = jacobian - jacobian.diag().diag()
    assert (others.abs().amax(1) > 1e-6).all()


def test_the_context_network_gets_images_scaled_to_one() -> None:
    dequantizer = small(levels=5)
    seen = []
    dequantizer.context.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    dequantizer(torch.arange(5).view(1, 1, 1, 5))
    assert seen[0].flatten().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


@pytest.mark.slow
def test_training_closes_the_gap_to_the_discrete_likelihood() -> None:
    """Correlated Gaussian data in 3 x 3 bins: log q - log p approaches -log P(k) from above."""
    covariance = torch.tensor([[0.16, 0.12], [0.12, 0.16]], dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(torch.tensor([0.1, -0.2]).double(), covariance)
    images = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    nodes, weights = (torch.from_numpy(a) / 2 for a in leggauss(40))
    u, w = torch.cartesian_prod(nodes, nodes) + 0.5, torch.outer(weights, weights).flatten()
    corners = 2 / 3 * (images[:, None] + u) - 1
    exact_nll = -torch.log((w * p.log_prob(corners).exp()).sum(1) * (2 / 3) ** 2).mean().item()

    def gap(dequantizer, n):
        drawn = dequantizer(images.repeat(n, 1))
        values = drawn.log_prob - p.log_prob(drawn.x.double())
        return values.mean() - exact_nll, values.view(n, 9).mean(1).std() / math.sqrt(n)

    torch.manual_seed(0)
    uniform, _ = gap(UniformDequantizer(3), 2000)
    dequantizer = VariationalDequantizer(
        2, 0, 3, steps=4, width=16, components=4, context_width=16, blocks=1, heads=0
    )
    optimizer = torch.optim.Adam(dequantizer.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        gap(dequantizer, 16)[0].backward()
        optimizer.step()
    with torch.no_grad():
        trained, error = gap(dequantizer.eval(), 2000)
    assert -4 * error < trained < 0.2 * uniform


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels"),
        ({"dims": 4}, ValueError, "dims"),
        ({"dims": -1}, ValueError, "dims"),
        ({"steps": 0}, ValueError, "steps"),
        ({"components": 1.5}, TypeError, "components"),
        ({"heads": 3}, ValueError, "width = 8"),
        ({"levels": 1}, ValueError, ">= 2"),
        ({"squash": "tanh"}, ValueError, "squash: expected one of"),
    ],
)
def test_bad_settings(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        small(**arguments)


def test_bad_images_and_points() -> None:
    dequantizer = small(3)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(2, 1, 4, 4\)"):
        dequantizer(torch.zeros(2, 1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(B, 3\), got \(2, 3, 1\)"):
        small(3, 0)(torch.zeros(2, 3, 1, dtype=torch.long))
    with pytest.raises(TypeError, match="integers"):
        dequantizer(torch.zeros(2, 3, 4, 4))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="in the bins of the images"):
        dequantizer.log_prob_of(torch.zeros(2, 3, 4, 4), images)
    with pytest.raises(ValueError, match="in the bins of the images"):
        dequantizer.log_prob_of(torch.full((2, 3, 4), -0.99), images)
