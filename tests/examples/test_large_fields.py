import re

import pytest
import torch
from support import seeded
from support.pictures import check_picture


def test_small_run(example, picture, capsys):
    argv = ["--train-steps", "1", "--steps", "2", "--size", "112", "--output", str(picture)]
    example.main(argv)
    output = capsys.readouterr().out
    memory = float(re.search(r"112 x 112 in 3 evaluations \d+ s, peak memory (\d+) MB", output)[1])
    assert 100 < memory < 20000
    assert re.search(r"standard deviation \d+ m, of the data 90 m", output)
    assert re.search(r"variance over that elsewhere: \d+\.\d+", output)
    check_picture(picture)


def test_heights_are_less_their_average(example):
    x = example.heights()
    assert x.shape == (344, 403)
    assert abs(float(x.mean())) < 3  # meters; the average itself is not
    blocks = x[:320, :384].unfold(0, 64, 64).unfold(1, 64, 64).mean((2, 3))
    assert float(blocks.std()) < 0.3 * float(x.std())


def test_turned_images_have_eight_directions(example):
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(200, 1, 2, 2)
    found = {tuple(one.flatten().tolist()) for one in example.turned(x, seeded())}
    assert len(found) == 8


def test_seams_are_found_where_windows_end(example):
    x = torch.randn(4, 1, 208, 208, generator=seeded())
    assert example.seams(x) == pytest.approx(1, abs=0.05)
    steps = torch.zeros(208)
    steps[[48, 64, 96, 112, 144, 160]] = 30.0  # a step at each end of a window
    assert example.seams(x + steps.cumsum(0)) > 100
    steps = steps.roll(1)
    assert example.seams(x + steps.cumsum(0)) < 1


def test_spectrum_of_noise_is_flat_and_of_waves_is_not(example):
    noise = example.spectrum(torch.randn(256, 256, generator=seeded()))
    assert torch.allclose(noise / noise.mean(), torch.ones(4), atol=0.25)
    wave = torch.sin(2 * torch.pi * torch.arange(256) / 12).expand(256, 256)
    assert int(example.spectrum(wave).argmax()) == 2  # wavelengths from 8 to 16
