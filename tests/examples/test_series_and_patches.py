import math
import re

import pytest
import torch
from support import seeded
from support.pictures import check_picture


def numbers(output, row):
    return [
        [float(x) for x in re.findall(r"(\d+\.\d+)%?", line.removeprefix(row))]
        for line in output.splitlines()
        if line.startswith(row)
    ]


def test_small_run(example, picture, capsys):
    argv = ["--train-steps", "2", "--steps", "3", "--samples", "20", "--output", str(picture)]
    example.main(argv)
    output = capsys.readouterr().out
    assert "series (1, 256): training" in output
    assert "images (3, 8, 8): training" in output
    for samples, real, gaussian in numbers(output, "adjacent differences, KS statistic"):
        assert 0 < real < samples
        assert 5 < gaussian < 50
    for samples, real, _ in numbers(output, "spectra, energy distance"):
        assert 0 < real < samples
    for _, real, _ in numbers(output, "closer to training data than test median"):
        assert real == pytest.approx(50, abs=0.5)
    check_picture(picture)


def test_windows_of_a_series_and_of_an_image(example):
    series = torch.arange(9.0)[None]
    assert example.windows(series, 4, 2)[:, 0].tolist() == [
        [0, 1, 2, 3],
        [2, 3, 4, 5],
        [4, 5, 6, 7],
    ]
    image = torch.stack([torch.arange(30.0).view(5, 6), -torch.arange(30.0).view(5, 6)])
    found = example.windows(image, 3, 2)
    assert found.shape == (4, 2, 3, 3)
    for n, (y, x) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        assert torch.equal(found[n], image[:, y : y + 3, x : x + 3])


def test_every_fifth_segment_is_for_testing(example):
    records = [torch.arange(50.0)[None], torch.arange(100.0, 150.0)[None]]
    data = example.split(records, 10, 4)
    test = set(data.test.flatten().tolist())
    assert test == {*range(40, 48), *range(140, 148)}
    assert set(data.train.flatten().tolist()) == {*range(40), *range(100, 140)}
    within = data.train.flatten(1) // 10
    assert torch.equal(within.amin(1), within.amax(1))  # no window crosses segments


def test_gaussian_has_the_moments_of_the_data(example):
    generator = seeded()
    mixing = torch.tensor([[1.0, 0.0], [2.0, 0.5], [-1.0, 0.0], [0.0, 3.0]])  # of rank two
    data = (torch.rand(500, 2, generator=generator) @ mixing.T + 1.0).view(500, 1, 4)
    draws = example.gaussian(data, 200_000, generator)
    assert draws.shape == (200_000, 1, 4)
    torch.testing.assert_close(draws.mean(0), data.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(
        torch.cov(draws.flatten(1).T), torch.cov(data.flatten(1).T), rtol=0, atol=0.02
    )


def test_differences_are_along_rows_and_sorted(example):
    image = torch.tensor([[1.0, 5.0, 2.0], [100.0, 101.0, 99.0]]).view(1, 1, 2, 3)
    assert example.differences(image).tolist() == [-3, -2, 1, 4]


def test_ks_statistic(example):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert example.ks_statistic(x, x + 2) == pytest.approx(0.5)
    assert example.ks_statistic(x + 2, x) == pytest.approx(0.5)
    assert example.ks_statistic(x, torch.tensor([1.0, 1.0])) == pytest.approx(0.5)
    assert example.ks_statistic(x, x.repeat_interleave(3)) == pytest.approx(0.0)
    assert example.ks_statistic(x, x + 10) == pytest.approx(1.0)


def test_amplitudes_of_waves_do_not_depend_on_shifts(example):
    place = torch.arange(16.0)
    wave = torch.cos(2 * math.pi * 3 / 16 * place).view(1, 1, 16)
    expected = torch.zeros(1, 9, dtype=torch.float64)
    expected[0, 3] = 2.0  # sqrt(16) / 2
    for shift in (0, 5):
        found = example.amplitudes(wave.roll(shift, -1))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    slanting = torch.cos(2 * math.pi / 16 * (2 * place[:, None] + 3 * place)).view(1, 1, 16, 16)
    found = example.amplitudes(slanting).view(16, 9)
    assert found[2, 3] == pytest.approx(8.0, abs=1e-4)  # sqrt(16 * 16) / 2
    assert found.square().sum() == pytest.approx(64.0, abs=1e-3)


def test_energy_distance(example):
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    assert example.energy_distance(x, y) == pytest.approx(2 * 1 - 1 - 0)
    assert example.energy_distance(y, x + 3) == pytest.approx(2 * 3 - 0 - 1)
    assert example.energy_distance(x, x) == pytest.approx(0)


def test_distance_to_the_nearest_neighbor(example):
    data = torch.tensor([[0.0, 0.0], [10.0, 0.0]]).view(2, 1, 2)
    windows = torch.tensor([[3.0, 4.0], [10.0, -1.0]]).view(2, 1, 2)
    assert example.nearest(windows, data).tolist() == [5, 1]


def test_images_are_shown_in_framed_rows(example):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    images = torch.linspace(-1, 1, 10).view(10, 1, 1, 1) * torch.tensor([1.0, 0.5, -1.0]).view(
        3, 1, 1
    )
    images = images.expand(10, 3, 2, 4)
    example.show_images(ax, images)
    (shown,) = (torch.tensor(image.get_array()) for image in ax.images)
    assert shown.shape == (2 * 4, 8 * 6, 3)
    for n in range(10):
        row, column = divmod(n, 8)
        tile = shown[4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        inside = (images[n] / 2 + 0.5).movedim(0, -1)
        torch.testing.assert_close(tile[1:-1, 1:-1], inside)
        assert (tile[0] == 1).all()
        assert (tile[:, 0] == 1).all()
    assert (shown[4:, 12:] == 1).all()
