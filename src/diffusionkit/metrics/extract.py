"""Feature extraction with any callable or the standard Inception network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_callable, check_count, check_known, check_target_device
from .._loops import Progress, evaluation_mode, with_progress
from ..distributed.gathered import gathered_weights
from ._features import from_numpy

Features = TypeVar("Features", Tensor, tuple[Tensor, ...])


def extract_features(
    images: Tensor | Iterable[Tensor | Sequence[Any]],
    extractor: Callable[[Tensor], Features],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: Progress = True,
) -> Features:
    r"""Return the features of images, on the CPU, without gradients.

    Args:
        images: a tensor (N, \*D), split into batches, or an iterable of batches, such as a data
            loader or `load_shards`. If a batch is a tuple or list, such as images and labels, its
            first item is used; empty batches are skipped.
        extractor: maps images (B, \*D) to features (B, d) or a tuple of them, as
            `inception_features` does; NumPy arrays are accepted. A module is put in evaluation
            mode meanwhile, with all weights in each process.
        batch_size: the batch size for a tensor.
        device: the device of the batches, by default that of a module's first parameter
            or buffer.
        progress: whether to show progress, or a function that wraps the batches and shows it.

    Raises:
        ValueError: if there are no images, the features do not have one row per image, or their
            dimensions change between batches.
        TypeError: if a batch or a feature is not a tensor, or the extractor is not callable.

    >>> import torch
    >>> from diffusionkit.metrics import extract_features
    >>> images, means = torch.randn(10, 3, 8, 8), lambda x: x.mean((2, 3))
    >>> extract_features(images, means, progress=False).shape
    torch.Size([10, 3])
    """
    check_callable(extractor, "extractor")
    check_target_device(device)
    if not isinstance(images, (Tensor, Iterable)):
        got = type(images).__name__
        raise TypeError(f"images: expected a tensor or batches of tensors, got {got}")
    if isinstance(images, Tensor):
        check_known(images, "images")
        if images.ndim == 0:
            raise ValueError("images: expected shape (N, *D), got a tensor without dimensions")
    check_count(batch_size, "batch_size")
    module = extractor if isinstance(extractor, nn.Module) else None
    device = module_device(module) if device is None else device
    batches: Any = torch.split(images, batch_size) if isinstance(images, Tensor) else images
    with torch.no_grad(), ExitStack() as stack:
        if module is not None:
            # The number of batches may differ between processes.
            stack.enter_context(gathered_weights(module))
            extractor = stack.enter_context(evaluation_mode(module))
        return joined(_extracted(with_progress(batches, progress), extractor, device))


def _extracted(
    batches: Iterable[Any],
    extractor: Callable[[Tensor], Features],
    device: torch.device | str | None,
) -> Iterator[Features]:
    for item in batches:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, Tensor):
            raise TypeError(f"images: expected batches of tensors, got {type(batch).__name__}")
        if len(batch):
            yield features_of_batch(extractor, batch, device)


def module_device(module: nn.Module | None) -> torch.device | None:
    """Return the device of the first tensor of a module, None without one."""
    if module is None:
        return None
    return next((x.device for x in (*module.parameters(), *module.buffers())), None)


def features_of_batch(
    extractor: Callable[[Tensor], Features], images: Tensor, device: torch.device | str | None
) -> Features:
    """Return the features of a batch on the CPU; raise unless they have one row per image."""
    found: Any = extractor(images if device is None else images.to(device))
    single = not isinstance(found, (tuple, list))
    parts = _parts([found] if single else found, len(images))
    return cast(Features, parts[0] if single else tuple(parts))


def joined(batches: Iterable[Features]) -> Features:
    """Return the features of several batches in one tensor, or one for each item of a tuple.

    Raises:
        ValueError: if there are none, or their dimensions change.
    """
    found: list[Sequence[Tensor]] = []
    single = True
    for features in batches:
        single = isinstance(features, Tensor)
        found.append([features] if isinstance(features, Tensor) else features)
        first, last = ([part.shape[1] for part in found[i]] for i in (0, -1))
        if last != first:
            raise ValueError(
                f"extractor: expected features of {first} dimensions, as before, got {last}"
            )
    if not found:
        raise ValueError("images: expected at least one, got none")
    whole = tuple(torch.cat(column) for column in zip(*found, strict=True))
    return cast(Features, whole[0] if single else whole)


def _parts(features: Sequence[Any], n: int) -> list[Tensor]:
    """Return the features of n images on the CPU; raise unless each has shape (n, d)."""
    parts = [from_numpy(part) for part in features]
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                "extractor: expected a tensor of features (B, d) or a tuple of them, "
                f"got {type(part).__name__}"
            )
        if part.ndim != 2 or len(part) != n:
            raise ValueError(
                f"extractor: expected features ({n}, d) for {n} images, got {tuple(part.shape)}"
            )
    return [part.cpu() for part in parts]


class _Inception(nn.Module):
    channels = 3

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 2048) and logits (B, 1008)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "images: expected uint8 (B, 3, H, W) from 0 to 255 (see to_uint8; for one channel "
                f"use .repeat(1, 3, 1, 1)), got {images.dtype} {tuple(images.shape)}"
            )
        features, logits = self.network(images)
        return features, logits


def inception_features() -> nn.Module:
    """Return the network used for published FID, KID, Inception scores, precision and recall.

    It is torch-fidelity's port of the 2015 Inception network, which resizes images as the
    original does; that package downloads the weights on first use. It maps images (B, 3, H, W),
    uint8 from 0 to 255, to features (B, 2048) for the distances and for precision and recall,
    and logits (B, 1008) for `InceptionScore`.

    Raises:
        ImportError: if torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            "inception_features needs torch-fidelity: pip install 'diffusionkit-torch[inception]'; "
            "features such as 'random-network' need nothing more"
        ) from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    return _Inception(network).eval()
