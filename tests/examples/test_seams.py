import pytest
import torch
from support.pictures import check_picture

from diffusionkit import VPSDE


def test_small_run(example, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "FIELD", 128)
    monkeypatch.setattr(example, "PATCH", 32)
    monkeypatch.setattr(example, "LENGTH", 4.0)
    monkeypatch.setattr(example, "STEPS", 20)
    path = tmp_path / "table.md"
    example.main(["--overlaps", "8", "--output", str(picture), "--table", str(path)])
    check_picture(picture)
    rows = {}
    for line in path.read_text().splitlines()[2:]:
        name, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = [float(number) for number in numbers]
    assert path.read_text().splitlines()[0] in capsys.readouterr().out
    cost, worst, median, *powers = rows["the whole field"]
    assert cost == 1
    assert worst == median == pytest.approx(1, abs=0.06)
    assert powers == pytest.approx([1] * 4, abs=0.01)
    assert rows["0, side by side"][1] > 10
    assert rows["8, cosine, margin"][1] < rows["8, cosine"][1] < rows["8, uniform"][1]
    assert rows["8, cosine, margin"][0] == 1.5


def test_exact_model(example):
    at = torch.arange(6, dtype=torch.float64)
    matrix = example.covariance(at[:, None] - at)
    model = example.GaussianSeries(VPSDE(), matrix)
    x, t = torch.randn(2, 1, 6, dtype=torch.float64), torch.tensor([0.1, 0.6], dtype=torch.float64)
    alpha, sigma = model.sde.marginal(t)
    for k in range(2):
        spread = alpha[k] ** 2 * matrix + sigma[k] ** 2 * torch.eye(6, dtype=torch.float64)
        expected = torch.linalg.solve(spread, -x[k, 0])  # the score
        assert torch.allclose(model(x, t)[k, 0], expected)
