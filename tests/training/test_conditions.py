"""Random dropping of conditions."""

import math

import pytest
import torch
from support import seeded

from diffusionkit.training.conditions import drop_conditions


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_dropped_fraction_is_the_probability(p) -> None:
    n = 20000
    class_labels = torch.arange(n) % 7
    got = drop_conditions(class_labels, 7, p, generator=seeded())
    dropped = got == 7
    assert torch.equal(got[~dropped], class_labels[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    assert got.dtype == class_labels.dtype


def test_probabilities_zero_and_one() -> None:
    class_labels = torch.arange(5000)
    assert torch.equal(drop_conditions(class_labels, -1, 0.0), class_labels)
    assert torch.equal(drop_conditions(class_labels, -1, 1), torch.full((5000,), -1))
    assert torch.equal(class_labels, torch.arange(5000))


def test_a_condition_is_dropped_as_a_whole() -> None:
    text = torch.rand(200, 3, 4, generator=seeded()) + 1
    null = torch.arange(-12.0, 0.0).view(3, 4)
    got = drop_conditions(text, null, 0.4, generator=seeded(1))
    kept = (got == text).flatten(1)
    gone = (got == null).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert torch.equal(gone.all(1), ~kept.all(1))
    assert 0 < int(kept.all(1).sum()) < 200


def test_a_sample_does_not_depend_on_its_batch() -> None:
    class_labels = torch.arange(20)
    together = drop_conditions(class_labels, -1, 0.5, generator=[seeded(k) for k in range(20)])
    alone = [
        drop_conditions(class_labels[k : k + 1], -1, 0.5, generator=[seeded(k)]) for k in range(20)
    ]
    assert torch.equal(torch.cat(alone), together)
    assert 0 < int((together == -1).sum()) < 20


def test_the_dtype_is_kept_and_the_null_gets_its_gradient() -> None:
    null = torch.zeros(3, requires_grad=True)  # as a learned embedding
    condition = torch.ones(40, 3, dtype=torch.bfloat16)
    got = drop_conditions(condition, null, 0.5, generator=seeded())
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert torch.equal(null.grad, (got == 0).float().sum(0))


@pytest.mark.parametrize(
    ("condition", "null", "probability", "error", "match"),
    [
        (torch.zeros(2).long(), 1, -0.1, ValueError, r"probability: .* \[0, 1\], got -0.1"),
        (torch.zeros(2).long(), 1, 1.1, ValueError, "probability: expected"),
        (torch.zeros(2).long(), 1, math.nan, ValueError, "probability: expected"),
        (torch.zeros(2).long(), 1, True, TypeError, "probability: expected a number, got bool"),
        (torch.zeros(2).long(), 1.5, 0.1, TypeError, "null: expected torch.int64.* torch.float32"),
        (torch.zeros(2, 3), torch.zeros(4), 0.1, ValueError,
         r"null: expected a shape that fits the condition's, \(2, 3\), got \(4,\)"),
        ([1, 2], 1, 0.1, TypeError, r"condition: expected a tensor \(B, ...\), got"),
        (torch.tensor(1), 1, 0.1, TypeError, "condition: expected a tensor"),
    ],
)  # fmt: skip
def test_invalid_arguments(condition, null, probability, error, match) -> None:
    with pytest.raises(error, match=match):
        drop_conditions(condition, null, probability)
