"""sample.py: equal bytes at any number of processes, interruptions, formats and bad input."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import run_in_two_processes

pytest.importorskip("PIL")
FOLDER = Path(__file__).parents[2] / "examples" / "images"
FAST = ["--sampler", "DDIM", "--set", "sampler.steps=2"]
TINY = ["network.width=8", "network.attention_levels=[]", "data.size=8"]


@pytest.fixture
def sample(program):
    return program("sample")


def make_run(sample, folder: Path, preset: str, *changes: str) -> Path:
    """Save what train.py would."""
    presets = sample.presets
    settings = presets.load(preset, [*TINY, *changes])
    torch.manual_seed(0)
    model = presets.build(settings).model
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    ema = presets.average(settings, model)
    path = folder / "checkpoints" / "step-00000010.pt"
    path.parent.mkdir(parents=True)
    from diffusionkit import save_checkpoint

    save_checkpoint(path, model, ema=ema, step=10, extra={"settings": settings, "data": "x"})
    return folder


@pytest.fixture
def plain(sample, tmp_path) -> Path:
    return make_run(sample, tmp_path / "plain", "tiny-glyphs")


@pytest.fixture
def classes(sample, tmp_path) -> Path:
    preset, changes = "tiny-glyphs-conditional", ("training.label_dropout=0.1", "data.classes=3")
    return make_run(sample, tmp_path / "classes", preset, *changes)


def arguments(run: Path, out: Path, *options: str) -> list[str]:
    return [str(run), "--count", "10", "--batch", "3", "--out", str(out), *FAST, *options]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_interrupted_run_goes_on(sample, plain, tmp_path, monkeypatch, capsys) -> None:
    whole, again = tmp_path / "whole.zip", tmp_path / "again.zip"
    sample.main(arguments(plain, whole))
    draw, calls = sample.Samples.draw, []

    def stopped(self, n, generators):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, n, generators)

    monkeypatch.setattr(sample.Samples, "draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample.main(arguments(plain, again))
    kept = sorted((tmp_path / "again.parts").glob("*.npy"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    sample.main(arguments(plain, again))
    assert calls == [3, 3, 3, 3, 3, 1]
    assert digest(again) == digest(whole)
    names = {"again.json", "again.png", "again.zip", "plain", "whole.json", "whole.png"}
    assert set(os.listdir(tmp_path)) == {*names, "whole.zip"}
    about = json.loads((tmp_path / "again.json").read_text())
    assert (about["count"], about["seed"], about["settings"]["step"]) == (10, 0, 10)
    # The finished one stays, and another command does not touch it.
    sample.main(arguments(plain, again))
    assert len(calls) == 6
    assert "again.zip is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"again.zip: expected .* got those of seed 0; choose"):
        sample.main(arguments(plain, again, "--seed", "1"))
    (tmp_path / "again.json").unlink()
    with pytest.raises(SystemExit, match=r"one that is no result of this program"):
        sample.main(arguments(plain, again))
    assert digest(again) == digest(whole)


def test_formats_and_classes(sample, classes, tmp_path) -> None:
    sample.main(arguments(classes, tmp_path / "a.zip"))
    sample.main(arguments(classes, tmp_path / "a.npz"))
    sample.main(arguments(classes, tmp_path / "a.npy"))
    sample.main(arguments(classes, tmp_path / "a"))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = archive.namelist()
        labels = [label for _, label in json.loads(archive.read("dataset.json"))["labels"]]
        for name in names:
            assert (tmp_path / "a" / name).read_bytes() == archive.read(name)
    assert len(names) == 11
    assert set(labels) == {0, 1, 2}
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_1"].tolist() == labels
        assert np.array_equal(file["arr_0"], np.load(tmp_path / "a.npy"))
    # The noise does not depend on the choice of classes: images of the same class are the same.
    sample.main(arguments(classes, tmp_path / "b.npz", "--class", "2"))
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert b["arr_1"].tolist() == [2] * 10
        same = (a["arr_0"] == b["arr_0"]).all((1, 2, 3))
    assert same.tolist() == [label == 2 for label in labels]


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "AdaptiveSDE", "--set", "sampler.predictor.atol=0.5", "--guidance", "2"],
        ["--sampler", '{name = "ProbabilityFlow", rtol = 0.5, atol = 0.5}'],
        ["--set", "run.precision=bfloat16", "--device-noise"],
    ],
    ids=str,
)
def test_samplers(sample, classes, tmp_path, options) -> None:
    fast = FAST if "--device-noise" in options else []
    steps = ["--set", "sampler.steps=1"] if "AdaptiveSDE" in options else []
    sample.main([str(classes), "--count", "1", "--out", str(tmp_path / "a.npy"), *fast,
                  *options, *steps])  # fmt: skip
    assert np.load(tmp_path / "a.npy").shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "3"], "--class: expected a class of the model, which has no classes, got 3"),
        (["--guidance", "2"], "--guidance: expected a model trained with training.label_dropout"),
        (["--out", "a.jpg"], "--out: expected a .zip, .npz, .npy or a folder, got a.jpg"),
        (["--set", "optimizer.lr=1"], r"--set: expected sampler\.KEY=VALUE or run\.precision"),
        (["--set", "sampler.step=1"], r"\[sampler\] PCSampler: expected one of steps, got 'step'"),
        (["--sampler", "DDIMM"], r"expected one of DDIM, got 'DDIMM'"),
        (["--sampler", "{name = "], "--sampler: expected a TOML table, got {name = "),
        (["--count", "0"], "count: expected an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_input(sample, plain, tmp_path, options, message) -> None:
    with pytest.raises(SystemExit, match=f"sample.py: .*{message}"):
        sample.main([*arguments(plain, tmp_path / "a.zip"), *options])
    assert not (tmp_path / "a.zip").exists()


def test_a_checkpoint_that_is_none(sample, tmp_path) -> None:
    (tmp_path / "empty.pt").touch()
    for name, message in (("none", "a checkpoint, or a folder"), ("empty.pt", "an empty file")):
        with pytest.raises(SystemExit, match=f"sample.py: .*{name}: expected .*{message}"):
            sample.main(arguments(tmp_path / name, tmp_path / "a.zip"))


PROGRAM = """
import json
import sys
sys.path.insert(0, {folder!r})
import sample
sample.main({arguments!r})
result = None
"""


def test_two_processes_write_the_same_bytes(sample, plain, tmp_path) -> None:
    sample.main(arguments(plain, tmp_path / "one.zip"))
    command = arguments(plain, tmp_path / "two.zip")
    run_in_two_processes(PROGRAM.format(folder=str(FOLDER), arguments=command), tmp_path)
    assert digest(tmp_path / "two.zip") == digest(tmp_path / "one.zip")


def start(processes: int, command: list[str]) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*torchrun, f"--nproc-per-node={processes}", str(FOLDER / "sample.py"), *command],
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_processes_die_and_come_back_in_another_number(sample, plain, tmp_path) -> None:
    def command(name, *options):
        steps = ["--set", "sampler.steps=40"]
        return [*arguments(plain, tmp_path / name), "--count", "40", *steps, *options]

    sample.main(command("one.zip"))
    running = start(3, command("many.zip"))
    while len(list(tmp_path.glob("many.parts/*.npy"))) < 4:
        time.sleep(0.02)
        assert running.poll() is None, "finished too soon"
    (worker,) = subprocess.run(
        ["pgrep", "-P", str(running.pid), "-n"], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(worker), 9)
    assert running.wait(120) != 0
    kept = len(list(tmp_path.glob("many.parts/*.npy")))
    assert 4 <= kept < 14
    assert not (tmp_path / "many.zip").exists()
    assert start(2, command("many.zip")).wait(120) == 0
    assert digest(tmp_path / "many.zip") == digest(tmp_path / "one.zip")
    # More processes than batches.
    assert start(3, command("few.zip", "--count", "2")).wait(120) == 0
    sample.main(command("two.zip", "--count", "2"))
    assert digest(tmp_path / "few.zip") == digest(tmp_path / "two.zip")
