"""Comparison of two sets of images on the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .dataset import ImageSet, gather_features, stream_features
from .extractors import Extractor, features, registered
from .frechet import FeatureMoments, FeatureStatistics
from .quality import SampleQuality, evaluate_samples
from .shards import SETTINGS, load_shards
from .statistics import is_statistics, load_statistics, save_statistics

_DESCRIPTION = """\
Compare generated images with real ones: Frechet distance, kernel distance, precision and recall,
and the Inception score if the features come with class predictions.

Each set is a folder (with or without sub-folders), a .zip, a .npz of images, a folder written by
sample_to_shards, or a .npz of saved statistics (mu and sigma, as pytorch-fid and EDM write them),
with which only the Frechet distance can be computed.

features:
"""
_EPILOG = """\
A Frechet distance is called FID only with the features "inception". Distances depend on the
features, on the number of images and on how the images were resized: compare only equal settings.

examples:
  python -m diffusionkit.metrics real/ generated.zip
  python -m diffusionkit.metrics real/ --save-statistics real.npz
  python -m diffusionkit.metrics real.npz generated/ --json
  torchrun --nproc-per-node 8 -m diffusionkit.metrics real/ generated/
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    with _process_group() as rank:
        try:
            lines = _run(options, rank)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            if rank == 0:
                sys.stderr.write(f"error: {error}\n")
            return 1
        if rank == 0:
            sys.stdout.write(lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<16}{text}" for name, text in registered().items())
    listed += "\n  module:factory, file.py:factory\n" + " " * 18 + "your own; see register_features"
    parser = argparse.ArgumentParser(
        prog="python -m diffusionkit.metrics",
        description=_DESCRIPTION + listed,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("real", help="real images, or their saved statistics")
    add("generated", nargs="?", help="generated images, or their saved statistics")
    add("--features", default="inception", metavar="NAME", help="see above (default: inception)")
    add("--save-statistics", metavar="FILE", help="save the statistics of the real images (.npz)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--size", type=int, help="resize and crop all images to this size")
    add("--channels", type=int, choices=(1, 3), help="read all images as gray or RGB")
    add("--k", type=int, default=3, help="the neighbor for precision and recall (default: 3)")
    add("--splits", type=int, default=10, help="splits for the Inception score (default: 10)")
    add("--batch-size", type=int, default=64, help="images evaluated at once (default: 64)")
    add("--workers", type=int, default=0, help="processes that read images, for each rank")
    add("--device", help="by default the GPU of this process, if there is one")
    add("--quiet", action="store_true", help="show no progress")
    return parser


def _run(options: argparse.Namespace, rank: int) -> str:
    """Return what to print."""
    if options.generated is None and options.save_statistics is None:
        raise ValueError("generated: expected images to compare, or --save-statistics, got neither")
    for name in ("real", "generated"):
        path = getattr(options, name)
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(f"{name}: expected a folder or a file, got no such path {path}")
    extractor = features(options.features)
    device = options.device or _default_device()
    if isinstance(extractor, torch.nn.Module):
        extractor = extractor.to(device)
    about = {"batch_size": options.batch_size, "workers": options.workers, "device": device}
    about["progress"] = not options.quiet
    real: Any = _opened(options.real, "real", options, extractor)
    fake: Any = None
    if options.generated is not None:
        fake = _opened(options.generated, "generated", options, extractor)
        _check_sizes(real, fake, options)
    if options.save_statistics is not None and isinstance(real, FeatureStatistics):
        raise ValueError(f"--save-statistics: expected images, got the statistics {options.real}")
    if fake is None:
        moments = FeatureMoments()
        for batch in stream_features(real, extractor, **about):
            moments.update(batch[0] if isinstance(batch, tuple) else batch)
    else:
        real, _ = _features(real, extractor, about)
        fake, logits = _features(fake, extractor, about)
        quality = evaluate_samples(real, fake, k=options.k, logits=logits, splits=options.splits)
    if options.save_statistics is not None:
        if fake is not None:
            moments = FeatureMoments()
            moments.update(real)
        if rank == 0:
            save_statistics(options.save_statistics, moments, features=options.features)
    if fake is None:
        return f"{moments.count} images -> {options.save_statistics}\n"
    if options.json:
        return json.dumps({"features": options.features, **quality.as_dict()}, indent=1) + "\n"
    return f"{'features':<17}{options.features}\n{quality}\n{_advice(quality, real, fake)}"


def _opened(
    path: str, name: str, options: argparse.Namespace, extractor: Extractor
) -> Tensor | ImageSet | FeatureStatistics:
    """Return the images or the saved statistics at a path."""
    if is_statistics(path):
        return load_statistics(path, features=options.features)
    if (Path(path) / SETTINGS).is_file():
        images: Tensor | ImageSet = torch.cat(list(load_shards(path)))
    else:
        from ..data import open_images

        channels = options.channels or getattr(extractor, "channels", None)
        images = open_images(path, size=options.size, channels=channels)
    if len(images) < options.k + 1:
        raise ValueError(
            f"{name}: expected at least {options.k + 1} images (--k {options.k}), "
            f"got {len(images)} in {path}"
        )
    return images


def _check_sizes(real: Any, fake: Any, options: argparse.Namespace) -> None:
    """Raise if real and generated images differ in shape."""
    shapes = [
        tuple(data.shape[-3:]) for data in (real, fake) if not isinstance(data, FeatureStatistics)
    ]
    if len({*shapes}) > 1:
        raise ValueError(
            f"generated: expected images (channels, height, width) = {shapes[0]}, as in "
            f"{options.real}, got {shapes[1]} in {options.generated}; see --size and --channels"
        )


def _features(data: Any, extractor: Extractor, about: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """Return the features of images and their logits, if any; saved statistics unchanged."""
    if isinstance(data, FeatureStatistics):
        return data, None
    found = gather_features(data, extractor, **about)
    return (found[0], found[1]) if isinstance(found, tuple) else (found, None)


def _advice(quality: SampleQuality, real: Any, fake: Any) -> str:
    """Return notes on the interpretation of the numbers, in lines."""
    dims = (fake.mean if isinstance(fake, FeatureStatistics) else fake[0]).numel()
    counts = [n for n in (quality.real, quality.fake) if n is not None]
    lines = ""
    if counts and min(counts) < 2 * dims:
        lines += (
            f"note: {min(counts)} images for {dims} features; so few make the Frechet distance "
            "much too large\n"
        )
    if len({*counts}) > 1:
        lines += "note: the numbers of images differ; compare only results with the same ones\n"
    return lines


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


@contextlib.contextmanager
def _process_group() -> Iterator[int]:
    """Join the processes that torchrun started, if it did; yield the rank."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    # Features are exchanged on the CPU.
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
