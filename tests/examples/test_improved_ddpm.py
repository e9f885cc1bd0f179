import re

import pytest
from support.pictures import check_picture

from diffusionkit import DDIM, EmpiricalModel, GaussianDecoder


@pytest.fixture
def small(example, monkeypatch):
    images = example.DATA["digits"]()
    images = images._replace(train=images.train[:100], test=images.test[:8])
    monkeypatch.setitem(example.DATA, "digits", lambda: images)
    return images


def test_table_has_a_row_for_every_combination(example, small, tmp_path, capsys):
    path = tmp_path / "folder" / "table.md"
    example.main(
        ["--seeds", "2", "--train-steps", "3", "--chain-steps", "30", "--samples", "6",
         "--objectives", "simple", "VLB, importance sampled", "--output", str(path)]
    )  # fmt: skip
    lines = path.read_text().splitlines()
    assert lines[0].endswith("| bits/dim | 10 steps | 25 steps | 30 steps |")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2]]
    assert [row[:3] for row in cells] == [
        [schedule, *rest]
        for schedule in ("linear", "cosine")
        for rest in (
            ["simple", "fixed_large"],
            ["simple", "fixed_small"],
            ["simple", "DDIM"],
            ["VLB, importance sampled", "learned_range"],
            ["VLB, importance sampled", "DDIM"],
        )
    ]
    for row in cells:
        assert (row[3] == "") == (row[2] == "DDIM")
        assert row[3] == "" or 2 < float(row[3].split(" ± ")[0]) < 20
        assert all(re.fullmatch(r"\d+ ± \d+", cell) for cell in row[4:-1])
        assert (row[-1] == "") == (row[2] == "DDIM")
        assert len(row) == 7
    picture = path.with_suffix(".png")
    check_picture(picture, path.name)
    assert str(picture) in capsys.readouterr().out


def test_samples_of_the_exact_model_are_close_to_the_data(example, small):
    """The exact model of the test images has an energy distance of nearly 0."""
    chain = example.CHAINS["cosine"](200)
    data = GaussianDecoder(levels=17).encode(small.test)
    found = example.energies(EmpiricalModel(chain, data), chain, DDIM(0.5), small, 400, seed=0)
    assert len(found) == 5  # 10, 25, 50, 100 and all
    assert len(example.energies(EmpiricalModel(chain, data), chain, DDIM(), small, 4, seed=0)) == 4
    assert all(energy < 0.05 for energy in found)
    assert example.energy_distance(data[:4], data) > 0.1
