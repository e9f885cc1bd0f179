"""All sample quality metrics at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from .._checks import check_count
from ._features import check_pair
from .frechet import frechet_distance
from .inception_score import InceptionScore, InceptionScoreResult
from .kernel import KernelDistance, kernel_distance
from .neighbors import PrecisionRecall, precision_recall


@dataclass(frozen=True, slots=True)
class SampleQuality:
    """Sample quality metrics; `dataclasses.asdict` returns them as a dictionary for logging.

    Args:
        frechet: the Frechet distance.
        kernel: the kernel distance and its standard error.
        neighbors: precision, recall, density and coverage.
        inception_score: the score and its standard deviation over splits, None without logits.
        real: the number of real samples.
        fake: the number of generated samples.
    """

    frechet: float
    kernel: KernelDistance
    neighbors: PrecisionRecall
    inception_score: InceptionScoreResult | None
    real: int
    fake: int

    @override
    def __str__(self) -> str:
        rows = [
            ("Frechet distance", f"{self.frechet:.4f}"),
            ("kernel distance", f"{self.kernel.value:.6f} +- {self.kernel.stderr:.6f}"),
            *((name, f"{value:.4f}") for name, value in self.neighbors._asdict().items()),
        ]
        if self.inception_score is not None:
            mean, std = self.inception_score
            rows.append(("Inception score", f"{mean:.4f} +- {std:.4f}"))
        rows.append(("samples", f"{self.fake} generated, {self.real} real"))
        return "\n".join(f"{name:<17}{value}" for name, value in rows)


def evaluate_samples(
    real: Tensor, fake: Tensor, *, k: int = 3, logits: Tensor | None = None, splits: int = 10
) -> SampleQuality:
    """Return all sample quality metrics.

    Args:
        real: features (m, d) of real samples, as returned by `extract_features`; use `all_gather`
            to combine those of several processes.
        fake: features (n, d) of generated samples.
        k: the neighbor used by `precision_recall`.
        logits: a classifier's logits (n, C) of the generated samples, for `InceptionScore`.
        splits: the number of splits for the Inception score.

    Raises:
        ValueError: if a set has fewer than k + 1 rows, there are fewer logits than splits, shapes
            do not match, or values are not finite.
        TypeError: if features or logits are not floating-point tensors.

    >>> x, y = torch.randn(2, 500, 8)
    >>> quality = evaluate_samples(x, y + 0.1)
    >>> 0 < quality.frechet < 1 and quality.neighbors.recall > 0.8
    True
    """
    check_count(k, "k")
    check_count(splits, "splits")
    check_pair(real, fake, least=k + 1)
    score = None
    if logits is not None:
        scores = InceptionScore(splits)
        scores.update(logits=logits)
        if len(logits) != len(fake):
            raise ValueError(f"logits: expected {len(fake)} rows, as in fake, got {len(logits)}")
        score = scores.compute()
    return SampleQuality(
        frechet=frechet_distance(real, fake),
        kernel=kernel_distance(real, fake),
        neighbors=precision_recall(real, fake, k=k),
        inception_score=score,
        real=len(real),
        fake=len(fake),
    )
