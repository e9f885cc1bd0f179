"""Feature extraction with any callable, and the wrapper of the Inception network."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from diffusionkit.metrics import extract_features, inception_features

IMAGES = torch.arange(10 * 3 * 2 * 2).view(10, 3, 2, 2).float()


def means(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def test_batches_are_concatenated() -> None:
    sizes = []

    def extractor(images):
        sizes.append(len(images))
        assert not torch.is_grad_enabled()
        return means(images)

    found = extract_features(IMAGES, extractor, batch_size=4, progress=False)
    assert torch.equal(found, means(IMAGES))
    assert sizes == [4, 4, 2]
    loader = (IMAGES[start : start + 3] for start in range(0, 10, 3))
    assert torch.equal(extract_features(loader, means, progress=False), means(IMAGES))


def test_data_loaders_and_empty_batches() -> None:
    """The first item of a batch is used; labels and empty batches are ignored."""
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(10)), batch_size=4)
    assert torch.equal(extract_features(loader, means, progress=False), means(IMAGES))
    batches = [(IMAGES[:0], 1), (IMAGES[:7], 2), IMAGES[:0], IMAGES[7:]]
    assert torch.equal(extract_features(batches, means, progress=False), means(IMAGES))


def test_numpy_features() -> None:
    found = extract_features(IMAGES, lambda x: means(x).numpy(), batch_size=4, progress=False)
    assert torch.equal(found, means(IMAGES))


def test_tuples_of_features() -> None:
    found = extract_features(IMAGES, lambda x: (means(x), x.flatten(1)), batch_size=3)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], means(IMAGES))
    assert torch.equal(found[1], IMAGES.flatten(1))


def test_a_module_runs_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 2))
    shown = []
    found = extract_features(
        IMAGES, module, batch_size=5, progress=lambda batches: shown.append(batches) or batches
    )
    assert module.training
    assert not found.requires_grad
    assert torch.allclose(found, module[2](IMAGES.flatten(1)), rtol=1e-6)
    assert len(shown[0]) == 2


def test_batches_are_moved_to_the_device() -> None:
    devices = []

    def extractor(images):
        devices.append(images.device.type)
        return torch.zeros(len(images), 2)

    extract_features(IMAGES, extractor, batch_size=5, device="meta", progress=False)
    assert devices == ["meta", "meta"]


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="extractor: expected a callable, got int"):
        extract_features(IMAGES, 3)
    with pytest.raises(ValueError, match=r"features \(10, d\) for 10 images, got \(10, 3, 1"):
        extract_features(IMAGES, lambda x: x.mean((2, 3), keepdim=True))
    with pytest.raises(ValueError, match=r"features \(10, d\) .* got \(5, 3\)"):
        extract_features(IMAGES, lambda x: means(x)[::2])
    with pytest.raises(TypeError, match="batches of tensors, got list"):
        extract_features([[]], means)
    with pytest.raises(TypeError, match="batches of tensors, got dict"):
        extract_features([{"images": IMAGES}], means)
    for nothing in ([], IMAGES[:0], [IMAGES[:0]]):
        with pytest.raises(ValueError, match="images: expected at least one, got none"):
            extract_features(nothing, means)
    for wrong in ({"features": IMAGES}, ({"features": IMAGES},)):
        with pytest.raises(TypeError, match=r"features \(B, d\) or a tuple of them, got dict"):
            extract_features(IMAGES, lambda x, wrong=wrong: wrong)
    with pytest.raises(ValueError, match=r"of \[4\] dimensions, as before, got \[2\]"):
        extract_features(IMAGES, lambda x: x.flatten(1)[:, : len(x)], batch_size=4)
    with pytest.raises(ValueError, match=r"of \[3\] dimensions, as before, got \[3, 3\]"):
        extract_features(IMAGES, lambda x: (means(x),) * (1 + (len(x) == 2)), batch_size=4)
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1"):
        extract_features(IMAGES, means, batch_size=0)


def test_without_torch_fidelity(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        ImportError, match=r"pip install 'diffusionkit-torch\[inception\]'; .* 'random-network'"
    ):
        inception_features()


def test_inception_network(monkeypatch) -> None:
    """A stand-in for the package's class checks its arguments; features and logits come back."""

    class Network(nn.Module):
        def __init__(self, name: str, features_list: list[str]) -> None:
            super().__init__()
            assert features_list == ["2048", "logits_unbiased"]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert not self.training
            flat = x.float().flatten(1)
            return flat[:, :3], flat[:, 3:5]

    package = ModuleType("torch_fidelity")
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extractor, images = inception_features(), IMAGES.to(torch.uint8)
    features, logits = extract_features(images, extractor, batch_size=4, progress=False)
    assert torch.equal(features, IMAGES.flatten(1)[:, :3])
    assert torch.equal(logits, IMAGES.flatten(1)[:, 3:5])
    assert torch.equal(extractor(images)[1], logits)
    for wrong in (IMAGES, images[:, :1], images[0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
            extractor(wrong)
