"""The Inception score of class predictions, from streaming sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_count, check_mapping, numbers
from .._repr import Described
from ._features import check_features, double


class InceptionScoreResult(NamedTuple):
    """An Inception score averaged over splits of the samples.

    Args:
        mean: the mean over the splits.
        std: their sample standard deviation; NaN for one split.
    """

    mean: float
    std: float


class InceptionScore(Described):
    r"""The Inception score: confident predictions for each sample, diverse ones overall.

    .. math::
        \exp\left(E_x\, KL\left(p(y | x) \,\|\, E_x\, p(y | x)\right)\right)

    It lies between 1 and the number of classes, and is computed for each of several splits.
    Samples are assigned to splits in turn, so their number need not be known in advance. For
    samples in random order this is equivalent to the contiguous splits of published scores.

    Args:
        splits: the number of splits; published scores use 10 of 5,000 samples each. The score
            grows with the size of a split.

    Raises:
        ValueError: if splits is not positive.
        TypeError: if splits is not an integer.

    Source: Salimans et al., Improved Techniques for Training GANs, 2016, arXiv 1606.03498.

    >>> import torch
    >>> from diffusionkit.metrics import InceptionScore
    >>> score = InceptionScore(splits=1)
    >>> score.update(probs=torch.eye(4))
    >>> round(score.compute().mean, 6)
    4.0
    """

    def __init__(self, splits: int = 10) -> None:
        check_count(splits, "splits")
        self.splits, self.count = splits, 0
        self._probs = torch.zeros(splits, 0, dtype=torch.float64)
        self._negentropies = torch.zeros(splits, dtype=torch.float64)

    def update(self, *, probs: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Add class probabilities or logits (n, C), one of the two.

        Raises:
            ValueError: if they are not finite, C differs from earlier calls, or probabilities are
                negative or do not sum to one.
            TypeError: unless exactly one is given, as a floating-point tensor.
        """
        if probs is not None and logits is None:
            check_features(probs, "probs")
            p = double(probs)
            rounding = max(1e-3, torch.finfo(probs.dtype).eps)
            wrong = (p < 0).any(1) | ((p.sum(1) - 1).abs() > rounding)
            if bool(wrong.any()):
                raise ValueError(
                    "probs: expected nonnegative rows that sum to 1, "
                    f"got {int(wrong.sum())} of {len(p)} rows that do not"
                )
            negentropies = torch.xlogy(p, p).sum(1)
        elif logits is not None and probs is None:
            check_features(logits, "logits")
            log_p = double(logits).log_softmax(1)
            p = log_p.exp()
            negentropies = (p * log_p).sum(1)
        else:
            raise TypeError("probs, logits: expected exactly one, got both or neither")
        self._prepare(p)
        part = (self.count + torch.arange(len(p), device=p.device)) % self.splits
        self._probs.index_add_(0, part, p)
        self._negentropies.index_add_(0, part, negentropies)
        self.count += len(p)

    def merge(self, other: InceptionScore) -> None:
        """Add the samples of another accumulator, as if they came after these.

        Raises:
            ValueError: if its number of splits or classes differs.
            TypeError: if other is not an InceptionScore.
        """
        if not isinstance(other, InceptionScore):
            raise TypeError(f"other: expected an InceptionScore, got {type(other).__name__}")
        if other.splits != self.splits:
            raise ValueError(f"other: expected {self.splits} splits, got {other.splits}")
        if other.count:
            self._prepare(other._probs)
            shift = self.count % self.splits
            self._probs += other._probs.roll(shift, 0).to(self._probs.device)
            self._negentropies += other._negentropies.roll(shift).to(self._probs.device)
            self.count += other.count

    def compute(self) -> InceptionScoreResult:
        """Return the mean and standard deviation over the splits.

        Raises:
            ValueError: if there are fewer samples than splits.
        """
        if self.count < self.splits:
            raise ValueError(
                f"samples: expected at least one for each of {self.splits} splits, got {self.count}"
            )
        part = torch.arange(self.splits, device=self._probs.device)
        counts = (self.count - part + self.splits - 1) // self.splits
        marginal = self._probs / counts.unsqueeze(1)
        gain = self._negentropies / counts - torch.xlogy(marginal, marginal).sum(1)
        scores = gain.exp()
        std = float(scores.std()) if self.splits > 1 else float("nan")
        return InceptionScoreResult(float(scores.mean()), std)

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the sums over each split, on the CPU."""
        return {
            "count": self.count,
            "probs": self._probs.cpu().clone(),
            "negentropies": self._negentropies.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`, including the number of splits.

        Raises:
            ValueError: if its entries or shapes are wrong.
        """
        check_mapping(state, "state")
        if set(state) != {"count", "probs", "negentropies"}:
            raise ValueError(f"state: expected count, probs and negentropies, got {sorted(state)}")
        probs, sums = (numbers(state[name], name) for name in ("probs", "negentropies"))
        check_count(state["count"], "count", least=0, most=2**62)
        if probs.ndim != 2 or sums.shape != probs.shape[:1]:
            raise ValueError(
                "state: expected probs (splits, C) and negentropies (splits,), "
                f"got {tuple(probs.shape)} and {tuple(sums.shape)}"
            )
        self.splits, self.count = len(sums), state["count"]
        self._probs, self._negentropies = probs.clone(), sums.clone()

    def _prepare(self, like: Tensor) -> None:
        """Allocate sums for the classes of p (n, C), or check that C is unchanged."""
        if not self.count:
            self._probs = like.new_zeros(self.splits, like.shape[1])
        if like.shape[1] != self._probs.shape[1]:
            raise ValueError(
                f"classes: expected {self._probs.shape[1]}, as before, got {like.shape[1]}"
            )
        self._probs = self._probs.to(like.device)
        self._negentropies = self._negentropies.to(like.device)
