"""The example of classes and guidance without a classifier."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionkit import DDPMChain, X0Model

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("conditional_digits")
    for name in ("conditional_digits", "digits", "helpers"):  # other tests must not find them
        sys.modules.pop(name, None)


def test_run(example, tmp_path, capsys):
    picture = tmp_path / "somewhere" / "picture.png"
    argv = ["--train-steps", "2", "--samples", "60", "--steps", "2", "--scales", "0", "1.5"]
    example.main([*argv, "--output", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r"(0|1\.5|training) +\d+\.\d%", line)]
    assert [row[0] for row in rows] == ["0", "1.5", "training"]
    numbers = [[float(cell.rstrip("%")) for cell in row[1:]] for row in rows]
    asked, energy, precision, recall, near = numbers[-1]
    assert asked > 95
    assert energy < min(row[1] for row in numbers[:-1])
    assert precision > 80
    assert recall > 60
    assert near == 100
    assert [file.name for file in picture.parent.iterdir()] == [picture.name]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000


def test_guidance_goes_away_from_no_label(example):
    def network(x, label, class_labels):
        # Knows a grey for every label, and white for none.
        grey = torch.where(class_labels == example.NULL, 0.5, class_labels / 20)
        return torch.cat([torch.zeros_like(x) + grey.view(-1, 1, 1, 1), torch.zeros_like(x)], 1)

    model = X0Model(network, DDPMChain.cosine(1000), variance="learned_range")
    class_labels = torch.tensor([2, 8])
    for scale, greys in ((0.0, (0.5, 0.5)), (1.0, (0.1, 0.4)), (2.0, (-0.3, 0.3))):
        drawn = example.draw(model, scale, class_labels, 5, seed=0)
        expected = [round((grey + 1) * 8) for grey in greys]
        assert np.array_equal(drawn, np.repeat(np.array(expected)[:, None], 64, 1))


def test_labels_are_left_out_in_training(example, monkeypatch):
    seen = []

    class Recorder(example.ADMUNet):
        def forward(self, x, label, class_labels=None, **cond):
            seen.append(class_labels)
            return super().forward(x, label, class_labels, **cond)

    monkeypatch.setattr(example, "ADMUNet", Recorder)
    monkeypatch.setattr(example, "DROPPED", 0.5)
    data = example.load()
    example.train(data, 4, seed=0)
    class_labels = torch.cat(seen)
    assert 0.35 < float((class_labels == example.NULL).double().mean()) < 0.65
    assert class_labels.unique().tolist() == list(range(11))


def test_as_asked(example):
    data = example.load()
    quality, samples = example.Quality(data), example.pixels(data.train)
    assert example.as_asked(quality, samples, data.class_labels) > 0.95
    assert example.as_asked(quality, samples, (data.class_labels + 1) % 10) < 0.05


def test_too_few_samples_for_the_picture_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.options(["--samples", "59"], None)
    assert "--samples: expected at least 60, got 59" in capsys.readouterr().err
