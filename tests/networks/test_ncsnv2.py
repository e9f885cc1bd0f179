"""NCSNv2: outputs, names and sizes of the released code, and the properties of a network."""

import hashlib
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusionkit.checkpoints._score_sde_keys import ncsnv2_keys
from diffusionkit.networks.ncsnv2 import NCSNv2

SIGMAS = (20.0, 5.0, 0.5, 0.01)
UNIT = (0.0, 1.0)
LEVELS_128 = ((1, 1), (2, 1), (2, 1), (4, 2), (4, 4))
LEVELS_256 = ((1, 1), (2, 1), (2, 1), (2, 1), (4, 2), (4, 4))


def small(channels: int = 1, **options: Any) -> NCSNv2:
    torch.manual_seed(0)
    return NCSNv2(channels, **{"sigmas": SIGMAS, "width": 4} | options)


# Outputs of the released code in float64, with the weights below: entries 0, n // 3, -1 of the
# first and 1, n // 2, -1 of the second sample, then the sums of absolute values of both.
RELEASED = [
    (
        {"channels": 3, "data_range": UNIT},
        (8, 12),
        (0.0113405932956, 0.00918786451414, 0.0219448507902),
        (7.11052112508, 5.18438370476, 3.92108753164),
        (8.724462843321596, 2756.3903155108683),
    ),
    (  # 28 pixels: the released code's adjusted padding is never used in a dilated level
        {"channels": 1, "activation": "relu"},
        (28, 28),
        (0.0736983003431, 0.0989776171481, 0.00489060678972),
        (30.946081208, 33.9703960687, 4.53539402492),
        (48.24929163302676, 24268.018543110506),
    ),
    (
        {"channels": 2, "activation": "leaky_relu", "data_range": UNIT},
        (6, 4),
        (0.00436522405677, -0.0012505726059, -0.000316436848852),
        (1.48089312539, -1.51639283644, 1.43233702871),
        (0.3906498065861372, 122.73334000710607),
    ),
    (
        {"channels": 1, "activation": "silu", "data_range": UNIT},
        (4, 8),
        (0.0340495949506, 0.0129000395004, 0.00647465484138),
        (-0.154796872379, 0.822571967154, -4.68482513733),
        (0.815872544635281, 96.22263473803753),
    ),
    (
        {"channels": 3, "levels": LEVELS_128, "data_range": UNIT},
        (12, 8),
        (0.0516044328454, 0.0173753276466, 0.0257605122936),
        (1.27558372297, 20.5106980039, 3.19179581343),
        (12.840024613214364, 4511.295990797278),
    ),
    (
        {"channels": 2, "levels": LEVELS_256, "data_range": UNIT},
        (16, 24),
        (0.00185881970325, 0.0371880045512, -0.0422297791469),
        (-38.707825347, -21.0397627221, -22.2752104573),
        (33.97584281827702, 13391.677192488489),
    ),
]


@pytest.mark.parametrize(("options", "size", "first", "second", "sums"), RELEASED)
def test_outputs_of_the_released_code(
    options: dict[str, Any],
    size: tuple[int, int],
    first: tuple[float, ...],
    second: tuple[float, ...],
    sums: tuple[float, float],
) -> None:
    net = small(**options).double()
    released = ncsnv2_keys(net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            i = torch.arange(p.numel(), dtype=torch.float64)
            phase = 1 + zlib.crc32(released[name].encode()) % 1000
            p.copy_(0.05 * torch.sin(0.37 * i + phase).reshape(p.shape))
            if released[name].endswith(("alpha", "gamma")):
                p.add_(1)
    n = 2 * net.channels * math.prod(size)
    x = 0.5 + 0.5 * torch.sin(0.3 + 0.7 * torch.arange(n, dtype=torch.float64))
    with torch.no_grad():
        out = net(x.reshape(2, net.channels, *size), torch.tensor([1.0, 3.0], dtype=torch.float64))
    a, b = out.flatten(1)
    got = [a[0], a[len(a) // 3], a[-1], b[1], b[len(b) // 2], b[-1], a.abs().sum(), b.abs().sum()]
    expected = torch.tensor([*first, *second, *sums], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "count", "digest"),
    [
        ({"channels": 3}, 153, "c8b460b291667902"),
        ({"channels": 3, "levels": LEVELS_128}, 191, "fa0db3f31caef1fd"),
        ({"channels": 2, "levels": LEVELS_256}, 229, "b6a87b1b74062c31"),
    ],
)
def test_names_and_shapes_of_the_released_code(
    options: dict[str, Any], count: int, digest: str
) -> None:
    net = small(**options)
    keys = ncsnv2_keys(net)
    state = net.state_dict()
    lines = sorted(f"{released} {tuple(state[name].shape)}" for name, released in keys.items())
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def test_names_exist_for_published_depths_only() -> None:
    with pytest.raises(ValueError, match="expected a network of 4, 5 or 6 levels, got 2"):
        ncsnv2_keys(small(levels=((1, 1), (2, 1))))


@pytest.mark.parametrize(
    ("name", "parameters", "count", "sigma_max"),
    [
        ("cifar10", 29_694_083, 232, 50),
        ("celeba_64", 29_694_083, 500, 90),
        ("church_96", 83_445_379, 788, 140),
        ("bedroom_128", 83_445_379, 1086, 190),
        ("ffhq_256", 94_132_611, 2311, 348),
    ],
)
def test_published_networks(name: str, parameters: int, count: int, sigma_max: float) -> None:
    net = getattr(NCSNv2, name)()
    sigmas = np.array(net.config["sigmas"])
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.config["data_range"] == (0.0, 1.0)
    assert len(sigmas) == count
    np.testing.assert_allclose(sigmas[[0, -1]], [sigma_max, 0.01], rtol=1e-12)
    ratio = (sigma_max / 0.01) ** (1 / (count - 1))
    np.testing.assert_allclose(sigmas[:-1] / sigmas[1:], ratio, rtol=1e-10)


def test_options_replace_the_published_ones() -> None:
    net = NCSNv2.tower_128(channels=1, width=2, data_range=(0.0, 255.0))
    assert (net.config["width"], net.config["data_range"]) == (2, (0.0, 255.0))
    assert net.config["levels"] == LEVELS_128
    assert len(net.config["sigmas"]) == 1086


def test_noise_level_divides_and_data_range_is_mapped() -> None:
    x = torch.rand(4, 1, 4, 6)
    net = small(data_range=(0.0, 4.0))
    scores = net(4 * x[:1].expand(4, -1, -1, -1), torch.arange(4))
    scaled = scores * torch.tensor(SIGMAS).reshape(4, 1, 1, 1)
    torch.testing.assert_close(scaled, scaled[:1].expand_as(scaled))
    centered = small()
    torch.testing.assert_close(centered(2 * x - 1, torch.arange(4)), net(4 * x, torch.arange(4)))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"dims": 1}, (2, 1, 10)),
        ({"dims": 2, "channels": 5}, (2, 5, 4, 6)),
        ({"dims": 3}, (1, 1, 2, 4, 6)),
        ({"levels": ((1, 1), (2, 1), (5, 1))}, (1, 1, 8, 4)),  # widest at the lowest level
        ({"levels": ((3, 2), (1, 3))}, (1, 1, 5, 3)),  # no level halves the size
        ({"levels": [[1, 1]]}, (1, 1, 3, 5)),
        ({"width": 2}, (1, 1, 2, 2)),
    ],
)
def test_shapes_and_gradients_to_every_parameter(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    net = small(**options)
    x = torch.randn(shape, requires_grad=True)
    out = net(x, torch.zeros(shape[0]))
    assert out.shape == shape
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_config_builds_the_same_network() -> None:
    net = small(3, levels=((1, 1), (2, 2)), activation="silu", dims=1)
    again = NCSNv2(**net.config)
    again.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 5)
    assert torch.equal(again(x, torch.tensor([0, 3])), net(x, torch.tensor([0, 3])))


def test_initialization() -> None:
    net = small(width=64, levels=((1, 1), (1, 1)))
    bound = 1 / math.sqrt(64 * 9)
    for weight in (net.levels[0][0].conv_1.weight, net.refinements[0].pooling.convs[0].weight):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / bound - 1 / math.sqrt(3)) < 0.02
    bias = net.levels[0][0].conv_1.bias
    assert 0.8 * bound < bias.abs().max() <= bound
    for name in ("alpha", "gamma"):
        values = torch.cat([p for key, p in net.named_parameters() if key.endswith(name)])
        assert abs(values.mean() - 1) < 0.005
        assert abs(values.std() - 0.02) < 0.003
    assert not any(p.any() for key, p in net.named_parameters() if key.endswith("beta"))


def test_activation_checkpointing_keeps_the_gradient() -> None:
    x, noise_label = torch.randn(2, 1, 4, 6), torch.tensor([0, 1])
    grads, calls = [], []
    for recompute in (False, True):
        net = small(activation_checkpointing=recompute)
        count = 0

        def hook(*_: Any) -> None:
            nonlocal count
            count += 1

        for part in (*net.levels, *net.refinements):
            part.register_forward_pre_hook(hook)
        net(x, noise_label).square().sum().backward()
        calls.append(count)
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])
    assert calls == [8, 16]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dims", [2, *(pytest.param(dims, marks=pytest.mark.slow) for dims in (1, 3))]
)
def test_compiles_in_one_graph(dims: int) -> None:
    net = small(dims=dims, levels=((1, 1), (2, 1)))
    x, noise_label = torch.randn(2, 1, *(4, 6, 2)[:dims]), torch.tensor([0, 2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, noise_label), net(x, noise_label))


def test_autocast() -> None:
    net = small()
    x, noise_label = torch.randn(2, 1, 8, 8), torch.zeros(2)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x, noise_label)
    high = net(x, noise_label)
    assert (low - high).norm() < 0.05 * high.norm()


X, I = torch.zeros(2, 1, 4, 6), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X[0], I), ValueError, r"x: expected shape \(B, 1, H, W\), got \(1, 4, 6\)"),
        ((X[..., :5], I), ValueError, r"divisible by 2, got \(4, 5\)"),
        ((X[:, :, :3], I), ValueError, r"divisible by 2, got \(3, 6\)"),
        ((X, I[:1]), ValueError, r"noise_label: expected shape \(2,\), got \(1,\)"),
        ((X, I, I), TypeError, "class_labels: expected None"),
    ],
)
def test_input_errors(arguments: tuple[Tensor, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small()(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"channels": 0}, ValueError, "channels: expected an integer >= 1, got 0"),
        ({"width": 4.0}, TypeError, "width: expected an integer, got float"),
        ({"width": 1}, ValueError, "width: expected an integer >= 2, got 1"),
        ({"dims": 4}, ValueError, "dims: expected an integer <= 3, got 4"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of 'silu', .* got 'gelu'"),
        ({"levels": ()}, ValueError, "levels: expected one row .* got none"),
        ({"levels": (1, 2, 2)}, TypeError, r"expected rows \(multiplier, dilation\), got 1"),
        ({"levels": ((1, 1, 1),)}, TypeError, r"levels: expected rows .* got \(1, 1, 1\)"),
        ({"levels": ((1, 0),)}, ValueError, "dilation: expected an integer >= 1, got 0"),
        ({"levels": ((0, 1),)}, ValueError, "multiplier: expected an integer >= 1, got 0"),
        (
            {"data_range": (1.0, 0.0)},
            ValueError,
            r"data_range: expected finite low < high, got 1.0 and 0.0",
        ),
        ({"sigmas": (1.0, 0.0)}, ValueError, r"sigmas: expected finite numbers > 0"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small(**options)
