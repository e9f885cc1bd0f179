import re
from functools import partial

import pytest
import torch

from diffusionkit import NELBO, ODELikelihood


def test_table_has_a_row_for_every_combination(example, tmp_path, capsys, monkeypatch):
    small = example.digits()
    small = small._replace(train=small.train[:200], test=small.test[:12])
    monkeypatch.setitem(example.DATA, "digits", lambda: small)
    monkeypatch.setattr(example, "PROCESSES", {"VP": example.PROCESSES["VP"]})
    monkeypatch.setattr(example, "NELBO", lambda model, samples: NELBO(model, samples=2))
    monkeypatch.setattr(example, "ODELikelihood", partial(ODELikelihood, rtol=1e-2, atol=1e-2))
    path = tmp_path / "folder" / "bits.md"
    example.main(["--seeds", "2", "--train-steps", "3", "--output", str(path)])
    lines = path.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| VP")]
    assert [row.split(" | ")[1:3] for row in rows] == [
        ["simple", "uniform"],
        ["LW", "uniform"],
        ["LW + IS", "uniform"],
        ["LW + IS", "variational"],
    ]
    mean = r"\d\.\d{3} ± \d\.\d{3}"
    assert all(re.search(rf"{mean} \| {mean} \|$", row) for row in rows)
    baselines = [float(re.search(r"(\d\.\d{3}) \|$", line)[1]) for line in lines[6:8]]
    assert all(2 < bits < 8 for bits in baselines)
    assert "mean ± standard error over 2 seeds" in lines[-1]
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(("name", "levels"), [("digits", 17), ("patches", 256)])
def test_training_and_test_images_are_disjoint(example, name, levels):
    images = example.DATA[name]()
    assert images.levels == levels
    assert images.train.shape[1:] == images.test.shape[1:] == (64,)
    assert int(images.train.min()) >= 0
    assert int(images.train.max()) < levels
    assert len(images.train) > 1000
    # Only patches of a flat color may occur in both.
    both = torch.cat([images.train.unique(dim=0), images.test.unique(dim=0)])
    found, counts = both.unique(dim=0, return_counts=True)
    assert all(float(image.double().std()) < 2 for image in found[counts > 1])
