"""Built-in images of the training program: color patches, and which parts are held out."""

from types import SimpleNamespace

import numpy
import pytest


@pytest.fixture
def photographs(monkeypatch):
    """The red of a pixel is the number of its stripe, of 64 pixels at half the size."""
    datasets = pytest.importorskip("sklearn.datasets")
    photograph = numpy.zeros((80, 768, 3), numpy.uint8)
    photograph[:, :, 0] = numpy.arange(768) // 128
    photograph[:, :, 1:] = numpy.random.default_rng(0).integers(256, size=(80, 768, 2))
    found = SimpleNamespace(images=[photograph[:, :256], photograph])
    monkeypatch.setattr(datasets, "load_sample_images", lambda: found)


@pytest.mark.parametrize("size", [16, 32])
def test_parts_share_no_pixels(program, photographs, size):
    stripes, classes = {}, {}
    for part in ("train", "test"):
        images = program("sources").open_source("color-patches", part, size=size, channels=3)
        assert images.shape == (3, size, size)
        stripes[part] = {value for image, _ in images for value in image[0].unique().tolist()}
        classes[part] = {label for _, label in images}
    assert stripes == {"train": {0, 1, 2, 3, 5}, "test": {4}}
    assert classes == {"train": {0, 1}, "test": {1}}


def test_built_in_images_have_their_own_channels(program, photographs):
    presets = program("presets")
    settings = presets.load("color-patches", ["data.channels=1"])
    with pytest.raises(ValueError, match="expected 3 for color-patches, got 1"):
        presets.open_data(settings)


@pytest.mark.parametrize("size", [0, 65])
def test_patches_fit_into_stripes(program, size):
    pytest.importorskip("sklearn.datasets")
    with pytest.raises(ValueError, match=f"expected 1 to 64 pixels for color patches, got {size}"):
        program("color_patches").color_patches("train", size)


def test_built_in_sets_have_a_held_out_part(program):
    held_out = program("sources").held_out
    assert held_out("glyphs", None) == "glyphs"
    assert held_out("color-patches", None) == "color-patches"
    assert held_out("photographs.zip", None) is None
    assert held_out("glyphs", "others.zip") == "others.zip"
