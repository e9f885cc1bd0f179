"""All sample quality metrics at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from typing_extensions import override

from .._checks import check_count
from ._features import check_pair
from .frechet import FeatureMoments, FeatureStatistics, frechet_distance
from .inception_score import InceptionScore, InceptionScoreResult
from .kernel import KernelDistance, kernel_distance
from .neighbors import PrecisionRecall, precision_recall


@dataclass(frozen=True, slots=True)
class SampleQuality:
    """Sample quality metrics.

    Args:
        frechet: the Frechet distance.
        kernel: the kernel distance and its standard error, None if only statistics are known.
        neighbors: precision, recall, density and coverage, None if only statistics are known.
        inception_score: the score and its standard deviation over splits, None without logits.
        real: the number of real samples, None if unknown.
        fake: the number of generated samples, None if unknown.
    """

    frechet: float
    kernel: KernelDistance | None
    neighbors: PrecisionRecall | None
    inception_score: InceptionScoreResult | None
    real: int | None
    fake: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics as a dictionary of numbers, for JSON and logs."""
        score = self.inception_score
        return {
            "frechet_distance": self.frechet,
            "kernel_distance": None if self.kernel is None else self.kernel._asdict(),
            **dict.fromkeys(PrecisionRecall._fields),
            **({} if self.neighbors is None else self.neighbors._asdict()),
            "inception_score": None
            if score is None
            else {"mean": score.mean, "std": None if math.isnan(score.std) else score.std},
            "real": self.real,
            "generated": self.fake,
        }

    @override
    def __str__(self) -> str:
        rows = [("Frechet distance", f"{self.frechet:.4f}")]
        if self.kernel is not None:
            value, stderr = self.kernel
            rows.append(("kernel distance", f"{value:.6f} +- {stderr:.6f}"))
        if self.neighbors is not None:
            rows += [(name, f"{value:.4f}") for name, value in self.neighbors._asdict().items()]
        if self.inception_score is not None:
            mean, std = self.inception_score
            rows.append(("Inception score", f"{mean:.4f} +- {std:.4f}"))
        fake, real = ("an unknown number" if n is None else n for n in (self.fake, self.real))
        rows.append(("samples", f"{fake} generated, {real} real"))
        return "\n".join(f"{name:<17}{value}" for name, value in rows)


Known: TypeAlias = Tensor | FeatureMoments | FeatureStatistics
_KEPT = (FeatureMoments, FeatureStatistics)


def evaluate_samples(
    real: Known, fake: Known, *, k: int = 3, logits: Tensor | None = None, splits: int = 10
) -> SampleQuality:
    """Return all sample quality metrics that the features allow.

    Args:
        real: features (m, d) of real samples, as `extract_features` or `gather_features` returns
            them. From `FeatureMoments`, or from what `load_statistics` reads, only the Frechet
            distance is computed.
        fake: features (n, d) of generated samples, or their moments or statistics.
        k: the neighbor used by `precision_recall`.
        logits: a classifier's logits (n, C) of the generated samples, for `InceptionScore`.
        splits: the number of splits for the Inception score.

    Raises:
        ValueError: if a set has fewer than k + 1 rows, there are fewer logits than splits, shapes
            do not match, or values are not finite.
        TypeError: if features or logits are not floating-point tensors.

    >>> import torch
    >>> from diffusionkit.metrics import evaluate_samples
    >>> x, y = torch.randn(2, 500, 8)
    >>> quality = evaluate_samples(x, y + 0.1)
    >>> 0 < quality.frechet < 1 and quality.neighbors.recall > 0.8
    True
    """
    check_count(k, "k")
    check_count(splits, "splits")
    pair = None
    if not isinstance(real, _KEPT) and not isinstance(fake, _KEPT):
        check_pair(real, fake, least=k + 1)
        pair = real, fake
    score = None
    if logits is not None:
        scores = InceptionScore(splits)
        scores.update(logits=logits)
        if _count(fake) not in (None, len(logits)):
            raise ValueError(f"logits: expected {_count(fake)} rows, as in fake, got {len(logits)}")
        score = scores.compute()
    return SampleQuality(
        frechet=frechet_distance(real, fake),
        kernel=None if pair is None else kernel_distance(*pair),
        neighbors=None if pair is None else precision_recall(*pair, k=k),
        inception_score=score,
        real=_count(real),
        fake=_count(fake),
    )


def _count(x: Known) -> int | None:
    return x.count if isinstance(x, (FeatureMoments, FeatureStatistics)) else len(x)
