"""Color patches of two photographs: sizes, classes, and parts that share no pixels."""

from types import SimpleNamespace

import numpy
import pytest

from diffusionkit.data import open_images


def test_parts_share_no_pixels(program, tmp_path, monkeypatch):
    """The red of a pixel is the number of its stripe, of 64 pixels at half the size."""
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = numpy.zeros((80, 768, 3), numpy.uint8)
    photograph[:, :, 0] = numpy.arange(768) // 128
    photograph[:, :, 1:] = numpy.random.default_rng(0).integers(256, size=(80, 768, 2))
    photographs = SimpleNamespace(images=[photograph[:, :256], photograph])
    monkeypatch.setattr(datasets, "load_sample_images", lambda: photographs)
    program("color_patches").main(["--out", str(tmp_path)])
    stripes, classes = {}, {}
    for part in ("train", "test"):
        images = open_images(tmp_path / f"{part}.npz")
        assert images.shape == (3, 32, 32)
        stripes[part] = {value for image, _ in images for value in image[0].unique().tolist()}
        classes[part] = {label for _, label in images}
    assert stripes == {"train": {0, 1, 2, 3, 5}, "test": {4}}
    assert classes == {"train": {0, 1}, "test": {1}}
