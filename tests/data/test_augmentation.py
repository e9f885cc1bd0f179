"""The augmentation of EDM: the laws of its parameters, its labels, and the transformed images."""

import math

import pytest
import torch
from scipy import stats
from support import seeded

from diffusionkit.data import EDMAugmentation, augmentation
from diffusionkit.networks import DDPMpp

NAMES = ("x_flip", "y_flip", "scale", "rotation", "stretch", "axis", "shift_x", "shift_y")


def parameters(**values):
    """One image, not transformed but for these values."""
    numbers = {name: values.get(name, 0.0) for name in NAMES}
    return augmentation._Parameters(
        **{name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}
    )


def blob(change=lambda u, v: (u, v)):
    """A Gaussian, wide along one diagonal, off the center, at changed places."""
    axis = torch.arange(32, dtype=torch.float64) - 15.5
    v, u = torch.meshgrid(axis, axis, indexing="ij")  # v downwards
    u, v = change(u, v)
    return torch.exp(-((u + v) ** 2) / 64 - (u - v - 2) ** 2 / 32)[None, None]


def stretched_diagonally(u, v):
    along, across = (u - v) / 2**0.2, (u + v) * 2**0.2
    return (along + across) / 2, (across - along) / 2


def test_values_of_the_released_code() -> None:
    """Three images through the released AugmentPipe; each takes every transformation."""
    rows, columns = torch.arange(10.0)[:, None], torch.arange(12.0)
    x = torch.sin(1.7 * rows + 0.9 * columns).repeat(3, 1, 1, 1)
    drawn = augmentation._Parameters(
        x_flip=torch.tensor([0.0, 0.0, 1.0]),
        y_flip=torch.tensor([0.0, 1.0, 1.0]),
        scale=torch.tensor([0.33749509, 1.01111591, -1.43517935]),
        rotation=torch.tensor([-3.06551170, -2.00510764, -1.96214354]),
        stretch=torch.tensor([0.97743177, 0.94027740, -0.52955931]),
        axis=torch.tensor([0.0, 0.0, -1.54593134]),
        shift_x=torch.tensor([-0.30429035, -0.09143861, -0.10242409]),
        shift_y=torch.tensor([1.07394540, 0.91747296, 0.53973866]),
    )
    labels = [
        [0, 0, 0.337495, -1.997107, -0.076008, 0.977432, 0, -0.304290, 1.073945],
        [0, 1, 1.011116, -1.420786, -0.907160, 0.940277, 0, -0.091439, 0.917473],
        [1, 1, -1.435179, -1.381434, -0.924396, -0.013166, 0.529396, -0.102424, 0.539739],
    ]
    pixels = [
        [0.678958, 0.496447, 0.815382, 0.587053],
        [-0.901891, -0.846453, 0.654785, -0.741153],
        [0.544455, 0.891864, 0.139396, -0.907650],
    ]
    torch.testing.assert_close(drawn.labels(), torch.tensor(labels), atol=2e-6, rtol=0)
    seen = augmentation._transformed(x, drawn)[:, 0, [0, 4, 9, 7], [0, 6, 11, 2]]
    torch.testing.assert_close(seen, torch.tensor(pixels), atol=5e-6, rtol=0)


def test_the_filter_has_orthonormal_shifts_and_six_vanishing_moments() -> None:
    taps = torch.tensor(augmentation._SYM6, dtype=torch.float64)
    assert abs(float(taps.sum()) - 2**0.5) < 1e-12
    for shift in range(0, 12, 2):
        overlap = float((taps[shift:] * taps[: 12 - shift]).sum())
        assert abs(overlap - (shift == 0)) < 1e-12
    signs, n = torch.tensor([1.0, -1.0] * 6), torch.arange(12.0, dtype=torch.float64) / 12
    for power in range(6):
        assert abs(float((signs * taps * n**power).sum())) < 1e-10


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ({"shift_x": 0.75}, lambda u, v: (u - 3, v)),  # to the right by 0.75 * 32 / 8
        ({"shift_y": -0.5}, lambda u, v: (u, v + 2)),
        ({"rotation": math.pi / 2}, lambda u, v: (-v, u)),
        ({"rotation": math.pi / 2, "shift_x": 1.0}, lambda u, v: (-v, u - 4)),
        ({"scale": 2.0}, lambda u, v: (u / 2**0.4, v / 2**0.4)),
        ({"stretch": 1.0}, lambda u, v: (u / 2**0.2, v * 2**0.2)),
        ({"stretch": 1.0, "axis": math.pi / 4}, stretched_diagonally),
    ],
)
def test_transformations_of_a_smooth_image(values, source) -> None:
    """Each pixel shows what was at its source, up to the phase of the filter and interpolation."""
    x, expected = blob(), blob(source)
    seen = augmentation._transformed(x, parameters(**values))
    inner = (..., slice(6, 26), slice(6, 26))
    assert float((expected - x)[inner].abs().max()) > 0.1
    torch.testing.assert_close(seen[inner], expected[inner], atol=0.02, rtol=0)


def test_a_tiny_transformation_changes_nothing() -> None:
    """The filters are an exact pair: even white noise comes back."""
    x = torch.randn(1, 3, 9, 14, generator=seeded(), dtype=torch.float64)
    seen = augmentation._transformed(x, parameters(scale=1e-9))
    torch.testing.assert_close(seen, x, atol=1e-7, rtol=0)


def test_flips_are_exact_and_known() -> None:
    x = torch.rand(64, 1, 4, 6, generator=seeded())
    seen, labels = EDMAugmentation(0.0)(x, seeded(1))
    flipped = labels[:, 0] == 1
    assert 20 < flipped.sum() < 44
    assert torch.equal(seen[flipped], x[flipped].flip(3))
    assert torch.equal(seen[~flipped], x[~flipped])
    assert not labels[:, 1:].any()
    turned = augmentation._transformed(x[:1], parameters(y_flip=1.0))
    assert torch.equal(turned, x[:1].flip(2))


def test_images_with_labels_zero_are_unchanged_and_only_they() -> None:
    x = torch.rand(200, 1, 8, 8, generator=seeded())
    seen, labels = EDMAugmentation(0.3)(x, seeded(1))
    same = (seen == x).flatten(1).all(dim=1)
    assert torch.equal(same, (labels == 0).all(dim=1))
    assert 5 < same.sum() < 60  # a share 0.5 (1 - 0.15) 0.7**4 = 0.10


def test_laws_of_the_parameters() -> None:
    n, probability = 20_000, 0.3
    drawn = augmentation._draw(n, probability, seeded(2))

    def near(count: torch.Tensor, share: float) -> None:
        assert abs(float(count) - n * share) < 4 * math.sqrt(n * share * (1 - share))

    near(drawn.x_flip.sum(), 0.5)
    near(drawn.y_flip.sum(), probability / 2)
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        values = getattr(drawn, name)
        near((values != 0).sum(), probability)
        assert stats.kstest(values[values != 0].numpy(), "norm").pvalue > 1e-3, name
    assert torch.equal(drawn.shift_x != 0, drawn.shift_y != 0)
    for name, share in (("rotation", probability), ("axis", 0.5)):
        values = getattr(drawn, name)
        near((values != 0).sum(), share)
        uniform = stats.uniform(-math.pi, 2 * math.pi)
        assert stats.kstest(values[values != 0].numpy(), uniform.cdf).pvalue > 1e-3, name
    # Independent of each other.
    applied = torch.stack([getattr(drawn, name) != 0 for name in NAMES[2:7]]).double()
    off = torch.corrcoef(applied) - torch.eye(5, dtype=torch.float64)
    assert float(off.abs().max()) < 4 / math.sqrt(n)


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, whole = torch.rand(6, 2, 8, 8, generator=seeded()), EDMAugmentation(0.5)
    seen, labels = whole(x, [seeded(i) for i in range(6)])
    for i in (0, 3, 5):
        one, label = whole(x[i : i + 1], [seeded(i)])
        torch.testing.assert_close(one[0], seen[i], atol=1e-6, rtol=0)
        assert torch.equal(label[0], labels[i])


def test_autocast_does_not_round_the_images() -> None:
    x = torch.rand(16, 1, 8, 8, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen, _ = EDMAugmentation(1.0)(x, seeded(1))
    assert torch.equal(seen, EDMAugmentation(1.0)(x, seeded(1))[0])
    half, _ = EDMAugmentation(1.0)(x.bfloat16(), seeded(1))
    torch.testing.assert_close(half.float(), seen, atol=0.02, rtol=0)


def test_networks_of_edm_take_the_labels() -> None:
    sizes = {"width": 8, "multipliers": (1,), "blocks": 1}
    network = DDPMpp.edm_cifar10(**sizes, attention_levels=())
    x, labels = EDMAugmentation()(torch.rand(4, 3, 8, 8), seeded())
    assert network(x, torch.zeros(4), condition=labels).shape == x.shape


def test_what_is_no_image_is_refused() -> None:
    augment = EDMAugmentation()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, C, H, W\).*got \(2, 3\)"):
        augment(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="floating-point"):
        augment(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"probability: expected a number in \[0, 1\], got 1.5"):
        EDMAugmentation(1.5)
