"""Kept statistics: the files of pytorch-fid and EDM, and refusals."""

import numpy as np
import pytest
import torch

from diffusionkit import CheckpointError
from diffusionkit.metrics import (
    FeatureMoments,
    InceptionScore,
    evaluate_samples,
    frechet_distance,
    load_statistics,
    save_statistics,
)


def rows(n=50, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moments(x):
    found = FeatureMoments()
    found.update(x)
    return found


def test_statistics_survive_a_file(tmp_path):
    path = tmp_path / "kept.npz"
    save_statistics(path, moments(rows()), features="pixels")
    kept = load_statistics(path, features="pixels")
    assert torch.allclose(kept.mean, rows().mean(0))
    assert torch.allclose(kept.covariance, rows().T.cov())
    assert (kept.count, kept.features) == (50, "pixels")
    other = 2 * rows() + 1
    assert frechet_distance(kept, other) == frechet_distance(rows(), other)
    quality = evaluate_samples(kept, other, logits=torch.eye(50))
    assert quality.frechet == frechet_distance(rows(), other)
    assert quality.kernel is None
    assert quality.neighbors is None
    scores = InceptionScore()
    scores.update(logits=torch.eye(50))
    assert quality.inception_score == scores.compute()
    assert (quality.real, quality.fake) == (50, 50)
    assert "kernel" not in str(quality)
    assert quality.as_dict()["precision"] is None


def test_other_programs_read_and_write_them(tmp_path):
    path = tmp_path / "kept.npz"
    save_statistics(path, moments(rows()))
    with np.load(path) as file:
        assert file["mu"].shape == (3,)
        assert file["sigma"].shape == (3, 3)
    np.savez(path, mu=np.zeros(2, np.float32), sigma=np.eye(2))
    kept = load_statistics(path, features="inception")  # the file states none
    assert (kept.count, kept.features) == (None, None)
    assert frechet_distance(kept, (torch.ones(2), torch.eye(2))) == 2.0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"arr_0": np.zeros(3)}, "a file without mu and sigma, with arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN or infinity"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.array("pixels")},
            "statistics of other features, pixels instead of inception",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, entries, message):
    path = tmp_path / "kept.npz"
    np.savez(path, **entries)
    with pytest.raises(CheckpointError, match=f"kept.npz: expected statistics of .*{message}"):
        load_statistics(path, features="inception")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "kept.npz"
    save_statistics(path, moments(rows(200, 60)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"kept\.npz: expected statistics"):
            load_statistics(path)


def test_one_sample_has_no_covariance(tmp_path):
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        save_statistics(tmp_path / "kept.npz", moments(rows(1)))
