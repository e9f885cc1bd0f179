"""EDM2's U-Net keeps magnitudes, and its weights keep theirs under forced normalization."""

import math

import pytest
import torch
from support import seeded
from support.tiny_networks import fill
from torch import nn
from torch.nn import functional as F

from diffusionkit import (
    EDMSDE,
    EDMModel,
    EDMWeighting,
    LearnedUncertainty,
    LogNormalTimes,
    PowerEMA,
    ScoreMatching,
    clipped_step,
    normalize_weights,
    reconstruct_ema,
)
from diffusionkit._magnitude import MPLinear, mp_cat, mp_cosines, mp_sum, normalized
from diffusionkit.networks import MLP, EDM2UNet
from diffusionkit.networks.mp_blocks import CosineAttention, MPBlock, MPConv, MPEmbedding, MPFourier
from diffusionkit.networks.unet import Stage

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}
SMALL |= {"head_channels": 8}


def magnitude(x, *dims):
    return x.detach().square().mean(dims or None).sqrt()


def test_normalized_vectors_have_magnitude_one() -> None:
    x = torch.randn(3, 50, 4, generator=seeded(), dtype=torch.float64)
    got = normalized(x, (1,))
    expected = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert normalized(torch.zeros(2, 3), (1,)).eq(0).all()
    tiny = torch.full((1, 4), 1e-4, dtype=torch.float64)  # as large as what is added
    torch.testing.assert_close(normalized(tiny, (1,)), torch.full_like(tiny, 0.5))


def test_sums_and_concatenations_of_independent_parts_keep_their_magnitude() -> None:
    a, b = torch.randn(2, 40_000, generator=seeded(), dtype=torch.float64)
    for t in (0.0, 0.3, 0.5, 1.0):
        assert float(magnitude(mp_sum(a, b, t))) == pytest.approx(1, abs=0.02)  # 4 deviations
    torch.testing.assert_close(mp_sum(a, b, 0.3), (0.7 * a + 0.3 * b) / math.sqrt(0.58))
    a, b = torch.randn(500, 60, generator=seeded()), torch.randn(500, 20, generator=seeded(1))
    for t in (0.2, 0.5, 0.9):
        both = mp_cat(a, b, t)
        assert float(magnitude(both)) == pytest.approx(1, abs=0.02)
        shares = [float(part.square().sum()) for part in both.split([60, 20], 1)]
        assert shares[1] / shares[0] == pytest.approx((t / (1 - t)) ** 2, rel=0.04)


def test_layers_do_not_depend_on_the_magnitude_of_their_weights() -> None:
    for layer in (MPLinear(300, 40), MPConv(30, 40, 2), MPConv(30, 40, 1, kernel=1)):
        layer.double()
        x = torch.randn(64, layer.weight.shape[1], *(6,) * (layer.weight.ndim - 2)).double()
        out = layer(x)
        # Each output is the mean of several hundred products.
        inside = out if layer.weight.ndim == 2 else out[..., 1:-1]
        assert float(magnitude(inside)) == pytest.approx(1, abs=0.15)
        with torch.no_grad():
            layer.weight.mul_(1 + torch.rand(len(layer.weight)).view(-1, *(1,) * (x.ndim - 1)))
        torch.testing.assert_close(layer(x), out, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer(x, 0.25), 0.25 * layer(x))


def test_forced_normalization_is_that_of_the_released_code() -> None:
    """Each row over 1e-4 and its magnitude, before the forward pass normalizes it again."""
    layer = MPConv(3, 5, 2).double()
    with torch.no_grad():
        layer.weight.normal_(std=0.01)
    w = layer.weight.detach().clone()
    normalize_weights(layer)
    expected = w / (1e-4 + w.square().mean((1, 2, 3), keepdim=True).sqrt())
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=0)
    x = torch.randn(1, 3, 4, 4).double()
    again = expected / (1e-4 + expected.square().mean((1, 2, 3), keepdim=True).sqrt())
    torch.testing.assert_close(layer(x), F.conv2d(x, again / math.sqrt(27), padding=1))


def test_the_released_constant_of_silu() -> None:
    """E[silu(z)^2] of a standard Gaussian, by quadrature, is 0.5964^2."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    exact = math.sqrt(float(torch.trapezoid(F.silu(z).square() * density, z)))
    assert exact == pytest.approx(0.596, abs=5e-4)
    block = MPBlock(
        64, 64, width=8, dims=1, decoding=True, dropout=0.0, balance=1.0, clip=None
    ).double()
    h = torch.randn(16, 64, 32, generator=seeded(), dtype=torch.float64)
    first = block.conv_1(F.silu(h), 1 / 0.596)[..., 1:-1]
    assert float(magnitude(first)) == pytest.approx(1, abs=0.1)


def test_fourier_features_have_magnitude_one_for_every_label() -> None:
    features = MPFourier(4000)
    label = torch.tensor([-1.5, 0.0, 0.01, 2.0])
    got = features(label)
    assert torch.equal(got, mp_cosines(label, *features.frequencies.detach()))
    assert magnitude(got, 1).sub(1).abs().max() < 0.05
    assert float(features.frequencies[0].std()) == pytest.approx(2 * math.pi, rel=0.05)


def test_class_embeddings_are_products_with_one_hot_vectors() -> None:
    embedding = MPEmbedding(6, 5, num_classes=4, condition_features=None, balance=0.3).double()
    label, classes = torch.tensor([0.3, -0.2, 1.0]).double(), torch.tensor([3, 0, 2])
    one_hot = F.one_hot(classes, 4).double() * 2  # of magnitude one
    noise = embedding.linear(embedding.noise_features(label))
    expected = F.silu(mp_sum(noise, embedding.classes(one_hot), 0.3)) / 0.596
    torch.testing.assert_close(embedding(label, classes), expected)


def test_attention_is_that_of_normalized_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention = CosineAttention(8, heads=2, balance=0.3, clip=None).double()
    x = torch.randn(2, 8, 3, 4, generator=seeded(), dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(tokens).view(2, 12, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = (y / (y.square().mean(-1, keepdim=True).sqrt() + 1e-4) for y in (q, k, v))
    y = ((q @ k.mT / 2).softmax(-1) @ v).permute(0, 2, 1, 3).reshape(2, 12, 8)
    y = attention.out(y).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), (0.7 * x + 0.3 * y) / math.sqrt(0.58))


def activations(net, x, label):
    """Return the magnitude of the output of each stage, for each sample."""
    found = []
    hooks = [
        stage.register_forward_hook(lambda m, args, out: found.append(magnitude(out, 1, 2, 3)))
        for stage in net.modules()
        if isinstance(stage, Stage)
    ]
    net(x, label)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def test_activations_keep_magnitude_one() -> None:
    """At initialization, for inputs of magnitude one, within 25 percent and 12 on average."""
    torch.manual_seed(0)
    net = EDM2UNet(
        3, width=32, multipliers=(1, 2), blocks=2, attention_levels=(1,), head_channels=32
    )
    got = activations(net, torch.randn(2, 3, 32, 32), torch.tensor([-1.5, 0.8]))
    assert len(got) == 14
    assert float(got.mean()) == pytest.approx(1, abs=0.12)  # padding with zeros loses some
    assert float(got.min()) > 0.75
    assert float(got.max()) < 1.25


def data(n, generator):
    """Draw sine waves with a standard deviation of 0.5."""
    phase = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    return math.sqrt(0.5) * torch.sin(phase + torch.arange(8) * math.pi / 4)


def trained(steps=60, normalize=True):
    torch.manual_seed(0)
    net = EDM2UNet(1, dims=1, width=16, multipliers=(1,), blocks=1, attention_levels=())
    model, objective = EDMModel(net, EDMSDE()), LearnedUncertainty(features=64)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02, betas=(0.9, 0.99))
    generator = seeded()
    for _ in range(steps):
        if normalize:
            normalize_weights(model, objective)
        objective(model, data(64, generator), generator=generator).mean().backward()
        clipped_step(optimizer, math.inf)
    return model.eval(), objective


def rows(module):
    """Return the magnitudes of all rows of the weights."""
    layers = [m for m in module.modules() if isinstance(m, MPLinear)]
    return torch.cat([magnitude(m.weight.flatten(1), 1) for m in layers])


@pytest.fixture(scope="module")
def run():
    return trained()


def test_a_small_network_learns(run) -> None:
    """The loss, 1 for a network that returns 0, falls below 3/4 by four standard errors."""
    model, _ = run
    loss = ScoreMatching(EDMWeighting(), times=LogNormalTimes(-0.4, 1.0))
    with torch.no_grad():
        got = loss(model, data(512, seeded(1)), generator=seeded(2))
    deviation = float(got.std()) / math.sqrt(len(got))
    assert float(got.mean()) + 4 * deviation < 0.75


def test_the_uncertainty_is_the_logarithm_of_the_loss(run) -> None:
    """The weighted loss has mean 1 at low and at high noise, within 0.3."""
    model, objective = run
    for sigma in (0.3, 1.5):
        t = torch.full((512,), sigma)
        with torch.no_grad():
            loss = objective.objective(model, data(512, seeded(1)), t=t, generator=seeded(2))
            u = objective.log_variance(model.sde, t)
        assert float((loss * torch.exp(-u)).mean()) == pytest.approx(1, abs=0.3)


def test_weights_keep_magnitude_one_under_forced_normalization(run) -> None:
    model, objective = run
    got = torch.cat([rows(model), rows(objective)])
    assert float((got - 1).abs().max()) < 0.01  # the last step was not followed by it
    normalize_weights(model, objective)
    got = torch.cat([rows(model), rows(objective)])
    assert float((got - 1).abs().max()) < 2e-4
    plain = rows(trained(30, normalize=False)[0])
    assert float(plain.max()) > 1.05


def test_normalization_does_not_change_the_outputs() -> None:
    net = EDM2UNet(1, **SMALL)
    fill(net, 1.0)
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([-0.5, 0.5])
    with torch.no_grad():
        before = net(x, label)
        normalize_weights(net)
        after = net(x, label)
    assert rows(net).sub(1).abs().max() < 1e-3
    assert float((after - before).norm() / before.norm()) < 0.01


def test_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    net = EDM2UNet(1, dims=1, width=8, multipliers=(1,), blocks=1, head_channels=8)
    fill(net, 1.0)
    x, label = torch.randn(2, 1, 8), torch.tensor([-0.5, 0.5])
    with torch.no_grad():
        got = torch.compile(net, fullgraph=True, backend="eager")(x, label)
        torch.testing.assert_close(got, net(x, label))


def test_normalization_needs_layers_of_its_kind() -> None:
    with pytest.raises(ValueError, match="modules: expected a network with magnitude-preserving"):
        normalize_weights(EDM2UNet(1, **SMALL), MLP(2))
    with pytest.raises(TypeError, match="modules: expected"):
        normalize_weights([nn.Linear(2, 2)])


def test_averages_of_weights_can_be_reconstructed(tmp_path) -> None:
    """Post-hoc EMA works on this network: the frequencies, which do not change, are kept."""
    net = EDM2UNet(1, **SMALL)
    ema = PowerEMA(net, (0.05, 0.1))
    for _ in range(3):
        with torch.no_grad():
            net.head.gain.add_(1.0)
        ema.update(net)
        ema.save(tmp_path)
    state = reconstruct_ema(tmp_path, 0.08)
    torch.testing.assert_close(
        state["embedding.noise_features.frequencies"], net.embedding.noise_features.frequencies
    )
    assert 1.0 < float(state["head.gain"]) < 3.0


@pytest.mark.parametrize("name", ["label_balance", "concat_balance", "res_balance", "attn_balance"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_balances_are_shares(name, value) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a number in \[0, 1\], got"):
        EDM2UNet(1, **SMALL, **{name: value})


def test_only_published_sizes_have_names() -> None:
    with pytest.raises(ValueError, match="size: expected one of 'xs', 's', 'm', 'l', 'xl', got"):
        EDM2UNet.imagenet64("xxl")


def test_levels_without_a_whole_head_have_no_attention() -> None:
    net = EDM2UNet(1, **SMALL | {"head_channels": 16}, num_classes=3)
    attended = [name for name, m in net.named_modules() if isinstance(m, CosineAttention)]
    assert len(attended) == 4  # only the level of 16 channels and the middle
    net = EDM2UNet(1, **SMALL | {"head_channels": 17})
    assert not any(isinstance(m, CosineAttention) for m in net.modules())


def test_activations_are_clipped_once_after_the_attention() -> None:
    net = EDM2UNet(1, **SMALL, clip_act=0.5)
    fill(net, 1.0)
    for stage in (s for s in net.modules() if isinstance(s, Stage)):
        assert stage.block.clip == (0.5 if stage.attention is None else None)
        if stage.attention is not None:
            assert stage.attention.clip == 0.5
    largest = []
    for stage in (s for s in net.modules() if isinstance(s, Stage)):
        stage.register_forward_hook(lambda m, a, out: largest.append(float(out.abs().max())))
    with torch.no_grad():
        net(torch.randn(1, 1, 8, 8), torch.zeros(1))
    assert max(largest) == 0.5
