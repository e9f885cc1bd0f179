"""Features of the real set "glyphs": a small convolutional classifier of scripts.

    python -m diffusionkit.metrics real/ generated/ --features \
        examples/images/glyph_features.py:glyph_features

The features are the means of the last layer's 64 channels over the image, the logits those of the
16 scripts and kinds of signs. They capture shapes of signs and nothing else. Their Frechet distance
is not FID, and their Inception score shares only the formula with the published one.

The weights are in the file next to this one, so that everybody computes the same numbers. This
program trained them on the training set, in a few minutes on one core, and measures their quality:

    python examples/images/glyph_features.py --train weights.pt
    python examples/images/glyph_features.py --check
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from diffusionkit.data import ImageData, glyphs
from diffusionkit.metrics import evaluate_samples, extract_features

WEIGHTS = Path(__file__).with_name("glyph_features.pt")
SCRIPTS, SIZE = 16, 32


class GlyphNetwork(nn.Module):
    """Three stages of convolutions; means over the image are the features."""

    channels = 1

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
                       nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
                       nn.MaxPool2d(2)]  # fmt: skip
            before = width
        self.layers = nn.Sequential(*layers[:-1])
        self.classifier = nn.Linear(before, SCRIPTS)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 64) and logits (B, 16) of images (B, 1, H, W), uint8."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images: expected uint8 (B, 1, H, W), got {images.dtype} "
                             f"{tuple(images.shape)}")  # fmt: skip
        x = images.float() / 127.5 - 1
        if x.shape[2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        features = self.layers(x).mean((2, 3))
        return features, self.classifier(features)


def glyph_features() -> nn.Module:
    """Return the trained network."""
    network = GlyphNetwork()
    network.load_state_dict(
        {name: x.float() for name, x in torch.load(WEIGHTS, weights_only=True).items()}
    )
    return network.eval()


def tensors(data: ImageData) -> tuple[Tensor, Tensor]:
    """Return all images and class labels."""
    images = torch.stack([data[i][0] for i in range(len(data))])
    return images, torch.tensor([data[i][1] for i in range(len(data))])


def train(epochs: int = 4, batch_size: int = 128, limit: int | None = None) -> GlyphNetwork:
    """Train the network on the training part; equal seeds give equal weights on one machine."""
    images, labels = tensors(glyphs("train", size=SIZE))
    torch.manual_seed(0)
    network = GlyphNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images))[:limit]
        for index in torch.split(order, batch_size)[: len(images) // batch_size]:
            shifts = torch.randint(-2, 3, (2,)).tolist()
            moved = images[index].roll(shifts, (2, 3))
            loss = F.cross_entropy(network(moved)[1], labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return network.eval()


def accuracy(network: nn.Module) -> float:
    """Return the share of the test part whose script is recognized."""
    images, labels = tensors(glyphs("test", size=SIZE))
    _, logits = extract_features(images, network, batch_size=256, progress=False)
    return float((logits.argmax(1) == labels).float().mean())


def blurred(images: Tensor, amount: float) -> Tensor:
    """Return images smoothed by a Gaussian of a standard deviation in pixels."""
    x = torch.arange(-6.0, 7.0)
    kernel = torch.exp(-0.5 * (x / amount) ** 2)
    kernel = kernel / kernel.sum()
    rows = F.conv2d(images.float(), kernel.view(1, 1, 1, -1), padding=(0, 6))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1), padding=(6, 0)).round().to(torch.uint8)


def noisy(images: Tensor, amount: float) -> Tensor:
    """Return images with Gaussian noise of a standard deviation in levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + amount * noise).round().clamp(0, 255).to(torch.uint8)


def degradations(images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return degraded copies of images, each kind from little to much."""
    order = labels.bincount().argsort(descending=True)

    def without(classes: int) -> Tensor:
        return images[~torch.isin(labels, order[:classes])]

    def repeated(distinct: int) -> Tensor:
        return images[torch.arange(len(images)) % distinct]

    return {
        "blur, pixels": {f"{a:g}": blurred(images, a) for a in (0.5, 1.0, 2.0)},
        "noise, levels": {f"{a:g}": noisy(images, a) for a in (8.0, 32.0, 96.0)},
        "most frequent scripts missing": {str(n): without(n) for n in (1, 2, 4)},
        "distinct images, repeated": {str(n): repeated(n) for n in (1000, 300, 50)},
    }


def check(extractor: Callable[[Tensor], object], count: int = 3000) -> list[list[str]]:
    """Print how the metrics react to degradations of other training images."""
    images, labels = tensors(glyphs("train", size=SIZE))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    real, other = order[:count], order[count : 2 * count]

    def found(x: Tensor) -> tuple[Tensor, Tensor | None]:
        result = extract_features(x, extractor, batch_size=256, progress=False)  # type: ignore[type-var]
        return result if isinstance(result, tuple) else (result, None)

    reference = found(images[real])[0]
    rows = [["degradation", "amount", "Frechet", "precision", "recall", "score"]]
    kinds = {"none": {"": images[other]}} | degradations(images[other], labels[other])
    for kind, amounts in kinds.items():
        for amount, degraded in amounts.items():
            features, logits = found(degraded)
            quality = evaluate_samples(reference, features, logits=logits)
            values = quality.as_dict()
            score = values["inception_score"]
            numbers = [values[name] for name in ("frechet_distance", "precision", "recall")]
            shown = "" if score is None else f"{score['mean']:.2f}"
            rows.append([kind, amount, *(f"{number:.3f}" for number in numbers), shown])
    for row in rows:
        print(f"{row[0]:<31}{row[1]:>7}" + "".join(f"{cell:>11}" for cell in row[2:]))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train the network, or measure the quality of the features."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, metavar="FILE", help="train, and write the weights")
    parser.add_argument("--check", action="store_true", help="print how the metrics react")
    options = parser.parse_args(arguments)
    if options.train is not None:
        network = train()
        state = {name: x.half() if x.is_floating_point() else x
                 for name, x in network.state_dict().items()}  # fmt: skip
        torch.save(state, options.train)
    print(f"accuracy on the test part: {accuracy(glyph_features()):.3f}")
    if options.check:
        check(glyph_features())


if __name__ == "__main__":
    main()
