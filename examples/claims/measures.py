"""What is measured on trained networks: errors by noise level, bits, and quality of samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from experiment import Lab
from glyph_features import glyph_features
from presets import Run, open_data
from torch import Tensor

import diffusionkit as dk
from diffusionkit import metrics
from diffusionkit.data import ImageData
from diffusionkit.random import seeded

SAMPLES = 3  # tells generators of samples from others of the same seed
# Edges of log-SNR intervals of a chain's bits.
EDGES = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0)


def rounded(value: float) -> float:
    """Return a number with the digits that JSON files keep: eight."""
    return float(f"{value:.8g}")


def test_images(run: Run, count: int) -> Tensor:
    """Return images (count, C, H, W) of the test part, always the same."""
    data: ImageData = open_data(run.settings, "test")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return torch.stack([data[i][0] for i in order[:count].tolist()])


def scaled(run: Run, images: Tensor) -> Tensor:
    """Return images as data of the model."""
    low, high = map(float, run.settings["data"]["range"])
    return low + images.float() * ((high - low) / 255)


def place_of(run: Run) -> torch.device:
    """Return the device of a run's model."""
    return next(run.parts.network.parameters()).device


@torch.no_grad()
def loss_by_noise(run: Run, noise: Sequence[float], count: int) -> dict[str, float]:
    r"""Return the held-out error of the data by noise level, mean over pixels.

    The noise :math:`\sigma / \alpha` and the error :math:`|\hat x_0 - x_0|^2` are those of data in
    [-1, 1], whatever the range of the model. Images and noise are the same for all models.
    """
    low, high = run.settings["data"]["range"]
    unit, images = (high - low) / 2, test_images(run, count)
    x0 = scaled(run, images)
    found: dict[str, float] = {}
    sde, place = run.model.sde, place_of(run)
    for level, ratio in enumerate(noise):
        log_snr = torch.full((count,), -2 * math.log(ratio * unit), dtype=torch.float64)
        t = sde.time_at_log_snr(log_snr)
        total = 0.0
        for index in torch.split(torch.arange(count), 64):
            generators = [seeded(0, i, level) for i in index.tolist()]
            sample = sde.perturb(x0[index], t[index], generator=generators)
            predicted = run.model.predict(sample.x.to(place), t[index].float().to(place)).x0.cpu()
            total += float((predicted - x0[index]).double().square().mean((1, 2, 3)).sum())
        found[f"{ratio:g}"] = rounded(total / count / unit**2)
    return found


def bound(run: Run, count: int, draws: int) -> dict[str, float]:
    """Return the variational bound of dequantized test images, bits per dimension."""
    model: Any = run.model
    return _bits(run, dk.NELBO(model, samples=draws), count)


def ode_bits(run: Run, count: int, tolerance: float) -> dict[str, float]:
    """Return the bits per dimension of test images by the probability flow."""
    return _bits(run, dk.ODELikelihood(run.model, rtol=tolerance, atol=tolerance), count)


def _bits(run: Run, likelihood: Any, count: int) -> dict[str, float]:
    levels: Any = run.parts.dequantizer
    levels.to(place_of(run)).eval()
    found = dk.evaluate_bits_per_dim(
        likelihood, test_images(run, count), dequantizer=levels, batch_size=64, progress=False
    )
    return {"mean": rounded(found.mean), "stderr": rounded(found.stderr)}


@torch.no_grad()
def loss_variances(run: Run, count: int, draws: int) -> dict[str, float]:
    r"""Return the mean and the variances of one image's likelihood-weighted loss.

    The variances are those over images, times and noise, for uniform times and with importance
    sampling. All are estimated from times t of importance sampling, with its weights r,

    .. math::
        E_u[\ell] = E[r \ell], \quad E_u[\ell^2] = E[r \ell^2],

    since the largest losses of uniform times are at times that they rarely draw.
    """
    sde, place = run.model.sde, place_of(run)
    times, weighting = dk.ImportanceTimes(stratified=False), dk.LikelihoodWeighting()
    images, levels = test_images(run, count), run.parts.dequantizer
    plain, sampled = [], []
    for draw in range(draws):
        for index in torch.split(torch.arange(count), 64):
            generators = [seeded(0, i, draw) for i in index.tolist()]
            x0 = levels(images[index], generator=generators).x
            drawn = [times.sample(sde, 1, generator=one, dtype=torch.float64) for one in generators]
            t, weight = (torch.cat(column) for column in zip(*drawn, strict=True))
            sample = sde.perturb(x0, t.float(), generator=generators)
            eps = run.model.predict(sample.x.to(place), t.float().to(place)).eps.cpu()
            error = (eps - sample.eps).double().square().mean((1, 2, 3))
            plain.append(weighting(sde, t) * error)
            sampled.append(weight * plain[-1])
    uniform, importance = torch.cat(plain), torch.cat(sampled)
    mean = importance.mean()
    return {
        "mean": rounded(float(mean)),
        "uniform": rounded(float((importance * uniform).mean() - mean.square())),
        "importance": rounded(float(importance.var())),
    }


def chain_bits(run: Run, count: int) -> dict[str, Any]:
    """Return the bound of a chain on test images, as `bits_by_log_snr` does."""
    low, high = run.settings["data"]["range"]
    images, model = test_images(run, count), run.model
    likelihood = dk.ChainNELBO(model, dk.GaussianDecoder(256, low, high))
    bounds = []
    for index in torch.split(torch.arange(count), 64):
        generators = [seeded(0, i) for i in index.tolist()]
        bounds.append(likelihood(images[index].to(place_of(run)), generator=generators))
    return bits_by_log_snr(bounds, model.sde, images[0].numel())


def bits_by_log_snr(bounds: list[Any], chain: dk.ForwardSDE, dims: int) -> dict[str, Any]:
    """Return the mean of bounds, bits per dimension, and how much comes from where.

    "above" a log-SNR are the bits of all steps to states with more than it, the first step's
    reconstruction included; within a step they are shared out evenly over its log-SNRs.
    """
    bits = dk.bits_per_step(bounds, dims)
    steps = len(bits.terms)
    log_snr = chain.log_snr(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    # Bits of states above each step's log-SNR, the reconstruction first; log-SNRs fall.
    above = bits.terms.cumsum(0)
    tables = {f"{edge:g}": rounded(_at(edge, log_snr, above)) for edge in EDGES}
    return {
        "total": rounded(float(bits.prior + bits.terms.sum())),
        "prior": rounded(float(bits.prior)),
        "reconstruction": rounded(float(bits.terms[0])),
        "above": tables,
        "largest log-SNR": rounded(float(log_snr[0])),
    }


def _at(edge: float, log_snr: Tensor, above: Tensor) -> float:
    """Interpolate the bits above a log-SNR, at decreasing log-SNRs."""
    place = int((log_snr > edge).sum())
    if place == 0:
        return float(above[0])
    if place == len(above):
        return float(above[-1])
    share = (log_snr[place - 1] - edge) / (log_snr[place - 1] - log_snr[place])
    return float(above[place - 1] + share * (above[place] - above[place - 1]))


class Quality:
    """The quality of samples: glyph features of samples and of all training images.

    Args:
        lab: the lab, in the folder of which samples are kept.
        name: the recipe of the run.
        seed: its seed.
        steps: the number of its training steps.
    """

    def __init__(self, lab: Lab, name: str, seed: int, steps: int) -> None:
        self.folder = lab.folder(name, seed, steps) / f"samples-{steps}"
        self._memory = lab.memory
        self._network = glyph_features()

    def features(self, images: Any) -> Tensor:
        """Return features (n, 64) of images (n, 1, H, W)."""
        found: Any = metrics.extract_features(images, self._network, batch_size=256, progress=False)
        features: Tensor = found[0]
        return features

    def real(self, run: Run) -> Tensor:
        """Return the features of all training images, in a random order, always the same."""
        if "real features" not in self._memory:
            data = open_data(run.settings)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
            images = torch.stack([data[i][0] for i in order.tolist()])
            self._memory["real features"] = self.features(images)
        real: Tensor = self._memory["real features"]
        return real

    def __call__(
        self, name: str, sampler: Callable[[Run], Callable[..., Tensor]], count: int
    ) -> Callable[[Run], dict[str, float]]:
        """Return a measure: the Fréchet distance, precision and recall of samples of a run.

        The distance is to all training images; precision and recall are to 3,000 of them.

        Args:
            name: the name of the samples, of a folder in which an interrupted call goes on.
            sampler: returns the sampler of a run, a callable (shape, generator=..., device=...).
            count: the number of samples; their seed is that of the run.
        """

        def measure(run: Run) -> dict[str, float]:
            return self._quality(run, name, sampler(run), count)

        return measure

    def _quality(
        self, run: Run, name: str, sampler: Callable[..., Tensor], count: int
    ) -> dict[str, float]:
        data, place = run.settings["data"], place_of(run)
        shape = (data["channels"], data["size"], data["size"])

        def draw(n: int, generators: list[torch.Generator]) -> Tensor:
            return sampler((n, *shape), generator=generators, device=place)

        folder = self.folder / name.replace(", ", "-").replace(" ", "_")
        metrics.sample_to_shards(
            draw, count, folder, batch_size=100, seed=1000 + run.settings["training"]["seed"],
            data_range=tuple(data["range"]), settings={"step": run.step}, progress=False,
        )  # fmt: skip
        fake = self.features(torch.cat([*metrics.load_shards(folder)]))
        real = self.real(run)
        near = metrics.precision_recall(real[:3000], fake[:3000])
        return {
            "frechet": rounded(metrics.frechet_distance(real, fake)),
            "precision": rounded(near.precision),
            "recall": rounded(near.recall),
        }

    def floors(self, run: Run) -> dict[str, float]:
        """Return the Fréchet distances of 250, 500 and 1,000 training images to all of them."""
        real = self.real(run)
        return {str(count): rounded(metrics.frechet_distance(real, real[:count]))
                for count in (250, 500, 1000)}  # fmt: skip
