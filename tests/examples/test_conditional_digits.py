import re

import numpy as np
import pytest
import torch
from support.pictures import check_picture

from diffusionkit import DDPMChain, X0Model


def test_small_run(example, picture, capsys):
    argv = ["--train-steps", "2", "--samples", "60", "--steps", "2", "--scales", "0", "1.5"]
    example.main([*argv, "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r"(0|1\.5|training) +\d+\.\d%", line)]
    assert [row[0] for row in rows] == ["0", "1.5", "training"]
    numbers = [[float(cell.rstrip("%")) for cell in row[1:]] for row in rows]
    accuracy, energy, precision, recall, near = numbers[-1]
    assert accuracy > 95
    assert energy < min(row[1] for row in numbers[:-1])
    assert precision > 80
    assert recall > 60
    assert near == 100
    check_picture(picture)


def test_guidance_extrapolates_from_the_unconditional_prediction(example):
    def network(x, noise_label, class_labels):
        # Predicts a gray level for every class, and 0.5 without one.
        gray = torch.where(class_labels == example.NULL, 0.5, class_labels / 20)
        return torch.cat([torch.zeros_like(x) + gray.view(-1, 1, 1, 1), torch.zeros_like(x)], 1)

    model = X0Model(network, DDPMChain.cosine(1000), variance="learned_range")
    class_labels = torch.tensor([2, 8])
    for scale, grays in ((0.0, (0.5, 0.5)), (1.0, (0.1, 0.4)), (2.0, (-0.3, 0.3))):
        samples = example.sample(model, scale, class_labels, 5, seed=0)
        expected = [round((gray + 1) * 8) for gray in grays]
        assert np.array_equal(samples, np.repeat(np.array(expected)[:, None], 64, 1))


def test_class_labels_are_dropped_in_training(example, monkeypatch):
    seen = []

    class Recorder(example.ADMUNet):
        def forward(self, x, noise_label, class_labels=None, **cond):
            seen.append(class_labels)
            return super().forward(x, noise_label, class_labels, **cond)

    monkeypatch.setattr(example, "ADMUNet", Recorder)
    monkeypatch.setattr(example, "DROPPED", 0.5)
    data = example.load()
    example.train(data, 4, seed=0)
    class_labels = torch.cat(seen)
    assert 0.35 < float((class_labels == example.NULL).double().mean()) < 0.65
    assert class_labels.unique().tolist() == list(range(11))


def test_accuracy_of_real_digits(example):
    data = example.load()
    quality, samples = example.Quality(data), example.pixels(data.train)
    assert example.accuracy(quality, samples, data.class_labels) > 0.95
    assert example.accuracy(quality, samples, (data.class_labels + 1) % 10) < 0.05


def test_too_few_samples_for_the_picture_are_an_error(example, capsys):
    with pytest.raises(SystemExit):
        example.options(["--samples", "59"], None)
    assert "--samples: expected at least 60, got 59" in capsys.readouterr().err
