"""Feature extractors by name."""

import pytest
import torch
from torch.nn import functional as F

from diffusionkit.metrics import extractors, features, frechet_distance, register_features


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(extractors, "_FACTORIES", dict(extractors._FACTORIES))


def images(n=4, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_pixels_are_averaged_to_16():
    pixels = features("pixels")
    assert torch.equal(pixels(images()), images().flatten(1) / 255)
    large = images(size=32)
    expected = F.avg_pool2d(large.float() / 255, 2).flatten(1)
    assert torch.allclose(pixels(large), expected)
    assert pixels(images(channels=1, size=5)).shape == (4, 25)


def test_random_network_is_the_same_everywhere():
    network = features("random-network")
    found = network(images(size=32))
    assert found.shape == (4, 360)
    # Computed once; the weights do not depend on torch's generators.
    expected = [0.319034, 0.0717556, 0.0500305]
    assert found[0, [0, 100, 359]].tolist() == pytest.approx(expected, rel=1e-4)
    torch.manual_seed(5)
    assert torch.equal(features("random-network")(images(size=32)), found)
    grey = images(channels=1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    assert network(images(size=1)).shape == (4, 360)


def test_random_network_ignores_brightness_of_flat_images():
    network = features("random-network")
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert float(network(flat)[0, :24].abs().max()) < 1e-5


def test_random_network_grows_with_noise_and_blur():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(150, 3, 6, 6, generator=generator)
    smooth = F.interpolate(x, (24, 24), mode="bicubic").clamp(0, 1)
    network = features("random-network")

    def of(y):
        return network((y * 255).to(torch.uint8))

    real = of(smooth)
    noise = torch.randn(smooth.shape, generator=generator)
    noisy = [frechet_distance(real, of((smooth + a * noise).clamp(0, 1))) for a in (0, 0.05, 0.2)]
    blurred = [frechet_distance(real, of(F.avg_pool2d(smooth, k, 1, k // 2))) for k in (1, 3, 7)]
    for distances in (noisy, blurred):
        assert distances[0] < 0.01 < distances[1] < distances[2]


def test_names_are_registered_once():
    def factory():
        return lambda x: x.flatten(1)

    register_features("mine", factory, description="rows")
    register_features("mine", factory)
    assert features("mine")(images()).shape == (4, 192)
    with pytest.raises(ValueError, match="name: expected one that is not taken, got 'mine'"):
        register_features("mine", lambda: factory)
    with pytest.raises(ValueError, match=r'name: expected letters, digits, "_", "-" and "\."'):
        register_features("a:b", factory)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"got 'pixel'; did you mean pixels\?"):
        features("pixel")
    with pytest.raises(ValueError, match=r"expected one of .*, pixels, random-network.* or"):
        features("resnet")


def test_extractors_of_modules_and_files(tmp_path, monkeypatch):
    code = "def rows():\n    return lambda x: x.flatten(1)\n\ndef none():\n    return 3\n"
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in ("my_features", str(tmp_path / "my_features.py")):
        assert features(f"{source}:rows")(images()).shape == (4, 192)
        with pytest.raises(ValueError, match=r"got 'row'; did you mean rows\?"):
            features(f"{source}:row")
        with pytest.raises(TypeError, match="expected a callable from the factory"):
            features(f"{source}:none")
    with pytest.raises(ValueError, match=r"expected an existing file, got no\.py"):
        features("no.py:rows")
    with pytest.raises(ValueError, match=r"expected a module that can be imported, got no\.module"):
        features("no.module:rows")


def test_images_must_be_uint8():
    for name in ("pixels", "random-network"):
        with pytest.raises(ValueError, match="images: expected uint8"):
            features(name)(images().float())
    with pytest.raises(ValueError, match="expected 1 or 3 channels, got 2"):
        features("random-network")(images(channels=2))
