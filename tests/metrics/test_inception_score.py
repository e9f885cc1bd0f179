"""The Inception score: reference values, closed forms, torchmetrics, streaming and merging."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import seeded

from diffusionkit.metrics import InceptionScore

PROBS = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9]]
REFERENCE = 1.435827111444629


def logits(n: int, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=seeded(seed), dtype=torch.float64)


def score_of(*parts: torch.Tensor, splits: int = 3) -> InceptionScore:
    score = InceptionScore(splits)
    for part in parts:
        score.update(logits=part)
    return score


def test_reference_value() -> None:
    probs = torch.tensor(PROBS, dtype=torch.float64)
    score = InceptionScore(splits=1)
    score.update(probs=probs)
    mean, std = score.compute()
    assert mean == pytest.approx(REFERENCE, rel=1e-12)
    assert math.isnan(std)
    again = InceptionScore(splits=1)
    again.update(logits=probs.log() + 2)
    assert again.compute().mean == pytest.approx(REFERENCE, rel=1e-12)


def test_confident_and_uniform_predictions() -> None:
    """The number of classes if each is predicted with certainty; 1 if all or only one are."""
    for probs, expected in (
        (torch.eye(7), 7.0),
        (torch.full((9, 7), 1 / 7), 1.0),
        (torch.eye(7)[[2] * 5], 1.0),
    ):
        score = InceptionScore(splits=1)
        score.update(probs=probs)
        assert score.compute().mean == pytest.approx(expected, rel=1e-6)


def test_splits() -> None:
    """Samples are assigned in turn: one split has one class, the other both."""
    one, other = torch.eye(2)
    score = InceptionScore(splits=2)
    score.update(probs=torch.stack([one, one, one, other, one]))
    assert score.compute().mean == pytest.approx(1.5)
    assert score.compute().std == pytest.approx(math.sqrt(0.5))


def test_torchmetrics() -> None:
    inception = pytest.importorskip("torchmetrics.image.inception")
    x = logits(60).float()
    with pytest.warns(UserWarning, match="will save all extracted features"):
        theirs = inception.InceptionScore(feature=torch.nn.Identity(), splits=4)
    torch.manual_seed(3)
    order = torch.randperm(60)  # torchmetrics shuffles before splitting
    theirs.update(x)
    torch.manual_seed(3)
    mean, std = theirs.compute()
    found = score_of(x[order].view(4, 15, -1).transpose(0, 1).flatten(0, 1), splits=4).compute()
    assert found == pytest.approx((float(mean), float(std)), rel=1e-6)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 4))
def test_streaming_and_merging(sizes, splits) -> None:
    x = logits(sum(sizes) + splits)
    parts = [*x[:-splits].split(sizes), x[-splits:]]
    once = score_of(x, splits=splits).compute()
    total = InceptionScore(splits)
    for part in parts:
        total.merge(score_of(part, splits=splits))
    for found in (score_of(*parts, splits=splits), total):
        assert found.count == len(x)
        assert found.compute() == pytest.approx(once, rel=1e-12, nan_ok=True)


def test_saved_states() -> None:
    first = score_of(logits(10), splits=4)
    again = InceptionScore()
    again.load_state_dict(first.state_dict())
    again.update(logits=logits(9, seed=1))
    expected = score_of(logits(10), logits(9, seed=1), splits=4).compute()
    assert again.compute() == pytest.approx(expected, rel=1e-12)
    alone = score_of(logits(10), splits=4)
    again = InceptionScore()
    for one in (again, first):  # a state shares no memory with accumulators
        state = alone.state_dict()
        one.load_state_dict(state)
        one.update(logits=logits(9, seed=1))
        one.load_state_dict(state)
        assert one.compute() == alone.compute()
    state = first.state_dict()
    first.update(logits=logits(9, seed=1))
    first.load_state_dict(state)
    assert first.compute() == alone.compute()
    empty = InceptionScore(4)
    empty.merge(InceptionScore(4))
    empty.merge(first)
    assert empty.compute() == first.compute()


def test_bad_input() -> None:
    score = score_of(logits(10))
    with pytest.raises(ValueError, match="rows that sum to 1, got 4 of 4 rows that do not"):
        score.update(probs=torch.full((4, 5), 0.25))
    with pytest.raises(ValueError, match="got 1 of 2 rows that do not"):
        score.update(probs=torch.tensor([[1.2, -0.2], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="logits: expected finite values, got 4 of 4"):
        score.update(logits=torch.full((4, 5), math.nan))
    with pytest.raises(ValueError, match="probs: expected finite values, got 4 of 4"):
        score.update(probs=torch.full((4, 5), math.nan))
    with pytest.raises(ValueError, match="classes: expected 5, as before, got 4"):
        score.update(logits=logits(3, classes=4))
    with pytest.raises(ValueError, match="classes: expected 5, as before, got 4"):
        score.merge(score_of(logits(3, classes=4)))
    for wrong in ({}, {"probs": torch.eye(5), "logits": torch.eye(5)}):
        with pytest.raises(TypeError, match="probs, logits: expected exactly one"):
            score.update(**wrong)
    with pytest.raises(TypeError, match="floating-point"):
        score.update(probs=torch.eye(5).long())
    assert score.compute() == score_of(logits(10)).compute()
    with pytest.raises(ValueError, match="each of 3 splits, got 2"):
        score_of(logits(2)).compute()
    with pytest.raises(ValueError, match="other: expected 3 splits, got 2"):
        score.merge(InceptionScore(2))
    with pytest.raises(TypeError, match="other: expected an InceptionScore, got int"):
        score.merge(3)
    with pytest.raises(ValueError, match="splits: expected an integer >= 1, got 0"):
        InceptionScore(0)
    with pytest.raises(ValueError, match="expected count, probs and negentropies"):
        score.load_state_dict({})
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        score.load_state_dict(
            {"count": 1, "probs": torch.zeros(2, 3), "negentropies": torch.zeros(3)}
        )
