import re

import torch
from support.pictures import check_picture


def test_small_run_of_the_four_tasks(example, tmp_path, capsys, monkeypatch):
    data = example.load()
    few = data._replace(train=data.train[::8], train_labels=data.train_labels[::8])
    monkeypatch.setattr(example, "load", lambda: few)
    argv = ["--train-steps", "1", "--patches", "12", "--samples", "2", "--steps", "3"]
    example.main([*argv, "--repeats", "2", "--folder", str(tmp_path / "folder")])
    output = capsys.readouterr().out
    for task in ("inpainting", "colorization", "super-resolution"):
        table = output[output.index(task) :]
        rows = re.findall(r"^(sample|mean of samples|baseline, no model) +(.*)$", table, re.M)[:3]
        off, error, energy = (float(cell) for cell in dict(rows)["sample"].split())
        assert off < 1e-5  # the measurement is kept
        assert off == 0 or task != "inpainting"
        assert 0 < error < 2
        assert energy > 0
    assert len(re.findall(r"^[0124] .*%", output, re.M)) == len(example.SCALES)
    assert re.search(r"classifies (8\d|9\d|100)\.\d%", output)
    names = {
        f"conditional_{name}.png"
        for name in ("classes", "colorization", "inpainting", "super_resolution")
    }
    for name in names:
        check_picture(tmp_path / "folder" / name, *names, "photographs.pt")


def test_constraints_impose_the_measurement_of_their_task(example):
    x, other = torch.rand(2, 5, 3, 16, 16) * 2 - 1
    for task in example.TASKS.values():
        imposed = task.constraint(x)(other, torch.ones(5), torch.zeros(5))
        torch.testing.assert_close(task.measure(imposed), task.measure(x))
        baseline = task.measure(task.baseline(x))
        torch.testing.assert_close(baseline, task.measure(x), atol=0.5, rtol=0)
        assert (imposed - x).abs().max() > 0.1  # the rest of x is not revealed
        assert task.given(x).shape == x.shape
