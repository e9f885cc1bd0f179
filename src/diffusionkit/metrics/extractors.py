"""Feature extractors by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from .._checks import check_callable, check_known
from .extract import inception_features

Extractor: TypeAlias = Callable[[Tensor], Any]

_SIDE = 16  # of the images whose pixels are features
_FACTORIES: dict[str, Callable[[], Extractor]] = {}
_DESCRIPTIONS: dict[str, str] = {}


def register_features(
    name: str, factory: Callable[[], Extractor], *, description: str = ""
) -> None:
    """Give a feature extractor a name, for `features` and ``python -m diffusionkit.metrics``.

    Args:
        name: the name, of letters, digits, "_", "-" and ".".
        factory: returns the extractor, which maps images (B, C, H, W), uint8 from 0 to 255, to
            features (B, d), or to a pair of features and a classifier's logits (B, classes). If the
            extractor has an attribute `channels`, images are read with that many.
        description: what the features capture, for the help of the command.

    Raises:
        ValueError: if the name has other characters, or belongs to another factory.
        TypeError: if the name or the description is not a string, or the factory not callable.

    >>> import torch
    >>> from diffusionkit.metrics import features, register_features
    >>> means = lambda images: images.float().mean((2, 3))
    >>> register_features("means", lambda: means)
    >>> features("means")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
    torch.Size([2, 3])
    """
    check_callable(factory, "factory")
    for what, value in (("name", name), ("description", description)):
        if not isinstance(value, str):
            raise TypeError(f"{what}: expected a string, got {type(value).__name__}")
    if not name or not all(c.isalnum() or c in "_-." for c in name) or name.endswith(".py"):
        raise ValueError(f'name: expected letters, digits, "_", "-" and ".", got {name!r}')
    if _FACTORIES.setdefault(name, factory) is not factory:
        raise ValueError(f"name: expected one that is not taken, got {name!r}")
    _DESCRIPTIONS[name] = description


def features(name: str) -> Extractor:
    """Return the feature extractor of a name; see `register_features`.

    Built in are

    - `inception`, see `inception_features`: the only one whose Frechet distance is FID. Its weights
      are downloaded on first use.
    - `pixels`: the pixels, averaged to 16 x 16 if there are more. The Frechet distance compares
      their means and covariances, and ignores shapes.
    - `random-network`: responses of a small convolutional network with fixed random weights. It
      detects noise, blur and missing shapes, but not errors in objects: use it to compare runs on
      the same data, not for published numbers.

    Args:
        name: a registered name, or ``package.module:factory`` or ``path/to/file.py:factory``,
            which is imported and called.

    Raises:
        ValueError: if there is no such extractor or module.
        TypeError: if name is not a string, or the factory does not return a callable.
        ImportError: if the package of `inception` is missing.

    >>> import torch
    >>> from diffusionkit.metrics import features
    >>> features("pixels")(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
    torch.Size([2, 64])
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if name in _FACTORIES:
        factory = _FACTORIES[name]
    elif ":" in name:
        factory = _imported(name)
    else:
        near = difflib.get_close_matches(name, _FACTORIES, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"features: expected one of {', '.join(sorted(_FACTORIES))} or "
            f"package.module:factory, got {name!r}{hint}"
        )
    extractor = factory()
    if not callable(extractor):
        raise TypeError(
            f"features: expected a callable from the factory of {name!r}, "
            f"got {type(extractor).__name__}"
        )
    return extractor


def registered() -> dict[str, str]:
    """Return the descriptions of all registered extractors by name."""
    return {name: _DESCRIPTIONS[name] for name in sorted(_FACTORIES)}


def _imported(name: str) -> Callable[[], Extractor]:
    """Return the factory of ``package.module:factory`` or ``file.py:factory``."""
    source, _, attribute = name.rpartition(":")
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"features: expected an existing file, got {source}")
        unique = f"diffusionkit_features_{path.stem}"
        spec = importlib.util.spec_from_file_location(unique, path.resolve())
        if spec is None or spec.loader is None:
            raise ValueError(f"features: expected a Python file, got {source}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    elif source and all(part.isidentifier() for part in source.split(".")):
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"features: expected a module that can be imported, got {source}: {error}"
            ) from error
    else:
        raise ValueError(f"features: expected package.module:factory, got {name!r}")
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = difflib.get_close_matches(attribute, dir(module))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"features: expected a function of {source}, got {attribute!r}{hint}")
    found: Callable[[], Extractor] = factory
    return found


def _grey_or_rgb(images: Tensor) -> Tensor:
    """Return images (B, 1 or 3, H, W) of 0 to 255 in float32."""
    check_known(images, "images")
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            "images: expected uint8 (B, C, H, W) from 0 to 255, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    return images.float()


def _pixels(images: Tensor) -> Tensor:
    x = _grey_or_rgb(images) / 255
    height, width = images.shape[2:]
    if max(height, width) > _SIDE:
        x = F.adaptive_avg_pool2d(x, (min(height, _SIDE), min(width, _SIDE)))
    return x.flatten(1)


class _RandomNetwork(nn.Module):
    """Three stages of 3 x 3 filters, means over the image, and over its quarters in the last.

    The weights come from Python's own generator, whose numbers are the same on every machine and
    in every version.
    """

    stages = (24, 48, 72)

    def __init__(self) -> None:
        super().__init__()
        generator, sizes = random.Random(0), (3, *self.stages)
        for stage, (inward, outward) in enumerate(pairwise(sizes)):
            numbers = [generator.random() for _ in range(outward * inward * 9)]
            weight = torch.tensor(numbers, dtype=torch.float64).view(outward, inward, 3, 3) - 0.5
            weight -= weight.mean((1, 2, 3), keepdim=True)  # flat areas give no response
            weight *= (2 / weight.square().sum((1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(f"weight{stage}", weight.float())

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 360)."""
        x = _grey_or_rgb(images) / 127.5 - 1
        if x.shape[1] not in (1, 3):
            raise ValueError(f"images: expected 1 or 3 channels, got {x.shape[1]}")
        x, found = x.expand(-1, 3, -1, -1), []
        for stage in range(len(self.stages)):
            if stage and min(x.shape[2:]) > 1:
                x = F.avg_pool2d(x, 2)
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), self.get_buffer(f"weight{stage}"))
            x = x.relu()
            found.append(x.mean((2, 3)))
        found[-1] = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return torch.cat(found, 1)


register_features(
    "pixels",
    lambda: _pixels,
    description="the pixels, averaged to 16 x 16 if there are more; ignores shapes",
)
register_features(
    "random-network",
    _RandomNetwork,
    description="responses of a convolutional network with fixed random weights; compares runs on "
    "the same data, not sensitive to objects",
)
register_features(
    "inception",
    inception_features,
    description="the 2015 Inception network of published FID; needs torch-fidelity, which "
    "downloads its weights",
)
