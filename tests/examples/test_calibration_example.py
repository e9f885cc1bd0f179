import re

import torch
from support.pictures import check_picture


def test_small_run(example, picture, capsys):
    example.main(["--train-steps", "2", "--cases", "60", "--output", str(picture)])
    output = capsys.readouterr().out
    rows = re.findall(r"^(exact|UniPC|ancestral|DDIM)(.*)$", output, re.M)
    assert len(rows) == 1 + len(example.SAMPLERS)
    exact = dict(rows)["exact"].split()
    assert min(float(p) for p in exact[:4]) > 1e-3  # also of so few cases
    check_picture(picture, picture.name)


def test_exact_samples_have_the_moments_of_the_posterior(example):
    """Of the first coordinate, by importance weights of draws from the prior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([[1.2, 1.5]]).expand(400, 2)
    drawn = example.exact(x, generator).reshape(-1, 2)
    theta, _ = example.simulate(400_000, generator)
    error = (x[0] - torch.cdist(theta, example.STATIONS)) / example.NOISE
    weights = torch.softmax(-0.5 * error.square().sum(1), 0)
    mean = weights @ theta[:, 0]
    std = (weights @ (theta[:, 0] - mean).square()).sqrt()
    assert abs(float(drawn[:, 0].mean() - mean)) < 0.02
    assert abs(float(drawn[:, 0].std() - std)) < 0.02
