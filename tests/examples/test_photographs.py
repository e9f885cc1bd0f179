import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusionkit import GaussianDecoder


@pytest.fixture
def photograph(example, monkeypatch):
    """Replace the photographs by one with noise everywhere."""
    image = np.random.default_rng(0).integers(0, 256, (64, 640, 3), dtype=np.uint8)
    images = SimpleNamespace(images=[image])
    monkeypatch.setattr(sys.modules["photographs"], "load_sample_images", lambda: images)
    return image


def test_model_is_trained_once(example, tmp_path):
    data = example.load()
    assert len(data.train) == len(data.train_labels)
    assert len(data.test) == len(data.test_labels)
    assert {*data.test_labels.tolist()} == {0, 1}
    path = tmp_path / "folder" / "model.pt"
    first = example.trained(data.train, path, steps=1)
    written = path.stat().st_mtime_ns
    again = example.trained(data.train, path, steps=1000)  # would take an hour
    assert path.stat().st_mtime_ns == written
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_and_test_patches_share_no_pixels(example, photograph):
    photograph[..., 0] = np.arange(640) // 64  # red numbers the stripes
    train, labels, test, _ = example.load()
    assert len(labels) == len(train)
    assert train.shape == (8 * 13 * 13, 3, 16, 16)
    assert test.shape == (2 * 4 * 4, 3, 16, 16)
    GaussianDecoder().check(train)
    stripes = [((x[:, 0] + 1) * 127.5).round().unique().tolist() for x in (train, test)]
    assert stripes == [[0, 1, 2, 3, 5, 6, 7, 8], [4, 9]]


def test_flat_patches_are_dropped(example, photograph):
    photograph[32:] = 200
    assert len(example.load().test) == 2 * 2 * 4
