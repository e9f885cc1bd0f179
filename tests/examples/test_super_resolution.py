import re

import pytest
import torch
from support import seeded
from support.pictures import check_picture

from diffusionkit import DDPMChain, X0Model


def test_small_run(example, picture, capsys):
    argv = ["--train-steps", "2", "--patches", "12", "--samples", "3", "--steps", "2"]
    example.main([*argv, "--output", str(picture)])
    output = capsys.readouterr().out
    rows = dict(
        re.findall(r"^(nearest neighbor|bi\w+|one sample|mean of 3 samples) +(\d.*)$", output, re.M)
    )
    numbers = {name: [float(x) for x in re.findall(r"\d+\.\d+", row)] for name, row in rows.items()}
    assert len(numbers) == 5
    ratio, error, detail, off = numbers["bicubic"]
    assert 15 < ratio < 30
    assert 0 < error < 5
    assert detail > 0
    assert 0 < off < 20
    assert numbers["nearest neighbor"][3] == 0.0
    # The model is untrained, but a mean has a smaller error.
    assert numbers["one sample"][0] < numbers["mean of 3 samples"][0] < ratio
    check_picture(picture)


def test_samples_match_their_low_resolution_image(example):
    def network(x, noise_label, low_res):
        return torch.cat([example.enlarge(low_res, "nearest"), torch.zeros_like(x)], 1)

    model = X0Model(network, DDPMChain.cosine(1000), variance="learned_range")
    small = torch.linspace(-1, 1, 3).view(3, 1, 1, 1) * torch.ones(3, 3, 4, 4)
    samples = example.sample(model, small, 2, steps=3, seed=0)
    assert samples.shape == (3, 2, 3, 16, 16)
    expected = small[:, None, :, :1, :1].expand_as(samples)
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)


def test_shrink_and_enlarge(example):
    image = torch.arange(16.0).repeat_interleave(4).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    assert torch.equal(example.shrink(image)[0, 0, 0], torch.arange(16.0))
    small = torch.rand(2, 3, 4, 4)
    assert torch.allclose(example.shrink(example.enlarge(small, "nearest")), small)
    assert float(example.detail(example.enlarge(small, "nearest")).abs().max()) < 1e-6
    board = (torch.arange(16) % 2 * 2.0 - 1).expand(1, 3, 16, 16)  # detail only
    assert torch.equal(example.detail(board), board.flatten(1))


def test_peak_signal_to_noise_ratio(example):
    truth = torch.zeros(2, 3, 16, 16)
    off = torch.stack([truth[0] + 0.2, truth[1] + 0.02])
    # 20 log10(2 / 0.2) = 20 and 20 log10(2 / 0.02) = 40 dB
    assert example.psnr(off, truth) == pytest.approx((30.0, 10.0), abs=1e-4)


def test_spread_of_exact_samples_is_the_error_of_their_mean(example):
    generator = seeded()
    truth = torch.randn(300, 3, 16, 16, generator=generator)
    samples = torch.randn(300, 3, 3, 16, 16, generator=generator)
    expected = (1 + 1 / 3) ** 0.5
    assert float(example.spread(samples)) == pytest.approx(expected, rel=0.01)
    assert float(example.error_of_mean(samples, truth)) == pytest.approx(expected, rel=0.01)


def test_one_sample_is_an_error(example, capsys):
    with pytest.raises(SystemExit):
        example.options(["--samples", "1"])
    assert "--samples: expected at least 2" in capsys.readouterr().err
