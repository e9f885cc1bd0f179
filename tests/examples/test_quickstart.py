import re

import pytest
import torch
from support import seeded
from support.pictures import check_picture

from diffusionkit import VPSDE, EpsModel

TINY = ["--train-steps", "3", "--steps", "4"]


def numbers(output, row):
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return [float(x) for x in re.findall(r"-?\d+\.\d+", line.removeprefix(row))]


def test_small_run(example, picture, capsys):
    example.main([*TINY, "--samples", "20", "--output", str(picture)])
    check_picture(picture)
    output = capsys.readouterr().out
    assert re.search(r"training +3 steps, \d+ s", output)
    assert re.search(r"sampling +20 images, \d+ s, 9 network evaluations", output)
    share, real, gaussian = numbers(output, "confidently classified (p >= 0.9)")
    assert 0 <= share <= 100
    assert 84 < real < 94
    assert 10 < gaussian < 50
    assert len(numbers(output, "share of the rarest digit")) == 3
    closer = numbers(output, "closer to training data than test median")
    assert closer[1] == pytest.approx(50, abs=0.5)
    distance, attainable, _ = numbers(output, "energy distance to the test digits")
    assert 0 < attainable < distance
    shares = numbers(output, "class shares of the samples")
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert str(picture) in output


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve"])
def test_run_with_each_process(example, sde, picture):
    sampler = {"vp": "ancestral", "subvp": "ddim", "ve": "langevin"}[sde]
    argv = [*TINY, "--samples", "5", "--output", str(picture), "--sde", sde, "--sampler", sampler]
    example.main(argv)
    check_picture(picture)


def test_samplers(example):
    model = EpsModel(lambda x, noise_label: 0.1 * x, VPSDE())
    for name in [*example.SAMPLERS, "ode"]:
        samples = example.sample(name, model, 3, 2, seeded())
        assert samples.images.shape == (3, 1, 8, 8)
        assert samples.trajectories.shape == (len(samples.times), 3, 1, 8, 8)
        assert torch.equal(samples.trajectories[-1], samples.images)
        assert samples.times == sorted(samples.times, reverse=True)
        assert samples.nfe > 0


def test_runs_are_reproducible(example, tmp_path, capsys):
    pictures, tables = [], []
    for seed, name in ((1, "a.png"), (1, "b.png"), (2, "c.png")):
        argv = [*TINY, "--samples", "8", "--seed", str(seed), "--output", str(tmp_path / name)]
        example.main(argv)
        pictures.append((tmp_path / name).read_bytes())
        tables.append(capsys.readouterr().out.partition("real")[2].partition("picture")[0])
    assert pictures[0] == pictures[1] != pictures[2]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sde", "wave"], "invalid choice: 'wave'"),
        (["--sampler", "none"], "invalid choice: 'none'"),
        (["--steps", "0"], "expected a positive integer, got '0'"),
        (["--samples", "many"], "expected a positive integer, got 'many'"),
        (["--device", "abacus"], "expected an available torch device, got 'abacus'"),
        (["--output", "picture.txt"], "expected a .png, .pdf or .svg file, got 'picture.txt'"),
    ],
)
def test_invalid_options_are_errors(example, argv, message, capsys):
    with pytest.raises(SystemExit):
        example.main(argv)
    assert message in capsys.readouterr().err


def test_help_shows_description_and_defaults(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "Train a score model on real images" in output
    assert "training steps (default: 1200)" in output
