import re

import pytest
import torch
from support.pictures import check_picture


def test_small_run(example, picture, capsys):
    example.main(
        ["--processes", "VE", "EDM", "--seeds", "1", "--train-steps", "4", "--states", "20",
         "--pairs", "2", "--samples", "20", "--steps", "3", "--output", str(picture)]
    )  # fmt: skip
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines()]
    levels = [row for row in rows if row and re.fullmatch(r"\d+\.\d\d", row[0])]
    assert len(levels) == 14 + 14 + 8
    # At large noise the variance is inversely proportional to the number of references.
    for row in (levels[13], levels[27]):
        dsm, *stable = (float(row[i]) for i in (1, 4, 7, 10))
        for n, value in zip(example.SIZES, stable, strict=True):
            assert value == pytest.approx(dsm / n, rel=0.6)
    trained = [row for row in rows if row[:1] in (["VE"], ["EDM"])]
    assert [row[:2] for row in trained] == [
        ["VE", "DSM"], ["VE", "STF"], ["EDM", "DSM"], ["EDM", "STF"],
    ]  # fmt: skip
    assert all(0 < float(cell) < 1000 for row in trained for cell in row[2:] if cell != "±")
    check_picture(picture)


def test_both_targets_get_the_same_batches(example):
    data = torch.arange(600.0)[:, None]
    first, second = (
        [next(batches) for _ in range(12)]
        for batches in (example.endless(data, 3), example.endless(data, 3))
    )
    seen = [int(i) for x0, _ in first[:9] for i in x0]
    assert len(seen) == len(set(seen)) == 9 * 64  # an epoch without repetition
    for (x0, reference), (again, _) in zip(first, second, strict=True):
        assert torch.equal(x0, again)
        assert reference.shape == (512, 1)
        assert set(x0.flatten().tolist()) <= set(reference.flatten().tolist())


def test_training_continues_between_evaluations(example):
    data = example.load()
    found = list(example.train(data, example.PROCESSES["VP"], "STF", 8, seed=1))
    assert [step for _, step, _ in found] == [2, 4, 6, 8]
    seconds = [s for s, _, _ in found]
    assert seconds == sorted(seconds)
    weights = [next(model.parameters()).sum().item() for _, _, model in found]
    assert len(set(weights)) == 4


def test_mean_and_error(example):
    assert example.mean_and_error([1.0, 3.0], ".2f") == "2.00 ± 1.00"
    assert example.mean_and_error([1.25], ".2f") == "1.25"
