"""The denoising target."""

import torch

from diffusionkit import VPSDE, DenoisingTarget


def test_the_target_is_the_data_and_noise_of_the_state() -> None:
    x0 = torch.randn(3, 2, 2)
    sample = VPSDE().perturb(x0, torch.tensor([0.1, 0.5, 0.9]))
    target = DenoisingTarget()(sample, reference=torch.randn(9, 2, 2), label=torch.arange(3))
    assert torch.equal(target.x0, x0)
    assert torch.equal(target.eps, sample.eps)
    assert torch.equal(target.x, sample.x)
    torch.testing.assert_close(target.score, -sample.eps / sample.sigma.view(3, 1, 1))
    mixed = sample.alpha.view(3, 1, 1) * target.x0 + sample.sigma.view(3, 1, 1) * target.eps
    torch.testing.assert_close(mixed, sample.x)
