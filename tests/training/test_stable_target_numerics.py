"""The stable target where rounding could dominate."""

import pytest
import torch
from support import seeded
from support.noisy_data import direct, noisy
from torch.utils._python_dispatch import TorchDispatchMode

from diffusionkit import VESDE, VPSDE, Perturbed
from diffusionkit.training.stable_target import StableTarget


@pytest.mark.parametrize("d", [2, 8, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dense_points_at_low_noise(d, dtype) -> None:
    data = 1.0 + 0.004 * torch.randn(500, d, generator=seeded(), dtype=torch.float64) / d**0.5
    data = data.to(dtype)
    eps = torch.randn(50, d, generator=seeded(1), dtype=torch.float64).to(dtype)
    one = torch.ones(50, dtype=torch.float64)
    x = (data[:50].double() + 0.002 * eps.double()).to(dtype)
    sample = Perturbed(data[:50], eps, x, one, one, 0.002 * one)
    prediction, mean = StableTarget()(sample, data), direct(sample, data)
    expected = eps.double() + (data[:50].double() - mean) / 0.002
    dtype = torch.promote_types(dtype, torch.float32)
    assert prediction.eps.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9
    torch.testing.assert_close(prediction.eps.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(prediction.x0.double(), mean, rtol=rounding, atol=0)


@pytest.mark.parametrize("d", [2, 60])
@pytest.mark.parametrize("sigma", [1e-3, 1e-6])
def test_an_isolated_source_keeps_its_noise(d, sigma) -> None:
    data = torch.randn(300, d, generator=seeded())
    eps = torch.randn(20, d, generator=seeded(1))
    one = torch.ones(20)
    sample = Perturbed(data[:20], eps, data[:20] + sigma * eps, one, one, sigma * one)
    prediction = StableTarget()(sample, data)
    assert torch.equal(prediction.x0, data[:20])
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("d", [2, 60])
def test_an_added_source_is_as_good_as_one_inside(d) -> None:
    data = torch.randn(40, d, generator=seeded(), dtype=torch.float64)
    sample = VESDE().perturb(data[:1], torch.tensor([0.75], dtype=torch.float64))
    added, inside = StableTarget("added")(sample, data[1:]), StableTarget()(sample, data)
    assert float((added.x0 - data[:1]).abs().max()) > 1e-3
    torch.testing.assert_close(added.x0, inside.x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [2, 60])
def test_a_large_common_value_costs_no_digits(d) -> None:
    data = 1e5 + 0.01 * torch.randn(40, d, generator=seeded(), dtype=torch.float64) / d**0.5
    sample = VESDE(sigma_min=0.01).perturb(data[:9], torch.zeros(9, dtype=torch.float64))
    found, mean = StableTarget()(sample, data).x0 - 1e5, direct(sample, data) - 1e5
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-9)
    assert float((mean - data[:9] + 1e5).abs().max()) > 1e-4


def test_differences_keep_digits_that_products_lose() -> None:
    """Two clusters of the size of the noise, ten million times their size apart."""
    data = torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    data[::2] += 2.0**24
    one = torch.ones(40, dtype=torch.float64)
    eps = torch.randn(40, 2, generator=seeded(1), dtype=torch.float64)
    sample = Perturbed(data, eps, data + 0.5 * eps, one, one, 0.5 * one)
    prediction, near = StableTarget()(sample, data), data.clone()
    near[::2] -= 2.0**24
    for part in (slice(0, None, 2), slice(1, None, 2)):
        alone = Perturbed(near[part], *(v[part] for v in (eps, eps, one, one, 0.5 * one)))
        mean = direct(alone, near[part])
        expected = eps[part] + (near[part] - mean) / 0.5
        torch.testing.assert_close(prediction.eps[part], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("d", [2, 60])
def test_states_far_from_all_data(d) -> None:
    """At distance 1000 and noise .001, all weight is on the nearest reference."""
    data = torch.randn(50, d, generator=seeded())
    away = torch.zeros(d)
    away[0] = 1000.0
    x = data[:6] + away
    prediction = StableTarget()(noisy(data[:6], x, 1.0, 1e-3), data)
    nearest = (data[None] - x[:, None].double()).square().sum(2).argmin(1)
    assert nearest.unique().numel() == 1
    torch.testing.assert_close(prediction.x0, data[nearest], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.eps, 1e3 * (x - data[nearest]), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("d", [2, 60])
def test_without_noise_the_target_is_the_source(d) -> None:
    data = torch.randn(30, d, generator=seeded())
    sample = VPSDE().perturb(data[:5], torch.zeros(5))
    prediction = StableTarget()(sample, data)
    torch.testing.assert_close(prediction.x0, data[:5], rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.eps, sample.eps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [5, 700])
def test_blocks_do_not_change_the_target(d) -> None:
    """With several blocks of references, and classes absent from whole blocks."""
    data = torch.randn(2000, d, generator=seeded())
    classes = torch.arange(2000) // 250
    rows = torch.arange(0, 2000, 250)
    sample = VESDE().perturb(data[rows], torch.full((8,), 0.8))
    prediction = StableTarget()(
        sample, data, class_labels=classes[rows], reference_class_labels=classes
    ).x0
    for k in range(8):
        one = Perturbed(*(getattr(sample, f)[k : k + 1] for f in
                          ("x0", "eps", "x", "t", "alpha", "sigma")))  # fmt: skip
        mean = direct(one, data[classes == k])
        torch.testing.assert_close(prediction[k : k + 1], mean.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 3, 40, 41])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labelled", [False, True])
def test_sources_are_found_wherever_they_are(d, dtype, labelled) -> None:
    """Among pixels of few levels, where many rows are alike; 0 and -0 are equal."""
    levels = torch.randint(0, 3, (300, d), generator=seeded()) - 1
    data, classes = levels.to(dtype), torch.arange(300) % 2
    data[7], data[:, 0] = 0.0, torch.arange(300).to(dtype) / 2  # rows differ in pairs at least
    order = torch.randperm(300, generator=seeded(1))
    x0 = torch.where(data[:20] == 0, -data[:20], data[:20])
    options = {"class_labels": classes[:20], "reference_class_labels": classes[order]}
    options = options if labelled else {}
    sample = VESDE().perturb(x0, torch.full((20,), 0.5), generator=seeded(2))
    shuffled = StableTarget()(sample, data[order], **options)
    if labelled:
        options["reference_class_labels"] = classes
    whole = StableTarget()(sample, data, **options)
    torch.testing.assert_close(shuffled.x0, whole.x0)
    absent = data.clone()
    absent[5] += 0.25
    with pytest.raises(ValueError, match=r"1 of 20 missing, first \[5\]"):
        StableTarget()(sample, absent, **options)


class Passes(TorchDispatchMode):
    """Counts the results that have a number for every pair of a sample and a reference."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs, self.count = pairs, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = func.is_view or any(a.alias_info and not a.alias_info.is_write
                                      for a in func._schema.returns)  # fmt: skip
        if isinstance(out, torch.Tensor) and out.numel() >= self.pairs and not aliases:
            self.count += 1
        return out


@pytest.mark.parametrize(("d", "passes"), [(2, 8), (16, 36)])
def test_few_passes_over_all_pairs(d, passes) -> None:
    """Two for each dimension, one for the logits and three for the weights."""
    data = torch.randn(200, d, generator=seeded())
    sample = VESDE().perturb(data[:50].flip(0), torch.full((50,), 0.5))
    with Passes(50 * 200) as counted:
        StableTarget()(sample, data)
    assert counted.count == passes
