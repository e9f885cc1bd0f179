"""The programs that evaluate a model of images: baselines, glyph features, evaluate.py."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_runs import arguments
from torch.distributions import MultivariateNormal

IMAGES = Path(__file__).parents[2] / "examples" / "images"


def test_densities_are_those_of_torch(program):
    baselines = program("baselines")
    generator = torch.Generator().manual_seed(0)
    points, x = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (300, 4))
    points = points * torch.tensor([1.0, 2.0, 0.5]) + 5
    gaussian = MultivariateNormal(points.mean(0), points.T.cov())
    assert torch.allclose(baselines.Gaussian(points)(x).nats, -gaussian.log_prob(x))
    kernel = MultivariateNormal(torch.zeros(3).double(), 0.49 * torch.eye(3).double())
    expected = math.log(300) - kernel.log_prob(x[:, None] - points).logsumexp(1)
    assert torch.allclose(baselines.KernelDensity(points, 0.7)(x).nats, expected)


def test_baselines_of_uniform_images_are_above_8_bits(program):
    """The entropy of the levels is 8 bits per dimension, a bound for every density."""
    shape = (2000, 1, 2, 2)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator())
    found = program("baselines").baselines(images[:1000], images[1000:], [20.0, 60.0])
    assert [*found] == ["Gaussian", "kernel density 20"]
    # The Gaussian of a uniform distribution: log2(sqrt(2 pi e / 12)) = 0.254 bits more.
    assert found["Gaussian"].mean == pytest.approx(8.254, abs=0.02)
    assert 8 < found["kernel density 20"].mean < 8.3


def test_a_run_that_is_missing_is_named(program, tmp_path):
    refused = r"evaluate\.py: .*(no checkpoint at|expected checkpoints)"
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(SystemExit, match=refused):
            program("evaluate").main([str(folder), "--quiet"])


@pytest.mark.parametrize("name", ["evaluate", "picture", "baselines", "sample", "train"])
def test_every_program_names_a_missing_folder_in_one_line(program, name, tmp_path):
    pytest.importorskip("PIL")
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out.png")
    words = {"evaluate": [nowhere], "picture": [nowhere, "--data", nowhere, "--out", out],
             "baselines": ["--data", nowhere, "--held-out", nowhere],
             "sample": [nowhere, "--count", "1", "--out", str(tmp_path / "new")],
             "train": ["--data", nowhere, "--preset", "tiny-glyphs", "--out", out]}  # fmt: skip
    with pytest.raises(SystemExit, match=rf"^{name}\.py: .*nowhere"):
        program(name).main(words[name])


def test_wrong_options_are_named_and_results_are_not_lost(program, tmp_path, capsys):
    program("train").main(arguments(tmp_path, "run", "training.steps=1"))
    squares, new = tmp_path / "squares.npz", tmp_path / "new" / "x.json"
    words = [str(tmp_path / "run"), "--held-out", str(squares), "--likelihood", "--quiet"]
    for wrong, message in (
        (["--device", "gpu"], "--device: expected a device of torch that is here, got 'gpu': "),
        (["--limit", "-1"], "--limit: expected a number >= 1, got -1"),
        (["--limit", "0"], "--limit: expected a number >= 1, got 0"),
        (["--out", str(squares / "x.json")], ".*squares.npz"),
    ):
        with pytest.raises(SystemExit, match=f"^evaluate.py: {message}"):
            program("evaluate").main([*words, *wrong])
    assert "held out loss" in capsys.readouterr().out  # of the last one
    program("evaluate").main([*words, "--out", str(new)])
    assert json.loads(new.read_text())["step"] == 1


def test_glyph_features_have_64_channels_and_16_scripts(program):
    network = program("glyph_features").glyph_features()
    images = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    features, logits = network(images)
    assert features.shape == (3, 64)
    assert logits.shape == (3, 16)
    with pytest.raises(ValueError, match=r"images: expected uint8 \(B, 1, H, W\)"):
        network(images.float())


@pytest.mark.slow
def test_glyph_features_know_scripts_and_notice_degradations(program):
    pytest.importorskip("matplotlib")
    module = program("glyph_features")
    assert module.accuracy(module.glyph_features()) > 0.5
    rows = module.check(module.glyph_features(), count=800)[1:]
    distances: dict[str, list[float]] = {}
    for kind, _, distance, *_ in rows:
        distances.setdefault(kind, []).append(float(distance))
    (none,) = distances.pop("none")
    for kind, values in distances.items():
        assert values == sorted(values), kind
        assert values[-1] > none, kind


@pytest.mark.slow
def test_evaluation_is_equal_in_all_digits_at_1_2_and_3_processes(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    small = ["training.steps=2", "network.width=8", "run.snapshot_every=100", "training.batch=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(*command):
        subprocess.run([sys.executable, *map(str, command)], check=True, timeout=500,
                       env=environment, capture_output=True)  # fmt: skip

    call(IMAGES / "train.py", "--data", "glyphs", "--preset", "tiny-glyphs", "--out", run,
         *(word for change in small for word in ("--set", change)))  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", noise[:12])
    np.savez(tmp_path / "fake.npz", noise[7:])
    found = []
    for world in (1, 2, 3):
        out = tmp_path / f"{world}.json"
        call("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
             IMAGES / "evaluate.py", run, "--data", tmp_path / "real.npz", "--samples",
             tmp_path / "fake.npz", "--held-out", "glyphs", "--limit", 10, "--batch-size", 3,
             "--likelihood", "bound", "exact", "--features", "pixels", "--out", out,
             "--quiet")  # fmt: skip
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1] == found[2]
    assert found[0]["held_out_loss"]["images"] == 10
    for name in ("bits_per_dim_bound", "bits_per_dim_exact", "kernel_distance"):
        assert len(found[0][name]) >= 2
