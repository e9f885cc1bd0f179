"""Crops are parts of their fields, drawn uniformly, with the coordinates of their points."""

import pytest
import torch
from support import seeded

from diffusionkit import VPSDE, EpsModel, PatchedModel, ScoreMatching, random_crops
from diffusionkit.networks import PositionChannels


def fields(batch, *size):
    """Fields whose values are coordinates: of the field, and of each point along each axis."""
    axes = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    return torch.stack([torch.stack([torch.full(size, b), *axes]) for b in range(batch)]).float()


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("size", [(40,), (9, 12), (5, 6, 7)])
def test_crops_are_parts_of_their_fields(size, periodic) -> None:
    x = fields(3, *size)
    crops = random_crops(x, 4, count=5, periodic=periodic, generator=seeded())
    assert crops.x0.shape == (15, 1 + len(size), *[4] * len(size))
    for k, crop in enumerate(crops.x0):
        assert torch.equal(crop[0], torch.full_like(crop[0], k // 5))
        assert int(crops.fields[k]) == k // 5
        for axis, n in enumerate(size):
            along = crop[1 + axis].movedim(axis, 0).reshape(4, -1)[:, 0]
            expected = (int(crops.starts[k, axis]) + torch.arange(4)) % n
            assert torch.equal(along, expected.float())
            assert torch.allclose(
                crops.positions[k, axis], (2 * crop[1 + axis] + 1) / n - 1, atol=1e-6
            )


@pytest.mark.parametrize(("periodic", "places"), [(False, 5), (True, 8)])
def test_places_are_uniform(periodic, places) -> None:
    crops = random_crops(fields(1, 8), 4, count=4000, periodic=periodic, generator=seeded())
    shares = torch.bincount(crops.starts[:, 0], minlength=places) / 4000
    assert shares.shape == (places,)
    assert torch.allclose(shares, torch.full((places,), 1 / places), atol=0.025)


def test_other_fields_are_cut_at_the_same_places() -> None:
    x = fields(3, 9, 12)
    crops = random_crops(x, (4, 12), count=2, generator=seeded())
    assert torch.equal(crops.cut(x[:, :2]), crops.x0[:, :2])
    one = crops.cut(x[:1, 1:])  # one for all
    assert torch.equal(one, crops.x0[:, 1:])
    mask = torch.rand(1, 1, 9, 12, generator=seeded()) > 0.5
    assert crops.cut(mask).dtype == torch.bool
    with pytest.raises(ValueError, match=r"others: expected 3 fields .* of size \(9, 12\)"):
        crops.cut(x[:, :, 1:])
    with pytest.raises(ValueError, match=r"others: expected 3 fields"):
        crops.cut(x[:2])


def test_one_generator_for_each_field() -> None:
    x = fields(2, 50, 50)
    both = random_crops(x, 8, count=3, generator=[seeded(1), seeded(2)])
    one = random_crops(x[1:], 8, count=3, generator=[seeded(2)])
    assert torch.equal(both.starts[3:], one.starts)
    assert not torch.equal(both.starts[:3], one.starts)


def test_bytes_and_half_precision() -> None:
    x = torch.randint(256, (1, 3, 20, 20), dtype=torch.uint8)
    crops = random_crops(x, 8)
    assert (crops.x0.dtype, crops.positions.dtype) == (torch.uint8, torch.float32)
    crops = random_crops(x.half(), 8)
    assert (crops.x0.dtype, crops.positions.dtype) == (torch.float16, torch.float32)


def test_a_model_learns_the_place() -> None:
    """The data are their own coordinates: on crops, their positions alone tell them."""

    class Linear(torch.nn.Module):
        weight = torch.zeros(2)

        def forward(self, x, noise_label):
            return torch.tensordot(x, self.weight, ([1], [0]))[:, None]

    network = Linear()
    model = EpsModel(PositionChannels(network), VPSDE())
    x0 = torch.linspace(-1 + 1 / 40, 1 - 1 / 40, 40).expand(1, 1, 40)
    crops = random_crops(x0, 8, count=16, generator=seeded())
    sample = model.sde.perturb(crops.x0, torch.full((16,), 0.5), generator=seeded())
    inputs = torch.cat([sample.x, crops.positions], 1).movedim(1, -1).flatten(0, 1)
    network.weight = torch.linalg.lstsq(inputs, sample.eps.flatten()[:, None]).solution[:, 0]
    t = torch.tensor([0.5])
    x = model.sde.perturb(x0, t, generator=seeded()).x
    whole = PatchedModel(model, 8, 2, positions=True).predict(x, t).x0
    assert torch.allclose(whole, x0, atol=1e-3)
    weighted = ScoreMatching()(model, crops.x0, mask=crops.cut(1.5 + x0), positions=crops.positions)
    assert bool(weighted.isfinite().all())


@pytest.mark.parametrize(
    ("x0", "size", "options", "error", "text"),
    [
        (torch.ones(2, 3), 2, {}, ValueError, r"x0: expected fields of shape \(B, C, \*field\)"),
        ([1.0], 2, {}, TypeError, "x0: expected a tensor"),
        (torch.ones(1, 1, 8), 9, {}, ValueError, r"size: expected at most .* \(8,\), got \(9,\)"),
        (torch.ones(1, 1, 8), (4, 4), {}, ValueError, "size: expected at most that of the fields"),
        (torch.ones(1, 1, 8), 4.0, {}, TypeError, "size: expected an integer, got float"),
        (torch.ones(1, 1, 8), 4, {"count": 0}, ValueError, "count: expected an integer >= 1"),
        (torch.ones(1, 1, 8), 4, {"generator": 3}, TypeError, "generator: expected"),
    ],
)
def test_wrong_arguments(x0, size, options, error, text) -> None:
    with pytest.raises(error, match=text):
        random_crops(x0, size, **options)
