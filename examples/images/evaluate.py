"""Evaluate a trained model: sample quality, bits per dimension, and the held-out loss.

    python examples/images/evaluate.py runs/glyphs --samples samples.zip --data glyphs
    torchrun --standalone --nproc-per-node 8 examples/images/evaluate.py runs/cifar10 \
        --data train/ --held-out test/ --likelihood bound exact

The samples are compared with --data, or with saved statistics. The loss and the bits per dimension
are those of --held-out: by default the test set of a built-in data set. The processes share the
work, and any number of processes prints the same digits.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import presets
import torch
from launch import launched
from sources import HELP as SOURCES
from sources import held_out as held_out_source
from sources import one_line_errors, open_source
from torch import Tensor
from torch.utils.data import Subset

import diffusionkit as dk
from diffusionkit import metrics
from diffusionkit.likelihood import BitsPerDim
from diffusionkit.sde import Chain
from diffusionkit.training import CheckpointFolder

GLYPH_FEATURES = f"{Path(__file__).with_name('glyph_features.py')}:glyph_features"
HELP = {
    "bound": "the variational bound (discrete for chains), under the dequantization of the preset",
    "exact": "by the probability flow, up to the dequantization; slow",
    "discrete": "the bound without dequantization, for processes with little noise at t_min",
}


def checkpoint(path: Path) -> Path:
    """Return a checkpoint, the newest of a run's folder."""
    if not path.is_dir():
        return path
    newest = CheckpointFolder(path / "checkpoints").newest()
    if newest is None:
        raise FileNotFoundError(f"run: expected checkpoints in {path}, got none")
    return newest


def quality(options: argparse.Namespace, settings: dict[str, Any], about: dict[str, Any]) -> Any:
    """Return the metrics of the samples against the data or saved statistics."""
    extractor = metrics.features(options.features)
    if isinstance(extractor, torch.nn.Module):
        extractor.to(about["device"])
    channels = getattr(extractor, "channels", None) or settings["channels"]
    found: list[Any] = []
    logits = None
    for name in (options.data, options.samples):
        if name == options.data and options.statistics is not None:
            found.append(metrics.load_statistics(options.statistics, features=options.features))
            continue
        data = open_source(
            name, "train", size=settings["size"], channels=channels, labels=settings["labels"]
        )
        features = metrics.gather_features(data, extractor, **about)
        features, logits = features if isinstance(features, tuple) else (features, None)
        found.append(features)
    return metrics.evaluate_samples(*found, k=options.k, logits=logits, splits=options.splits)


def likelihoods(
    run: presets.Run, data: Any, cond: dict[str, Tensor], options: argparse.Namespace, about: Any
) -> dict[str, BitsPerDim]:
    """Return bits per dimension of held-out images."""
    model, (low, high) = run.model, run.settings["data"]["range"]
    levels: Any = run.parts.dequantizer
    if levels is None:
        levels = dk.UniformDequantizer(256, low, high)
    levels.to(about["device"]).eval()
    discrete = isinstance(model.sde, Chain)
    found = {}
    for name in options.likelihood:
        given: Any = {"seed": options.seed, "draws": options.draws, "cond": cond, **about}
        if discrete and name == "bound":
            likelihood: Any = dk.ChainNELBO(model, dk.GaussianDecoder(256, low, high))
        elif name == "discrete":
            likelihood = dk.DiscreteNELBO(model, dk.LevelDecoder(256, low, high))
        elif discrete:
            raise ValueError(f"--likelihood: expected bound for a chain, got {name}")
        else:
            kind = dk.NELBO if name == "bound" else dk.ODELikelihood
            likelihood, given["dequantizer"] = kind(model), levels
        found[name] = dk.evaluate_bits_per_dim(likelihood, data, **given)
    return found


def held_out(
    run: presets.Run, data: Any, cond: dict[str, Tensor], options: argparse.Namespace, about: Any
) -> Any:
    """Return the loss of the denoising target, whatever the target of training was."""
    low, high = run.settings["data"]["range"]
    objective: Any = run.parts.objective
    if isinstance(objective, dk.ScoreMatching):
        times = objective.times
        if isinstance(times, (dk.StratifiedTimes, dk.LossSecondMomentTimes)):
            chain = isinstance(run.model.sde, Chain)
            times = dk.DiscreteTimes() if chain else dk.UniformTimes()
        objective = dk.ScoreMatching(objective.weighting, times=times)
    if run.parts.augmentation is not None:
        cond = cond | {"condition": torch.zeros(len(data), 9)}
    return dk.held_out_loss(
        objective, run.model, data, transform=lambda x: low + x.float() * ((high - low) / 255),
        cond=cond, seed=options.seed, draws=options.draws, **about,
    )  # fmt: skip


def evaluate(options: argparse.Namespace, place: Any) -> dict[str, Any]:
    """Return all requested results, as plain values."""
    device = place.device
    if options.device is not None:
        try:
            device = torch.empty(0, device=options.device).device
        except (AssertionError, RuntimeError) as error:  # of torch, in many lines
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device: expected a device of torch that is here, got "
                             f"{options.device!r}: {reason}") from error  # fmt: skip
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected a number >= 1, got {options.limit}")
    path = checkpoint(options.run)
    run = presets.restore(path, device)
    settings = run.settings["data"]
    about = {"batch_size": options.batch_size, "device": device, "progress": not options.quiet}
    results: dict[str, Any] = {"checkpoint": str(path), "step": run.step, "seed": options.seed}
    source = held_out_source(options.data, options.held_out)
    if source is not None:
        data: Any = open_source(
            source, "test", size=settings["size"], channels=settings["channels"],
            labels=settings["labels"],
        )  # fmt: skip
        labels = data.class_labels
        index = list(range(len(data)))[: options.limit]
        cond = {}
        if settings["classes"]:
            if labels is None or int(labels.max()) >= settings["classes"]:
                got = "none" if labels is None else str(int(labels.max()) + 1)
                raise ValueError(f"--held-out: expected images of {settings['classes']} classes, "
                                 f"as the model has, got {got} in {source}")  # fmt: skip
            cond["class_labels"] = labels[index]
        data = Subset(data, index)
        loss = held_out(run, data, cond, options, about)
        results["held_out_loss"] = {"mean": loss.mean, "stderr": loss.stderr, "images": len(data)}
        if run.parts.augmentation is not None and options.likelihood:
            raise ValueError("--likelihood: expected none for a model trained with augmentation")
        for name, bits in likelihoods(run, data, cond, options, about).items():
            results[f"bits_per_dim_{name}"] = {"mean": bits.mean, "stderr": bits.stderr,
                                               "images": len(data)}  # fmt: skip
    if options.samples is not None:
        results["features"] = options.features
        results |= quality(options, settings, about).as_dict()
    return results


def table(results: dict[str, Any]) -> str:
    """Return results in lines."""
    lines = []
    for name, value in results.items():
        if isinstance(value, dict):
            first, *rest = [x for key, x in value.items() if key != "images" and x is not None]
            value = f"{first:.5f}" + "".join(f" +- {x:.5f}" for x in rest)
        elif isinstance(value, float):
            value = f"{value:.5f}"
        if value is not None:
            lines.append(f"{name.replace('_', ' '):<24}{value}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="a folder of train.py, or a checkpoint")
    add("--data", help=f"the real images: {SOURCES}")
    add("--samples", help="the generated images: a folder, zip or .npz, as sample.py writes them")
    add("--statistics", help="saved statistics of the real images, instead of --data (.npz)")
    add("--held-out", help="images that were not trained on; by default the test part of a "
        "built-in set")  # fmt: skip
    add("--features", help="see python -m diffusionkit.metrics --help; by default glyph features "
        "for glyphs, else inception")  # fmt: skip
    add("--likelihood", nargs="*", default=["bound"], choices=list(HELP), metavar="KIND",
        help="; ".join(f"{name}: {text}" for name, text in HELP.items()))  # fmt: skip
    add("--limit", type=int, help="how many held-out images are used, all by default")
    add("--draws", type=int, default=1, help="times, noises and dequantizations of each image")
    add("--k", type=int, default=3, help="the neighbor for precision and recall")
    add("--splits", type=int, default=10, help="the splits for the Inception score")
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--device")
    add("--out", type=Path, help="the JSON file of the results, by default in the run's folder")
    add("--quiet", action="store_true", help="hide progress bars")
    options = parser.parse_args(arguments)
    if options.samples is not None and options.data is None and options.statistics is None:
        parser.error("--samples: expected --data or --statistics to compare them with, got neither")
    if options.features is None:
        options.features = GLYPH_FEATURES if options.data == "glyphs" else "inception"
    with launched() as place:
        with one_line_errors("evaluate.py"):
            results = evaluate(options, place)
        if place.first:
            folder = options.run if options.run.is_dir() else options.run.parent
            out = options.out or folder / f"evaluation-{results['step']:08d}.json"
            print(table(results))  # even if the file cannot be written
            with one_line_errors("evaluate.py"):
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"-> {out}")


if __name__ == "__main__":
    main()
