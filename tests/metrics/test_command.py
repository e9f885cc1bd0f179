"""python -m diffusionkit.metrics."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusionkit.metrics import evaluate_samples, features, sample_to_shards
from diffusionkit.metrics.command import main

pytest.importorskip("PIL")


def pictures(n, seed=0, size=8, channels=3):
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def write(folder, images):
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(array).save(folder / f"{i:03d}.png")
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    real = write(tmp_path / "real", pictures(12))
    fake = write(tmp_path / "fake", pictures(10, 1))
    return real, fake


def run(capsys, *arguments, status=0):
    assert main([*arguments, "--quiet"]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_two_folders_are_compared(folders, capsys):
    found = json.loads(run(capsys, *folders, "--features", "pixels", "--json"))
    pixels = features("pixels")
    expected = evaluate_samples(pixels(pictures(12)), pixels(pictures(10, 1))).as_dict()
    assert found == {"features": "pixels", **expected}
    assert found["inception_score"] is None
    table = run(capsys, *folders, "--features", "pixels")
    assert "features         pixels\nFrechet distance" in table
    assert "samples          10 generated, 12 real" in table
    assert "note: 10 images for 192 features" in table
    assert "note: the numbers of images differ" in table


def test_kept_statistics_and_other_formats(folders, tmp_path, capsys):
    real, fake = folders
    kept = str(tmp_path / "kept.npz")
    about = ("--features", "pixels")
    whole = json.loads(run(capsys, real, fake, *about, "--json", "--save-statistics", kept))
    found = json.loads(run(capsys, kept, fake, *about, "--json"))
    assert found["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-9)
    assert found["kernel_distance"] is None
    assert found["real"] == 12
    again = str(tmp_path / "again.npz")
    assert "12 images -> " in run(capsys, real, *about, "--save-statistics", again)
    np.savez(tmp_path / "fake.npz", pictures(10, 1).permute(0, 2, 3, 1).numpy())
    assert json.loads(run(capsys, real, str(tmp_path / "fake.npz"), *about, "--json")) == whole
    sample_to_shards(
        lambda n, _: (pictures(n, 1) / 255.0), 10, tmp_path / "shards",
        data_range=(0, 1), progress=False,
    )  # fmt: skip
    assert json.loads(run(capsys, real, str(tmp_path / "shards"), *about, "--json")) == whole
    error = run(capsys, kept, fake, "--features", "random-network", status=1)
    assert "statistics of other features, pixels instead of random-network" in error


def test_class_predictions_give_an_inception_score(folders, tmp_path, capsys):
    code = "def factory():\n    return lambda x: (x.float().mean((2, 3)), x.float().mean((2, 3)))\n"
    (tmp_path / "mine.py").write_text(code)
    name = f"{tmp_path / 'mine.py'}:factory"
    found = json.loads(run(capsys, *folders, "--features", name, "--splits", "2", "--json"))
    assert found["inception_score"]["mean"] > 1


def test_errors_are_one_clear_line(folders, tmp_path, capsys):
    real, fake = folders
    pixels = ("--features", "pixels")
    assert "got no such path no" in run(capsys, real, "no", *pixels, status=1)
    assert "did you mean pixels?" in run(capsys, real, fake, "--features", "pixel", status=1)
    few = write(tmp_path / "few", pictures(3))
    error = run(capsys, real, few, *pixels, status=1)
    assert error == f"error: generated: expected at least 4 images (--k 3), got 3 in {few}\n"
    large = write(tmp_path / "large", pictures(5, size=16))
    error = run(capsys, real, large, *pixels, status=1)
    assert "expected images (channels, height, width) = (3, 8, 8), as in" in error
    assert "(3, 16, 16)" in error
    run(capsys, real, large, *pixels, "--size", "8")
    (tmp_path / "fake" / "005.png").write_bytes(b"no image")
    assert "005.png" in run(capsys, real, fake, *pixels, status=1)
    assert "--save-statistics, got neither" in run(capsys, real, *pixels, status=1)


def test_help_describes_the_features(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for words in ("inception  ", "pixels  ", "random-network", "module:factory", "called FID only"):
        assert words in text


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_torchrun_prints_the_same_digits(folders, capsys, world):
    arguments = [*folders, "--features", "random-network", "--json", "--batch-size", "3"]
    expected = run(capsys, *arguments)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               "-m", "diffusionkit.metrics", *arguments, "--quiet"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.stdout == expected
