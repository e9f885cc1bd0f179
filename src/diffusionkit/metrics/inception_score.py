"""The Inception score of what a classifier says of samples, kept while they stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_count
from ._features import check_features, double


class Score(NamedTuple):
    """A score over several parts of the samples.

    Args:
        mean: of the parts.
        std: between the parts, divided by their number less one; NaN for one part.
    """

    mean: float
    std: float


class InceptionScore:
    r"""How sure a classifier is of each sample, and how many classes it sees in all.

    .. math::
        \exp\left(E_x\, KL\left(p(y | x) \,\|\, E_x\, p(y | x)\right)\right)

    between 1 and the number of classes, for each of several parts of the samples. They are dealt
    out to the parts one after another, as their number need not be known: for samples in no
    particular order that is as good as cutting them into runs, which is the published way.

    Args:
        splits: the number of parts; published scores have 10, of 5,000 samples each. The score
            grows with the size of the parts.

    Raises:
        ValueError: if splits is not positive.
        TypeError: if it is not an integer.

    Source: Salimans et al. (2016), arXiv:1606.03498.

    >>> score = InceptionScore(splits=1)
    >>> score.update(probs=torch.eye(4))
    >>> round(score.compute().mean, 6)
    4.0
    """

    def __init__(self, splits: int = 10) -> None:
        """Start with no samples."""
        check_count(splits, "splits")
        self.splits, self.count = splits, 0
        self._probs = torch.zeros(splits, 0, dtype=torch.float64)
        self._negentropies = torch.zeros(splits, dtype=torch.float64)

    def update(self, *, probs: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Take in class probabilities or logits (n, C), one of the two.

        Raises:
            ValueError: if they are not finite, C is another than before, or probabilities are
                negative or do not sum to one.
            TypeError: unless exactly one is given, a floating-point tensor.
        """
        if probs is not None and logits is None:
            check_features(probs, "probs")
            p = double(probs)
            wrong = (p < 0).any(1) | ((p.sum(1) - 1).abs() > 1e-3)
            if bool(wrong.any()):
                raise ValueError(
                    "probs: expected numbers >= 0 whose rows sum to 1, "
                    f"got {int(wrong.sum())} of {len(p)} rows that do not"
                )
            negentropies = torch.xlogy(p, p).sum(1)
        elif logits is not None and probs is None:
            check_features(logits, "logits")
            log_p = double(logits).log_softmax(1)
            p = log_p.exp()
            negentropies = (p * log_p).sum(1)
        else:
            raise TypeError("expected either probs= or logits=")
        self._prepare(p)
        part = (self.count + torch.arange(len(p), device=p.device)) % self.splits
        self._probs.index_add_(0, part, p)
        self._negentropies.index_add_(0, part, negentropies)
        self.count += len(p)

    def merge(self, other: InceptionScore) -> None:
        """Take in the samples that another has seen, as if they came after one's own.

        Raises:
            ValueError: if it has other splits or classes.
            TypeError: if it is something else.
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

    def compute(self) -> Score:
        """Return the mean over the splits and their standard deviation.

        Raises:
            ValueError: if there are fewer samples than splits.
        """
        if self.count < self.splits:
            raise ValueError(
                f"expected at least one sample for each of {self.splits} splits, got {self.count}"
            )
        part = torch.arange(self.splits, device=self._probs.device)
        counts = (self.count - part + self.splits - 1) // self.splits
        marginal = self._probs / counts.unsqueeze(1)
        gain = self._negentropies / counts - torch.xlogy(marginal, marginal).sum(1)
        scores = gain.exp()
        std = float(scores.std()) if self.splits > 1 else float("nan")
        return Score(float(scores.mean()), std)

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the sums of each split, on the CPU."""
        return {
            "count": self.count,
            "probs": self._probs.cpu().clone(),
            "negentropies": self._negentropies.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, with its splits.

        Raises:
            ValueError: if it is not one.
        """
        if set(state) != {"count", "probs", "negentropies"}:
            raise ValueError(f"state: expected count, probs and negentropies, got {sorted(state)}")
        probs, sums = (torch.as_tensor(state[name]).double() for name in ("probs", "negentropies"))
        if probs.ndim != 2 or sums.shape != probs.shape[:1]:
            raise ValueError(
                "state: expected probs (splits, C) and negentropies (splits,), "
                f"got {tuple(probs.shape)} and {tuple(sums.shape)}"
            )
        self.splits, self.count = len(sums), int(state["count"])
        self._probs, self._negentropies = probs.clone(), sums.clone()

    def _prepare(self, like: Tensor) -> None:
        """Make room for classes as those of p (n, C), or check that they are as before."""
        if not self.count:
            self._probs = like.new_zeros(self.splits, like.shape[1])
        if like.shape[1] != self._probs.shape[1]:
            raise ValueError(
                f"expected {self._probs.shape[1]} classes as before, got {like.shape[1]}"
            )
        self._probs = self._probs.to(like.device)
        self._negentropies = self._negentropies.to(like.device)
