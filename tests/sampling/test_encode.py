"""Encoding with DDIM run in reverse."""

import itertools

import pytest
import torch
from support import f64
from support.gaussian_runs import gaussian, marginal

from diffusionkit import DDIM, PCSampler
from diffusionkit.models import EpsModel
from diffusionkit.sampling.encode import ddim_encode
from diffusionkit.sde.ddpm_chain import DDPMChain
from diffusionkit.sde.smld_chain import SMLDChain


@pytest.mark.parametrize("sde", [DDPMChain.linear(1000), SMLDChain.geometric(1000)], ids=repr)
def test_encoding_finds_the_noise_that_ddim_decodes(sde) -> None:
    """On Gaussian data the flow preserves the number of standard deviations from the mean."""
    model = gaussian(sde)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    errors = []
    for steps in (100, 200, 400):
        grid = sde.time(sde.subsequence(steps)[::-1])
        (first_mean, first_std), (mean, std) = (marginal(sde, t) for t in (grid[:1], grid[-1:]))
        x = mean + std * z
        noise = ddim_encode(model, x, grid=grid)
        ideal = (noise - first_mean) / first_std
        back = PCSampler(model, DDIM(), grid=grid, denoise=False)(noise)
        errors.append((float((ideal - z).abs().max()), float((back - x).abs().max())))
    for coarse, fine in itertools.pairwise(errors):
        for before, after in zip(coarse, fine, strict=True):
            assert before / after == pytest.approx(2.0, rel=0.25)
    assert max(errors[-1]) < 0.1


def test_encoding_evaluates_the_model_as_samplers_do() -> None:
    chain, seen = DDPMChain.linear(50), []

    def network(x, noise_label, class_labels=None):
        seen.append(
            (model.training, torch.is_grad_enabled(), float(noise_label[0]), int(class_labels[0]))
        )
        return x

    model = EpsModel(network, chain, label=lambda sde, t: t)
    steps = []
    x = ddim_encode(
        model,
        torch.ones(2, 3, requires_grad=True),
        steps=2,
        class_labels=torch.tensor([3, 3]),
        progress=lambda items: steps.extend(items) or items,
    )
    assert not x.requires_grad
    assert model.training
    assert [row[:2] for row in seen] == [(False, False)] * 2
    assert [row[2] for row in seen] == pytest.approx([0.02, 0.51])
    assert seen[0][3] == 3
    assert len(steps) == 2


def test_invalid_arguments_raise() -> None:
    model = gaussian(DDPMChain.linear(50))
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"time with noise.* = 0.02, got 0"):
        ddim_encode(model, x, grid=f64(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="strictly decreasing"):
        ddim_encode(model, x, grid=f64(0.1, 0.5))
    with pytest.raises(ValueError, match="steps"):
        ddim_encode(model, x, steps=0)
    with pytest.raises(ValueError, match="x: expected finite"):
        ddim_encode(model, x / 0)
    with pytest.raises(TypeError, match="model: expected a ScoreModel"):
        ddim_encode(lambda x, t: x, x)
