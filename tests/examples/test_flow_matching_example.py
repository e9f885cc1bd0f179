import pytest
import torch
from support.pictures import check_picture


def test_small_run(example, picture, capsys):
    example.main(
        ["--train-steps", "2", "--seeds", "1", "--samples", "40", "--output", str(picture)]
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    names = [row[0] for row in rows]
    assert names == [
        "energy", "independent", "optimal", "reflow", "digits", "VP", "EDM", "flow", "real",
    ]  # fmt: skip
    for row in rows[1:4]:
        assert all(0 <= float(cell) < 10 for cell in row[-5:])
    check_picture(picture)


def test_a_straight_flow_has_no_curvature(example):
    """The velocity (1, -2) everywhere; and one that turns, u = (x_2, -x_1)."""
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    line = example.VelocityModel(lambda x, label: torch.tensor([1.0, -2.0]) + 0 * x, example.SDE)
    assert example.straightness(line, noise) < 1e-8
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    curved = example.VelocityModel(lambda x, label: x @ turn, example.SDE)
    # On a circle of radius r: |u - chord|^2 has the mean r^2 (1 - (2 sin(1/2))^2) over an arc of 1.
    right = noise.square().sum(1).mean() * (1 - (2 * torch.tensor(0.5).sin()).square())
    assert example.straightness(curved, noise) == pytest.approx(float(right), rel=0.05)
